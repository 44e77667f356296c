"""Linear attention: a feature map instead of the softmax, a fixed-size state instead of a cache.

    o_i = Σ_{j ≤ i} (φ(q_i)·φ(k_j)) v_j / (φ(q_i)·Σ_{j ≤ i} φ(k_j) + ε)    [arXiv 2006.16236, eq. 9]

Glossary: e head width, f = size of φ(x).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mad.layers.layer import Layer, head_width
from workbench.errors import unknown_name

EPSILON = 1e-12


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


def build_feature_map(kind: str, head: int) -> nn.Module:
    """The feature map of that name for heads of that width; its `size` is f."""
    if kind == "elementwise_product":
        return ProductMap(head)
    if kind in ("elu", "relu", "identity"):
        return PointwiseMap(head, kind)
    if kind in ("hedgehog", "t2r"):
        return LearnedMap(head, kind)
    if kind == "dpfp":
        return DPFPMap(head)
    if kind == "taylor":
        return TaylorMap(head)
    known = ["elementwise_product", "elu", "relu", "identity", "hedgehog", "t2r", "dpfp", "taylor"]
    raise unknown_name("feature map", kind, known)


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


class LinearAttention(Layer):
    """Linear attention; par 4d² + those of two feature maps, state H·f·e (+ H·f to normalise)."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 1,
        feature_map: str = "elementwise_product",
        normalize: Literal["rms", "sum"] = "rms",
    ) -> None:
        super().__init__()
        head = head_width(width, num_heads, "linear-attention")
        self.width, self.num_heads, self.normalize = width, num_heads, normalize
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.map_q = build_feature_map(feature_map, head)
        self.map_k = build_feature_map(feature_map, head)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Kernel attention over the past of each position."""
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, L, e)
        q, k = self.map_q(q), self.map_k(k)  # (B, H, L, f)
        mixed = linear_attention_parallel(q, k, v)
        if self.normalize == "rms":
            mixed = F.rms_norm(mixed, (mixed.shape[-1],), eps=1e-5)
        else:
            mixed = mixed / ((q * k.cumsum(dim=2)).sum(dim=-1, keepdim=True) + EPSILON)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, self.width))

    def state_floats(self, length: int) -> int:
        """The matrix state of every head, and the key sum where it normalises."""
        del length
        features, head = int(self.map_q.size), self.width // self.num_heads
        return self.num_heads * features * (head + (self.normalize == "sum"))

    def mixing_flops_per_token(self, length: int) -> int:
        """State update and read-out in the recurrent form."""
        return 4 * self.state_floats(length)
