"""The linear layer that holds codes.   [lplr_q README]

    y = s_out * Theta_m^T ( (Q + L R) Theta_n (s_in * x / d) ) + b

What is stored, and under which names: :mod:`lplr_q.activation_aware.layer_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lplr_q.activation_aware.decompose import Decomposition, rotation_kind
from lplr_q.activation_aware.layer_state import (
    Form,
    SignForm,
    float_signs,
    pack_decomposition,
    trained_value,
)
from lplr_q.bits import FactorBits, LayerBits, factor_pair
from lplr_q.kernels.product import coded_factor, matrix, product, theta
from lplr_q.linalg.hadamard import unrotate_rows
from lplr_q.pack import pack_signs, unpack_signs
from workbench.errors import ConfigError, DataError

Mode = Literal["dequant", "cached", "kernel"]
MODES = ("dequant", "cached", "kernel")


class LPLRQuantizedLinear(nn.Module):
    """A linear layer stored as Q + L R in few bits.

    ``mode`` is

    * ``dequant``: codes are decoded tile by tile in every forward; the layer stays small;
    * ``kernel``: as ``dequant``, but up to eight activations at a time go through a compiled
      product with the codes where there is one, and the decoded factors (16 bits of r (m + n)) are
      kept;
    * ``cached``: the dense matrix is built once and kept; for evaluation at speed.

    Gradients reach x in every mode, the parameters (:meth:`trainable`) in ``dequant`` only.
    ``tile_rows`` is the number of rows decoded at a time; 0 chooses.
    """

    def __init__(  # noqa: PLR0913 - one keyword per property of the form
        self,
        in_features: int,
        out_features: int,
        *,
        codebook: str = "e8p",
        q_bits: int = 2,
        rank: int = 0,
        factor_bits: FactorBits = 4,
        rotated: bool = True,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        factor_codebook: str = "lloyd-max",
        rescaled: bool = False,
        ft_rank: int = 0,
        signs: SignForm = "packed",
        rotation: str = "had",
        q_group: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        l_bits, r_bits = factor_pair(factor_bits)
        self.form = Form(
            in_features=in_features,
            out_features=out_features,
            codebook=codebook,
            q_bits=q_bits,
            rank=rank,
            l_bits=l_bits,
            r_bits=r_bits,
            rotated=rotated,
            factor_codebook=factor_codebook,
            rescaled=rescaled,
            ft_rank=ft_rank,
            signs=signs,
            rotation=rotation,
            q_group=q_group,
        )
        self.mode: Mode = "dequant"
        self.tile_rows = 0
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        for name, (shape, kind) in self.form.layout().items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind))
        if ft_rank:
            for name, shape in (
                ("lora_L", (out_features, ft_rank)),
                ("lora_R", (ft_rank, in_features)),
            ):
                value = torch.zeros(shape, dtype=torch.bfloat16)
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False)
            if bias
            else None
        )

    # ------------------------------------------------------------ making and describing

    @classmethod
    def from_decomposition(
        cls, result: Decomposition, bias: Tensor | None = None, ft_rank: int = 0
    ) -> LPLRQuantizedLinear:
        """Pack the codes of a decomposition; the first ``ft_rank`` components become
        parameters."""
        m, n = result.shape
        left, right = result.left, result.right
        layer = cls(
            n,
            m,
            codebook=result.codebook,
            q_bits=result.q_bits if result.q_codes else 0,
            rank=result.rank,
            factor_bits=16 if left is None or right is None else (left.bits, right.bits),
            rotated=result.signs_in is not None,
            bias=bias is not None,
            dtype=None if bias is None else bias.dtype,
            factor_codebook=getattr(left, "codebook", "lloyd-max"),
            rescaled=getattr(result, "rescale", None) is not None,
            ft_rank=ft_rank,
            rotation=getattr(result, "rotation", "had"),
            q_group=getattr(result, "q_group", 0),
        )
        layer.load_state_dict(pack_decomposition(result, bias, ft_rank))
        return layer

    def settings(self) -> dict[str, Any]:
        """What is needed to build an empty layer of this form (goes into ``config.json``)."""
        built = {"in": "none", "out": "none"}
        if self.form.rotated:
            family = self.form.rotation
            built["in"] = rotation_kind(self.in_features, family)
            built["out"] = rotation_kind(self.out_features, family)
        return {
            **self.form.settings(),
            "bias": self.bias is not None,
            "rotation_in": built["in"],
            "rotation_out": built["out"],
        }

    @classmethod
    def from_settings(
        cls, settings: dict[str, Any], dtype: torch.dtype | None = None
    ) -> LPLRQuantizedLinear:
        """An empty layer from :meth:`settings`; refuses a rotation this version would build
        otherwise. Until format version 2 both factors had ``factor_bits``."""
        expected = {k: v for k, v in settings.items() if not k.startswith("rotation_")}
        if "factor_bits" in expected and not {"l_bits", "r_bits"} & set(expected):
            expected["l_bits"] = expected["r_bits"] = expected.pop("factor_bits")
        unknown = set(expected) - set(Form.__dataclass_fields__) - {"bias"}
        if unknown:
            raise DataError(f"unknown settings of a compressed layer: {', '.join(sorted(unknown))}")
        both = expected.pop("l_bits", 4), expected.pop("r_bits", 4)
        layer = cls(**expected, factor_bits=both, dtype=dtype)
        own = layer.settings()
        for key, value in settings.items():
            if key.startswith("rotation_") and own[key] != value:
                raise DataError(f"{key} is {value!r} in the file, this version builds {own[key]!r}")
        return layer

    @property
    def rank(self) -> int:
        """Components of L R, parameters included."""
        return self.form.rank

    def stored_bits(self) -> LayerBits:
        """Bits by what they are spent on, from the shapes in the file; a part that is being trained
        counts 16 bits, as it will be stored."""
        spent = dict.fromkeys(("q", "factors", "scales", "signs"), 0)
        for name, (shape, kind) in self.form.layout().items():
            part = "scales" if name.endswith(("_scales", "_scale", "rescale")) else "factors"
            part = {"q_c": "q", "q_t": "q", "sig": "signs"}.get(name[:3], part)
            spent[part] += torch.Size(shape).numel() * kind.itemsize * 8
        m, n = self.out_features, self.in_features
        spent["factors"] += 16 * self.form.ft_rank * (m + n)
        return LayerBits(m * n, spent["q"], spent["factors"], spent["scales"], spent["signs"])

    def buffer_bytes(self) -> int:
        """Bytes of codes, scales, signs and parameters (the bias is not counted)."""
        own = [p for p in self.parameters() if p is not self.bias]
        return sum(t.numel() * t.element_size() for t in [*self.buffers(), *own])

    def kept_bytes(self) -> int:
        """Bytes of what the mode keeps decoded."""
        return sum(t.numel() * t.element_size() for t in self._kept.values())

    def extra_repr(self) -> str:
        """Shape and bits for ``print(model)``."""
        form, tuned = self.form, ""
        if form.ft_rank:
            tuned = f" ({form.ft_rank} as parameters)"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{form.codebook} {form.q_bits} bits, rank {form.rank}{tuned}, "
            f"{self.stored_bits().per_weight:.3f} bits per weight"
        )

    # ------------------------------------------------------------ decoding

    def codes(self, name: str) -> tuple[list[Tensor], Tensor | None]:
        """Code tensors and tail of ``q``, ``l`` or ``r``."""
        names = (f"{name}_codes", f"{name}_codes_2")
        buffers = self._buffers
        found = [b for b in (buffers.get(part) for part in names) if b is not None]
        return found, buffers.get(f"{name}_tail")

    def factor(self, name: str) -> Float[Tensor, "r length"]:
        """Coded components of L^T or R."""
        form = self.form
        length = self.out_features if name == "l" else self.in_features
        codes, tail = self.codes(name)
        scales = self._buffers.get(f"{name}_scales")
        return coded_factor(
            codes,
            tail,
            scales,
            form.factor_codebook,
            form.side_bits(name),
            form.coded_rank,
            length,
        )

    def _side(self, name: str) -> Float[Tensor, "r length"]:
        """L^T (``l``) or R (``r``): coded components, then parameters; float32."""
        parts = [self.factor(name)] if self.form.coded_rank else []
        if self.form.ft_rank:
            parts.append(self.lora_L.float().T if name == "l" else self.lora_R.float())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def signs(self) -> tuple[Tensor, Tensor]:
        """(signs_out, signs_in): +-1, or what training made of them."""
        return self._sign("signs_out", self.out_features), self._sign("signs_in", self.in_features)

    def _sign(self, name: str, count: int) -> Tensor:
        stored = getattr(self, name)
        if stored.dtype.is_floating_point:  # being trained
            return stored
        return float_signs(stored) if self.form.signs == "float" else unpack_signs(stored, count)

    def input_divisor(self) -> Float[Tensor, " n"] | None:
        """d of x / d, or None."""
        stored = self._buffers.get("rescale")
        return None if stored is None else stored.view(torch.bfloat16).float()

    def _rotated_matrix(self) -> Float[Tensor, "m n"]:
        """Q + L R in the rotated basis, float32."""
        form, m, n = self.form, self.out_features, self.in_features
        codes, tail = self.codes("q")
        if form.q_bits:
            kind = form.codebook, form.q_bits
            total = matrix(codes, tail, self.q_scale, *kind, m, n, form.q_group)
        else:
            total = torch.zeros(m, n, device=next(self.buffers(), self.bias).device)
        return total + self._side("l").T @ self._side("r") if form.rank else total

    def dequantize(self) -> Float[Tensor, "m n"]:
        """The dense matrix in its own basis, float32."""
        dense = self._rotated_matrix()
        if self.form.rotated:
            signs_out, signs_in = self.signs()
            family = self.form.rotation
            dense = theta(dense, True, family) * signs_in
            dense = (theta(dense.T, True, family) * signs_out).T.contiguous()
        divisor = self.input_divisor()
        return dense if divisor is None else dense / divisor

    @property
    def weight(self) -> Float[Tensor, "m n"]:
        """The dense matrix, for code that only looks at a linear layer's ``weight``; a copy."""
        return self.dequantize()

    # ------------------------------------------------------------ forward

    def set_mode(self, mode: Mode) -> LPLRQuantizedLinear:
        """Choose what is decoded in every call and what is kept."""
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}; choose dequant, cached or kernel")
        if mode != "dequant" and any(p.requires_grad for p in self._trained().values()):
            raise ConfigError(f"mode {mode} would hide trained parameters; call merge_trained()")
        self.mode = mode
        self._kept.clear()
        return self

    def _keep(self, name: str, dtype: torch.dtype, build: Callable[[], Tensor]) -> Tensor:
        """What ``build`` returns, kept until the layer is moved, loaded or given another mode."""
        if self.mode == "dequant":
            return build().to(dtype)
        found = self._kept.get((name, dtype))
        if found is None:
            # what is built in inference mode could never take part in a backward pass
            with torch.inference_mode(False), torch.no_grad():
                found = build().to(dtype).detach()
            self._kept[name, dtype] = found
        return found

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """W^ x + b in the type of x; x is not changed."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.mode == "cached":
            return nn.functional.linear(x, self._keep("dense", x.dtype, self.dequantize), bias)
        inner = x
        divisor = self.input_divisor()
        if divisor is not None:
            inner = inner.float() / divisor
        if self.form.rotated:
            sign = self._keep(
                "signs_in", torch.float32, lambda: self._sign("signs_in", self.in_features)
            )
            inner = theta(inner.float() * sign, False, self.form.rotation)
        y = self._product(inner.to(x.dtype))
        if self.form.rotated:
            sign = self._keep(
                "signs_out", torch.float32, lambda: self._sign("signs_out", self.out_features)
            )
            y = (theta(y.float(), True, self.form.rotation) * sign).to(x.dtype)
        return y if bias is None else y + bias

    def _product(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """(Q + L R) x in the rotated basis."""
        form, y = self.form, None
        if form.q_bits:
            codes, tail = self.codes("q")
            flat = product(
                x.reshape(-1, self.in_features),
                codes,
                tail,
                self.q_scale,
                form.codebook,
                form.q_bits,
                self.out_features,
                self.tile_rows,
                self.mode == "kernel",
                form.q_group,
            )
            y = flat.reshape(*x.shape[:-1], self.out_features)
        if form.rank:
            left, right = self._low_rank(x.dtype)
            part = nn.functional.linear(nn.functional.linear(x, right), left)
            y = part if y is None else y + part
        return x.new_zeros(*x.shape[:-1], self.out_features) if y is None else y

    def _low_rank(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All components as L (m, r) and R (r, n)."""
        left = self._keep("left", dtype, lambda: self._side("l").T)
        return left, self._keep("right", dtype, lambda: self._side("r"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LPLRQuantizedLinear:
        self._kept.clear()  # built again on the new device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._kept.clear()
        super()._load_from_state_dict(*arguments, **options)

    # ------------------------------------------------------------ training

    def _trained(self) -> dict[str, nn.Parameter]:
        """Parameters other than the bias."""
        return {k: p for k, p in self._parameters.items() if p is not None and k != "bias"}

    def trainable(
        self, signs: bool = False, factors: bool = True, bias: bool = False
    ) -> LPLRQuantizedLinear:
        """Let signs, the ``ft_rank`` components and the bias train, each if wanted and there.

        Signs become float32 parameters, lora_L and lora_R float32: steps smaller than their 16-bit
        spacing add up. :meth:`merge_trained` stores them again.
        """
        self.set_mode("dequant")
        if signs and self.form.rotated:
            for name, count in (("signs_out", self.out_features), ("signs_in", self.in_features)):
                if name in self._buffers:
                    value = self._sign(name, count).float()
                    del self._buffers[name]
                    self.register_parameter(name, nn.Parameter(value))
        for name, parameter in self._trained().items():
            wanted = factors if name.startswith("lora_") else signs
            if wanted and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(wanted)
        if self.bias is not None:
            self.bias.requires_grad_(bias)
        return self

    def merge_trained(self) -> LPLRQuantizedLinear:
        """Store what was trained: lora_L, lora_R in bfloat16, signs in float16 (as bits while all
        are still +-1); nothing trains afterwards."""
        with torch.no_grad():
            for name, parameter in self._trained().items():
                if name.startswith("lora_"):
                    parameter.data = trained_value(parameter.data)
                parameter.grad = None
                parameter.requires_grad_(False)
            self._store_signs()
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._kept.clear()
        return self

    def _store_signs(self) -> None:
        names = ("signs_out", "signs_in")
        if names[0] not in self._parameters:
            return
        values = {name: getattr(self, name).detach() for name in names}
        plain = all(bool((v.abs() == 1).all()) for v in values.values())
        for name, value in values.items():
            del self._parameters[name]
            stored = pack_signs(value) if plain else value.half().view(torch.int16)
            self.register_buffer(name, stored)
        self.reform(signs="packed" if plain else "float")

    def reform(self, **changes: Any) -> None:
        """Note another form after tensors were put in or taken out."""
        self._kept.clear()
        fields = {name: getattr(self.form, name) for name in Form.__dataclass_fields__}
        self.form = Form(**{**fields, **changes})

    def lora_state(self) -> dict[str, Tensor]:
        """All components in the layer's own basis: lora_A = R (r, n), lora_B = L (m, r), float32.

        W^ = Q^ + lora_B lora_A with Q^ what remains without them.
        """
        if not self.form.rank:
            raise ConfigError("this layer has no factors (rank 0)")
        left, right = self._low_rank(torch.float32)
        left, right = left.detach(), right.detach()
        if self.form.rotated:
            signs_out, signs_in = self.signs()
            left = unrotate_rows(left.T, signs_out, self.form.rotation).T
            right = unrotate_rows(right, signs_in, self.form.rotation)
        divisor = self.input_divisor()
        if divisor is not None:
            right = right / divisor
        return {"lora_A": right.contiguous().detach(), "lora_B": left.contiguous().detach()}


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, LPLRQuantizedLinear]]:
    """All compressed layers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LPLRQuantizedLinear):
            yield name, module


def set_mode(model: nn.Module, mode: Mode) -> nn.Module:
    """:meth:`LPLRQuantizedLinear.set_mode` for every compressed layer."""
    for _, layer in quantised_layers(model):
        layer.set_mode(mode)
    return model


def merge_trained(model: nn.Module) -> nn.Module:
    """:meth:`LPLRQuantizedLinear.merge_trained` for every compressed layer."""
    for _, layer in quantised_layers(model):
        layer.merge_trained()
    return model
