"""Linear attention: a feature map instead of the softmax, a fixed-size state instead of a cache.

    o_i = Σ_{j ≤ i} (φ(q_i)·φ(k_j)) v_j / (φ(q_i)·Σ_{j ≤ i} φ(k_j) + ε)    [arXiv 2006.16236, eq. 9]

Three exact forms of the sum: step by step, as one masked product, O(L²), and in chunks of c
positions, each reading what came before it from a state, O(L (c + f)).

Glossary: d width, H heads, e head width, f = size of φ(x), c chunk, L time.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.kernels import compiled, known_kernel
from mad.layers.layer import Layer, State, head_width
from workbench.errors import ConfigError, unknown_name
from workbench.integrations.kernels import Kernel

EPSILON = 1e-12
NORM_EPSILON = 1e-4
"""Added to the sum that `norm_q` and `norm_k` divide features by."""


class PointwiseMap(nn.Module):
    """φ without parameters: `elu` (elu(x) + 1), `relu` or `identity`; f = e."""

    def __init__(self, head: int, kind: str) -> None:
        super().__init__()
        self.size, self.kind = head, kind

    def forward(self, x: Float[Tensor, "*axes head"]) -> Float[Tensor, "*axes features"]:
        """Apply φ elementwise."""
        if self.kind == "elu":
            return F.elu(x) + 1
        return F.relu(x) if self.kind == "relu" else x


class ProductMap(nn.Module):
    """φ(x) = (W₁x + b₁) ⊙ (W₂x + b₂); f = e."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.size = head
        self.left, self.right = nn.Linear(head, head), nn.Linear(head, head)

    def forward(self, x: Float[Tensor, "*axes head"]) -> Float[Tensor, "*axes features"]:
        """The Hadamard product of two affine maps."""
        return self.left(x) * self.right(x)


class LearnedMap(nn.Module):
    """`hedgehog`: softmax([2y, −2y]), y = Wx + b, W = I at first; `t2r`: relu(Wx + b)."""

    def __init__(self, head: int, kind: str) -> None:
        super().__init__()
        self.size, self.kind = (2 * head if kind == "hedgehog" else head), kind
        self.map = nn.Linear(head, head)
        if kind == "hedgehog":
            nn.init.eye_(self.map.weight)

    def forward(self, x: Float[Tensor, "*axes head"]) -> Float[Tensor, "*axes features"]:
        """A learned affine map and its nonlinearity."""
        y = self.map(x)
        if self.kind == "t2r":
            return F.relu(y)
        return torch.cat([2 * y, -2 * y], dim=-1).softmax(dim=-1)


class DPFPMap(nn.Module):
    """u = [relu(x), relu(−x)]; φ(x) = u ⊙ roll(u, j) for j = 1 … 4; f = 8e.  [arXiv 2102.11174]"""

    def __init__(self, head: int, order: int = 4) -> None:
        super().__init__()
        self.size, self.order = 2 * head * order, order

    def forward(self, x: Float[Tensor, "*axes head"]) -> Float[Tensor, "*axes features"]:
        """Products of the rectified halves with their rolled copies."""
        u = torch.cat([x.relu(), (-x).relu()], dim=-1)
        return torch.cat([u * u.roll(j, dims=-1) for j in range(1, self.order + 1)], dim=-1)


class TaylorMap(nn.Module):
    """φ(q)·φ(k) = 1 + s + s²/2 with s = q·k/√e; f = 1 + e + e(e + 1)/2.  [arXiv 2402.18668]"""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.size, self.head = 1 + head + head * (head + 1) // 2, head

    def forward(self, x: Float[Tensor, "*axes head"]) -> Float[Tensor, "*axes features"]:
        """[1, x/e^¼, x_i²/√(2e), x_i x_j/√e for i < j]."""
        i, j = torch.triu_indices(self.head, self.head, 1, device=x.device)
        root = self.head**0.5
        return torch.cat(
            [
                torch.ones_like(x[..., :1]),
                x / root**0.5,
                x * x / (2**0.5 * root),
                x[..., i] * x[..., j] / root,
            ],
            dim=-1,
        )


class OuterProductMap(nn.Module):
    """φ(x) = upper triangle of (W₁x)(W₂x)ᵀ, diagonal included; f = e(e + 1)/2."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.size, self.head = head * (head + 1) // 2, head
        self.left, self.right = (nn.Linear(head, head, bias=False) for _ in range(2))

    def forward(self, x: Float[Tensor, "*axes head"]) -> Float[Tensor, "*axes features"]:
        """Products of every pair of two linear maps, once per pair."""
        i, j = torch.triu_indices(self.head, self.head, device=x.device)
        return self.left(x)[..., i] * self.right(x)[..., j]


class RebasedMap(nn.Module):
    """y = γ LayerNorm(x) + β, φ = [y_i²/√e, y_i y_j √(2/e) for i < j]; f = e(e + 1)/2.

    φ(q)·φ(k) = (y_q·y_k)²/e: a square, never negative.  [arXiv 2402.10644]
    """

    def __init__(self, head: int) -> None:
        super().__init__()
        self.size, self.head = head * (head + 1) // 2, head
        self.scale, self.shift = nn.Parameter(torch.ones(head)), nn.Parameter(torch.zeros(head))

    def forward(self, x: Float[Tensor, "*axes head"]) -> Float[Tensor, "*axes features"]:
        """Squares and products of the normalised input."""
        y = F.layer_norm(x, (self.head,), self.scale, self.shift)
        i, j = torch.triu_indices(self.head, self.head, 1, device=x.device)
        root = self.head**0.5
        return torch.cat([y * y / root, y[..., i] * y[..., j] * (2**0.5 / root)], dim=-1)


FEATURE_MAPS = (
    "elementwise_product",
    "elu",
    "relu",
    "identity",
    "hedgehog",
    "t2r",
    "dpfp",
    "taylor",
    "learnable_outer_product",
    "rebased",
)


def build_feature_map(kind: str, head: int) -> nn.Module:
    """The feature map of that name for heads of that width; its `size` is f."""
    if kind in ("elu", "relu", "identity"):
        return PointwiseMap(head, kind)
    if kind in ("hedgehog", "t2r"):
        return LearnedMap(head, kind)
    plain = {
        "elementwise_product": ProductMap,
        "dpfp": DPFPMap,
        "taylor": TaylorMap,
        "learnable_outer_product": OuterProductMap,
        "rebased": RebasedMap,
    }
    if kind not in plain:
        raise unknown_name("feature map", kind, FEATURE_MAPS)
    return plain[kind](head)


def linear_attention_recurrent(
    q: Float[Tensor, "batch heads time features"],
    k: Float[Tensor, "batch heads time features"],
    v: Float[Tensor, "batch heads time head"],
) -> Float[Tensor, "batch heads time head"]:
    """The unnormalised sum, one step at a time: S_t = S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t."""
    state = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=v.dtype, device=v.device)
    outputs = []
    for t in range(k.shape[2]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]  # (B, H, f, e)
        outputs.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(outputs, dim=2)


def linear_attention_parallel(
    q: Float[Tensor, "batch heads time features"],
    k: Float[Tensor, "batch heads time features"],
    v: Float[Tensor, "batch heads time head"],
) -> Float[Tensor, "batch heads time head"]:
    """The same sum as one masked product: tril(Q Kᵀ) V."""
    return (q @ k.transpose(-1, -2)).tril() @ v


def linear_attention_chunked(
    q: Float[Tensor, "batch heads time features"],
    k: Float[Tensor, "batch heads time features"],
    v: Float[Tensor, "batch heads time head"],
    chunk: int = 64,
) -> Float[Tensor, "batch heads time head"]:
    """The same sum in chunks: O = tril(Q Kᵀ) V + Q S, S ← S + Kᵀ V from chunk to chunk.

    All chunks are computed at once; the states before them are sums over the chunks so far.
    """
    length = q.shape[2]
    missing = -length % chunk
    q, k, v = (
        F.pad(part, (0, 0, 0, missing)).unflatten(2, (-1, chunk)) for part in (q, k, v)
    )  # (B, H, n, c, ·); zeros at the end change nothing before them
    added = k.transpose(-1, -2) @ v  # (B, H, n, f, e)
    before = added.cumsum(dim=2) - added
    mixed = (q @ k.transpose(-1, -2)).tril() @ v + q @ before
    return mixed.flatten(2, 3)[:, :, :length]


def prefers_chunks(length: int, features: int, head: int, chunk: int) -> bool:
    """Whether chunks need fewer multiplications than the one masked product."""
    whole = length * (features + head)
    return chunk * (features + head) + 2 * features * head < whole


class LinearAttention(Layer):
    """Linear attention; par 4d² + those of two feature maps, state H·f·e (+ H·f to normalise).

    The state is the sum of φ(k) vᵀ, (batch, H, f, e), beside the sum of φ(k) where the output is
    divided by it; both are kept in float32 at least. With `key_width` a, queries and keys are
    H·a wide before the feature map: par 2d² + 2d·H·a.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 1,
        feature_map: str = "elementwise_product",
        normalize: Literal["rms", "sum"] = "rms",
        norm_q: bool = False,
        norm_k: bool = False,
        tie: bool = False,
        key_width: int | None = None,
        form: Literal["auto", "parallel", "chunked"] = "auto",
        chunk: int = 64,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        head = head_width(width, num_heads, "linear-attention")
        if normalize not in ("rms", "sum"):
            raise ConfigError(f"linear-attention: normalize={normalize!r}; expected rms or sum")
        if form not in ("auto", "parallel", "chunked"):
            raise ConfigError(f"linear-attention: form={form!r}; expected auto, parallel, chunked")
        if chunk < 1 or (key_width is not None and key_width < 1):
            raise ConfigError(
                f"linear-attention: chunk={chunk} and key_width={key_width} must be positive"
            )
        self.width, self.num_heads, self.head, self.normalize = width, num_heads, head, normalize
        self.norm_q, self.norm_k, self.form, self.chunk = norm_q, norm_k, form, chunk
        self.key_width = head if key_width is None else key_width
        self.qkv = nn.Linear(width, width + 2 * num_heads * self.key_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.map_q = build_feature_map(feature_map, self.key_width)
        self.map_k = None if tie else build_feature_map(feature_map, self.key_width)
        self.kernel = known_kernel("linear-attention", kernel)
        plain = isinstance(self.map_q, TaylorMap) and not (norm_q or norm_k)
        self.compiled = "based" if plain else "linear_attention"
        self.kernels = {self.compiled: kernel}

    def _heads(self, x: Float[Tensor, "batch time width"]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v before the feature map, each (B, H, L, ·)."""
        keys = self.num_heads * self.key_width
        q, k, v = self.qkv(x).split((keys, keys, self.width), dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        return q, k, v

    def _features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """φ(q), φ(k), v in float32 at least; v gets a 1 if keys are summed."""
        q, k = self.map_q(q), (self.map_k or self.map_q)(k)
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        if self.norm_q:
            q = q / (q.sum(dim=-1, keepdim=True) + NORM_EPSILON)
        if self.norm_k:
            k = k / (k.sum(dim=-1, keepdim=True) + NORM_EPSILON)
        return q, k, self._summed(v)

    def _summed(self, v: Tensor) -> Tensor:
        """v, with a column of ones where the sum of the keys is wanted."""
        return F.pad(v, (0, 1), value=1.0) if self.normalize == "sum" else v

    def _read(self, mixed: Float[Tensor, "batch heads time sums"]) -> Tensor:
        if self.normalize == "rms":
            mixed = F.rms_norm(mixed, (self.head,), eps=1e-5)
        else:
            mixed = mixed[..., :-1] / (mixed[..., -1:] + EPSILON)
        return mixed.transpose(1, 2).flatten(2)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Kernel attention over the past of each position."""
        q, k, v = self._heads(x)
        fused = compiled(self.compiled, self.kernel, q, x, self.key_width)
        if fused is not None:
            features = self.compiled != "based"  # else the kernel makes them
            mixed = fused(*self._features(q, k, v)) if features else fused(q, k, self._summed(v))
            with torch.autocast(x.device.type, enabled=False):
                mixed = self._read(mixed)
            return self.out(mixed.to(self.out.weight.dtype))
        q, k, v = self._features(q, k, v)
        form = self.form
        if form == "auto":
            chunks = prefers_chunks(x.shape[1], q.shape[-1], v.shape[-1], self.chunk)
            form = "chunked" if chunks else "parallel"
        with torch.autocast(x.device.type, enabled=False):
            if form == "chunked":
                mixed = linear_attention_chunked(q, k, v, self.chunk)
            else:
                mixed = linear_attention_parallel(q, k, v)
            mixed = self._read(mixed)
        return self.out(mixed.to(self.out.weight.dtype))

    def initial_state(
        self,
        batch: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Empty sums."""
        dtype = torch.promote_types(dtype or self.qkv.weight.dtype, torch.float32)
        shape = (batch, self.num_heads, int(self.map_q.size))
        state = {"sums": torch.zeros(*shape, self.head, device=device, dtype=dtype)}
        if self.normalize == "sum":
            state["keys"] = torch.zeros(*shape, device=device, dtype=dtype)
        return state

    def step(
        self, x: Float[Tensor, "batch width"], state: State
    ) -> tuple[Float[Tensor, "batch width"], State]:
        """One token: added to the sums, then read from them."""
        q, k, v = self._features(*self._heads(x[:, None]))  # (B, H, 1, ·)
        sums = state["sums"]
        if self.normalize == "sum":
            sums = torch.cat([sums, state["keys"][..., None]], dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            sums = sums + k.transpose(-1, -2) @ v
            y = self._read(q @ sums)[:, 0]
        new = {"sums": sums[..., : self.head]}
        if self.normalize == "sum":
            new["keys"] = sums[..., -1]
        return self.out(y.to(self.out.weight.dtype)), new

    def state_floats(self, length: int) -> int:
        """The matrix state of every head, and the key sum where it normalises."""
        summed = self.normalize == "sum"
        return self.matrix_state_floats(length) + summed * self.num_heads * int(self.map_q.size)

    def matrix_state_floats(self, length: int) -> int:
        """The matrix state of every head."""
        del length
        return self.num_heads * int(self.map_q.size) * self.head

    def mixing_flops_per_token(self, length: int) -> int:
        """State update and read-out in the recurrent form."""
        return 4 * self.state_floats(length)
