"""Parameters of a compression, checked when they are made, and what is known of one sublayer.
[CALDERA, README of the published code]

The names and defaults are those of the published package, so that a command line or a notebook
written for it can be read; where its defaults compute nothing or the wrong thing, ours differ and
say so. Nothing here imports torch as long as the codebooks are the default ones.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.errors import ConfigError, require_least, unknown_name

if TYPE_CHECKING:
    from lplr_q.activation_aware.decompose import Decomposition

METHODS = ("lplr-ldlq", "lplr", "quip-sharp")
"""Q + L R, L R alone, and Q alone as the QuIP# baseline does it."""
INITS = ("lr_first", "q_first", "odlri", "srr", "auto")
Q_HESSIANS = ("plain", "downdate", "projq", "auto")
COMPONENTS = ("LR", "Q")
FACTOR_BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
TOKEN_FILE = "hf_access_token.txt"

DEVSETS = {
    "rp1t": "togethercomputer/RedPajama-Data-1T-Sample",
    "falcon": "tiiuae/falcon-refinedweb",
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1",
}
"""Calibration sets by their short names; any other source of `workbench.text` is taken as it is."""


def __getattr__(name: str) -> Any:
    """`Decomposition`, which needs torch, on demand."""
    if name == "Decomposition":
        from lplr_q.activation_aware.decompose import Decomposition

        return Decomposition
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _choice(kind: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise unknown_name(kind, given, known)


@dataclass(frozen=True)
class DataParameters:
    """Which text makes the Hessians."""

    devset: str | tuple[str, ...] = "rp1t"
    """rp1t, falcon, wikitext, file (with ``data_file``), or any source of ``workbench.text``."""
    data_file: str | None = None
    """Text, JSONL or folder when ``devset`` is ``file``."""
    devset_size: int = 256
    """Sequences; only those that fill the context are kept."""
    context_length: int = 4096
    """Tokens per sequence."""
    batch_size: int = 2
    """Sequences per forward pass; the last batch may be smaller."""
    split: str = "train"
    """Which split of the source."""
    seed: int = 0
    """Which stretch of a generated source."""

    def __post_init__(self) -> None:
        require_least(self, 1, "devset_size", "batch_size")
        require_least(self, 8, "context_length")
        if not self.devset:
            raise ConfigError(f"devset is empty; give {', '.join(DEVSETS)}, file, or a text source")
        if ("file" in self._names()) != (self.data_file is not None):
            raise ConfigError(
                f"devset={self.devset!r} with data_file={self.data_file!r}: devset 'file' and "
                "data_file go together"
            )

    def _names(self) -> tuple[str, ...]:
        return (self.devset,) if isinstance(self.devset, str) else tuple(self.devset)

    def sources(self) -> tuple[str, ...]:
        """Sources as `workbench.text.load_texts` takes them."""
        known = {**DEVSETS, "file": self.data_file or ""}
        return tuple(known.get(str(name), str(name)) for name in self._names())


@dataclass(frozen=True)
class ModelParameters:
    """Which model, and where it is held."""

    base_model: str = "meta-llama/Llama-2-7b-hf"
    """Built-in name, local folder or hub id."""
    token: str | None = field(default=None, repr=False)
    """Access token of the hub; by default HF_TOKEN or the file hf_access_token.txt. Never shown."""
    dtype: str | None = None
    """float32, bfloat16 or float16; None keeps the type of the files."""
    device: str = "cpu"
    """Where the model runs while the Hessians are collected."""
    include: str = ".*"
    """Regular expression: linear layers of the decoder blocks to compress."""
    exclude: str | None = None
    """Regular expression: those to leave alone."""

    def __post_init__(self) -> None:
        if not self.base_model.strip():
            raise ConfigError("base_model is empty; give a built-in name, a folder or a hub id")
        if self.dtype is not None:
            _choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))

    def access_token(self, folder: Path | str = ".") -> str | None:
        """The token given, that of the environment, or that of the file; None without any."""
        if self.token or os.environ.get("HF_TOKEN"):
            return self.token or os.environ["HF_TOKEN"]
        file = Path(folder) / TOKEN_FILE
        return file.read_text(encoding="utf-8").strip() or None if file.is_file() else None


@dataclass(frozen=True)
class QuipArgs:
    """Settings of the Q step."""

    sigma_reg: float = 1e-2
    """Multiple of the mean diagonal added to H."""
    sigma_reg2: float = 1e-2
    """The same for the downdated H of the Q step; fixed."""
    scale_override: float = -1.0
    """Scale of the unit-variance input in front of the codebook; -1: the codebook's best one."""
    resid_scale_override: float = -1.0
    """Scale of the second stage; only -1, the codebook's own: encoder and decoder must agree."""
    quip_tune_iters: int = 2
    """Guarded sweeps after LDLQ, none can raise the loss. (Published: 10 unguarded ones.)"""
    use_fp64: bool = False
    """Of the published code, without effect: H is factored in float64 in any case."""
    lowmem_ldlq: bool = False
    """Of the published code, without effect: corrections go through a small buffer in any case."""
    incoh_mode: Literal["had", "kron", "fft"] = "had"
    """Rotation: had is the Hadamard transform (where no matrix exists, fft), kron the product of
    two dense orthogonal matrices, fft the Hartley transform."""
    rescale_WH: bool = False
    """Balance input channels before the rotation."""
    lora_rank: int = 0
    """Of the published code; the rank belongs to `LPLRParams.rank`."""
    full_svd: bool = False
    """Exact SVD in every LR step."""

    def __post_init__(self) -> None:
        if not (self.sigma_reg > 0 and math.isfinite(self.sigma_reg)):
            raise ConfigError(f"sigma_reg={self.sigma_reg}; expected a small positive number")
        if self.sigma_reg2 != 1e-2:
            raise ConfigError(f"sigma_reg2={self.sigma_reg2}: only 0.01 is offered; leave it out")
        require_least(self, 0, "quip_tune_iters")
        _choice("incoh_mode", self.incoh_mode, ("had", "kron", "fft"))
        if self.scale_override != -1 and not 0 < self.scale_override < 10:
            raise ConfigError(f"scale_override={self.scale_override}; use -1, or about 0.8 to 1.1")
        if self.resid_scale_override != -1:
            raise ConfigError(
                f"resid_scale_override={self.resid_scale_override}: the second stage would be "
                "decoded with another scale than it was encoded with; use -1"
            )
        if self.lora_rank:
            raise ConfigError(f"lora_rank={self.lora_rank} in QuipArgs; set LPLRParams.rank")


@dataclass(frozen=True)
class LPLRParams:
    """How one matrix becomes Q + L R."""

    quip_args: QuipArgs = QuipArgs()
    """Settings of the Q step."""
    method: Literal["lplr-ldlq", "lplr", "quip-sharp"] = "lplr-ldlq"
    """Q + L R, L R alone, or Q alone as QuIP# does it."""
    compute_quantized_component: bool = True
    """False leaves Q out."""
    compute_low_rank_factors: bool = True
    """False leaves L R out."""
    Q_bits: int = 2
    """Bits per entry of Q."""
    L_bits: int = 2
    """Bits per entry of L; 16 keeps it in bfloat16."""
    R_bits: int = 2
    """Bits per entry of R; 16 keeps it in bfloat16."""
    rank: int = 64
    """Components of L R; clipped, with a warning, where a matrix is smaller."""
    ft_rank: int = 0
    """How many of them stay in bfloat16, to be tuned."""
    iters: int = 20
    """Outer rounds; they end early when three of them gain less than 0.1 %."""
    lplr_iters: int = 5
    """Least-squares steps for the rounded factors per round."""
    activation_aware_Q: bool = True
    """False rounds Q without looking at H."""
    activation_aware_LR: bool = True
    """False fits L R by a plain SVD."""
    lattice_quant_Q: bool = True
    """E8P lattice for Q; False: Lloyd-Max scalars."""
    lattice_quant_LR: bool = False
    """E8P lattice for L and R (the published default); False: Lloyd-Max with a scale per component,
    which is nearer at equal bits."""
    codebook: str | None = None
    """Codebook of Q by name, before `lattice_quant_Q`: e8p, lloyd-max, tcq, module:factory."""
    factor_codebook: str | None = None
    """Codebook of L and R by name, before `lattice_quant_LR`."""
    hadamard_transform: bool = False
    """Randomised Hadamard transform on both sides; every published run switches it on."""
    full_quip_sharp: bool = False
    """The same as method quip-sharp."""
    update_order: tuple[str, ...] = ("LR", "Q")
    """Components in the order in which a round updates them."""
    rand_svd: bool = True
    """Randomised SVD, checked against the exact loss; False: exact."""
    Q_hessian_downdate: bool = False
    """The same as q_hessian downdate."""
    q_hessian: Literal["plain", "downdate", "projq", "auto"] = "plain"
    """Which H the Q step sees; auto measures."""
    init: Literal["lr_first", "q_first", "odlri", "srr", "auto"] = "lr_first"
    """Where L R comes from at first; auto runs two kinds for a round."""
    scale_search: bool = False
    """Search the scale of Q on the true loss."""
    lattice_quant_block_size: int = 32000
    """Of the published code, without effect: the encoder cuts its input by itself."""
    q_group: int = 0
    """Scales of Q: 0 one for the matrix, -1 one per row, else one per row and so many columns."""
    target_bpw: float | None = None
    """Bits per weight to be filled by the rank, in place of `rank`."""

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        self._check_parts()
        self._check_codebooks()

    # ------------------------------------------------------------ checks

    def _check_names(self) -> None:
        _choice("method", self.method, METHODS)
        _choice("init", self.init, INITS)
        _choice("q_hessian", self.q_hessian, Q_HESSIANS)
        order = tuple(self.update_order)
        if not order:
            raise ConfigError("update_order is empty: nothing would be decomposed; use LR Q")
        if set(order) - set(COMPONENTS) or len(set(order)) < len(order):
            raise ConfigError(
                f"update_order={' '.join(map(str, order))}; give LR and Q, each at most once"
            )

    def _check_numbers(self) -> None:
        require_least(self, 0, "rank", "ft_rank", "lplr_iters")
        require_least(self, 1, "iters", "lattice_quant_block_size")
        for name in ("L_bits", "R_bits"):
            if getattr(self, name) not in FACTOR_BITS:
                choices = ", ".join(map(str, FACTOR_BITS))
                raise ConfigError(f"{name}={getattr(self, name)}; choose from {choices}")
        if self.ft_rank > self.rank and self.target_bpw is None:
            raise ConfigError(f"ft_rank={self.ft_rank} of only rank={self.rank} components")
        if self.target_bpw is not None and not 0 < self.target_bpw <= 16:
            raise ConfigError(f"target_bpw={self.target_bpw}; expected bits per weight up to 16")

    def _check_parts(self) -> None:
        """Something has to be left of the matrix, and no two settings may contradict."""
        if self.full_quip_sharp and self.method == "lplr":
            raise ConfigError("full_quip_sharp with method lplr: one leaves L R out, the other Q")
        if self.Q_hessian_downdate and self.q_hessian not in ("plain", "downdate"):
            raise ConfigError(f"Q_hessian_downdate with q_hessian={self.q_hessian}; give one")
        if self.q_group and self.effective_method == "quip-sharp":
            raise ConfigError(f"q_group={self.q_group}: quip-sharp has one scale per matrix")
        if not self.has_q and not self.has_low_rank:
            raise ConfigError(
                "neither Q nor L R is computed: nothing would be left of the matrix; check rank, "
                "compute_quantized_component and compute_low_rank_factors"
            )
        for component, wanted in (("Q", self.has_q), ("LR", self.has_low_rank)):
            if wanted and self.effective_method != "quip-sharp" and component not in self.order:
                raise ConfigError(
                    f"{component} is to be computed but update_order={' '.join(self.order)} never "
                    f"updates it; add {component}, or switch it off"
                )

    def _check_codebooks(self) -> None:
        defaults = type(self).__dataclass_fields__
        names = ("codebook", "lattice_quant_Q", "Q_bits")
        if self.has_q and any(getattr(self, n) != defaults[n].default for n in names):
            from lplr_q.codebooks.base import make_codebook

            make_codebook(self.q_codebook, self.Q_bits)
        if self.has_low_rank and self.lr_codebook != "lloyd-max":
            from lplr_q.activation_aware.factors import factor_book

            for bits in {self.L_bits, self.R_bits} - {16}:
                factor_book(self.lr_codebook, bits)

    # ------------------------------------------------------------ what follows from them

    @property
    def order(self) -> tuple[str, ...]:
        """`update_order` as a tuple."""
        return tuple(self.update_order)

    @property
    def effective_method(self) -> str:
        """`method`, or quip-sharp when `full_quip_sharp` asks for it."""
        return "quip-sharp" if self.full_quip_sharp else self.method

    @property
    def has_q(self) -> bool:
        """Whether there is a Q."""
        return self.effective_method != "lplr" and self.compute_quantized_component

    @property
    def has_low_rank(self) -> bool:
        """Whether there is an L R."""
        wanted = self.rank > 0 or self.target_bpw is not None
        return self.effective_method != "quip-sharp" and self.compute_low_rank_factors and wanted

    @property
    def rotated(self) -> bool:
        """Whether W is rotated; QuIP# always is."""
        return self.hadamard_transform or self.effective_method == "quip-sharp"

    @property
    def q_codebook(self) -> str:
        """Codebook of Q."""
        return self.codebook or ("e8p" if self.lattice_quant_Q else "lloyd-max")

    @property
    def factor_bits(self) -> int | tuple[int, int]:
        """Bits per entry of L and R: one number where they are equal."""
        return self.L_bits if self.L_bits == self.R_bits else (self.L_bits, self.R_bits)

    @property
    def lr_codebook(self) -> str:
        """Codebook of L and R."""
        return self.factor_codebook or ("e8p" if self.lattice_quant_LR else "lloyd-max")

    def rank_for(self, shape: tuple[int, int]) -> int:
        """The rank on a matrix of this shape: from `target_bpw`, or `rank` clipped to its sides.

        Raises:
            ConfigError: Q alone is beyond `target_bpw`, or fewer components than `ft_rank`.
        """
        m, n = shape
        if not self.has_low_rank:
            return 0
        rank = min(self.rank, m, n)
        if self.target_bpw is not None:
            from lplr_q.bits import rank_for_budget

            rank = rank_for_budget(
                m,
                n,
                self.target_bpw,
                codebook=self.q_codebook,
                q_bits=self.Q_bits if self.has_q else 0,
                factor_bits=self.factor_bits,
                rotated=self.rotated,
                factor_codebook=self.lr_codebook,
                rescaled=self.quip_args.rescale_WH,
                q_group=self.q_group,
            )
            if rank < 0:
                raise ConfigError(
                    f"target_bpw={self.target_bpw:g} does not hold a {m}x{n} matrix with "
                    f"Q_bits={self.Q_bits}; raise it or lower Q_bits"
                )
        elif rank < self.rank:
            warnings.warn(f"rank {self.rank} clipped to {rank} on a {m}x{n} matrix", stacklevel=2)
        if self.ft_rank > rank:
            raise ConfigError(
                f"ft_rank={self.ft_rank} of only rank={rank} components on a {m}x{n} matrix"
            )
        return rank

    def to_settings(self, shape: tuple[int, int] | None = None) -> dict[str, Any]:
        """Keyword arguments of `lplr_q.decompose` for a matrix of this shape."""
        quip = self.quip_args
        multiplier = 1.0
        if quip.scale_override > 0 and self.has_q:
            from lplr_q.codebooks.base import make_codebook

            multiplier = quip.scale_override / make_codebook(self.q_codebook, self.Q_bits).opt_scale
        rank = self.rank if shape is None else self.rank_for(shape)
        downdate = "downdate" if self.Q_hessian_downdate else self.q_hessian
        return {
            "codebook": self.q_codebook,
            "q_bits": self.Q_bits,
            "rank": rank if self.has_low_rank else 0,
            "factor_bits": self.factor_bits,
            "factor_codebook": self.lr_codebook,
            "rounds": self.iters,
            "inner_iterations": self.lplr_iters,
            "sweeps": quip.quip_tune_iters if self.activation_aware_Q else 0,
            "init": self.init,
            "q_hessian": downdate,
            "update_order": self.order,
            "feedback": self.activation_aware_Q,
            "activation_aware_lr": self.activation_aware_LR,
            "randomised_svd": "auto" if self.rand_svd and not quip.full_svd else False,
            "scale_search": self.scale_search,
            "scale_multiplier": multiplier,
            "compute_q": self.has_q,
            "compute_lr": self.has_low_rank,
            "rescale": quip.rescale_WH,
            "q_group": self.q_group,
        }


@dataclass(frozen=True)
class SubLayerInfo:
    """One linear layer: its names, its shape, and what was made of it."""

    layer_idx: int
    """Index of the decoder block."""
    sublayer: str
    """Name inside the block, e.g. self_attn.q_proj."""
    name: str
    """Full name inside the model."""
    key: str
    """Of the Hessian of its input, shared by all layers with the same input."""
    shape: tuple[int, int]
    """Outputs and inputs."""
    tokens: int = 0
    """Calibration tokens behind the Hessian."""
    decomposition: Decomposition | None = None
    """The result, once there is one."""

    @property
    def error(self) -> float:
        """Relative activation-aware error e of the result; NaN before there is one."""
        return math.nan if self.decomposition is None else self.decomposition.error
