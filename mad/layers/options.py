"""Options of the built-in layers: the one place where their defaults stand.

The command line sets them behind a layer's name: `--layers mh-attention,num_heads=4 swiglu`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AttentionOptions:
    """Softmax attention, full or in a sliding window."""

    num_heads: int = 1
    """Heads H; the width must be divisible by it."""
    num_heads_kv: int | None = None
    """Key and value heads, each read by an equal share of the heads; none means H."""
    rotary_dim: int | None = None
    """Leading dimensions of a head that are rotated; none means all of them (with `alibi` none of
    them), 0 no rotation."""
    rotary_interleaved: bool = False
    """Rotate pairs (2i, 2i + 1) instead of (i, i + rotary_dim/2)."""
    xpos: bool = False
    """Let each rotated pair decay with the distance at a rate of its own."""
    alibi: bool = False
    """Subtract from each score the distance times 2^(−8h/H) for head h = 1 … H."""
    softmax_scale: float | None = None
    """Factor of the scores; none means 1/√(head width)."""
    window: int | None = None
    """A position attends to itself and this many positions before it; none means all."""
    dwconv: bool = False
    """Causal depthwise filter of width 3 on queries, keys and values."""
    canon: Literal["none", "a", "b", "ab"] = "none"
    """Residual causal depthwise filter before the layer (a), after its projections (b), or both."""
    canon_taps: int = 4
    """Width of the canon filters."""
    bias: bool = True
    """Biases in the four projections."""
    backend: Literal["auto", "sdpa", "flash", "eager"] = "auto"
    """`eager` writes the softmax out, `sdpa` is torch's fused form of it, `flash` that of the
    package flash-attn; `auto` takes the best that is here."""


@dataclass(frozen=True)
class LinearAttentionOptions:
    """Attention with a kernel feature map instead of the softmax."""

    num_heads: int = 1
    """Heads H; the width must be divisible by it."""
    feature_map: Literal[
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
    ] = "elementwise_product"
    """Map φ applied to queries and keys per head."""
    normalize: Literal["rms", "sum"] = "rms"
    """`sum` divides by φ(q)·Σφ(k) as published, which may cross zero for signed maps; `rms`
    normalises the sum per head instead."""
    norm_q: bool = False
    """Divide φ(q) by the sum of its entries."""
    norm_k: bool = False
    """Divide φ(k) by the sum of its entries."""
    tie: bool = False
    """One feature map for queries and keys instead of one each."""
    key_width: int | None = None
    """Width of a head's queries and keys before φ; none means the head width."""
    form: Literal["auto", "parallel", "chunked"] = "auto"
    """One masked product, or chunks; `auto` counts multiplications. Both are exact."""
    chunk: int = 64
    """Positions of a chunk."""
    kernel: Literal["auto", "reference", "fused"] = "auto"
    """`fused` is the kernel of flash-linear-attention, if it is installed; `auto` takes it on a GPU
    where the layer computes in half precision."""


@dataclass(frozen=True)
class MLPOptions:
    """Two-layer perceptron."""

    hidden: int | None = None
    """Hidden width; none means four times the width."""
    bias: bool = False
    """Biases in both projections."""


@dataclass(frozen=True)
class SwiGLUOptions:
    """Gated perceptron."""

    hidden: int | None = None
    """Hidden width; none means 8/3 of the width, rounded up to `multiple_of`."""
    multiple_of: int = 16
    """The default hidden width is a multiple of this."""
    bias: bool = False
    """Biases in the three projections."""


@dataclass(frozen=True)
class LongFilterOptions:
    """What the layers with long filters share."""

    short_filter: int = 3
    """Length of the depthwise causal filter after the input projection."""
    filter: Literal["implicit", "rtf"] = "implicit"
    """`implicit`: taps from a small network of time; `rtf`: those of a rational transfer function,
    which has a short exact state."""
    filter_order: int = 4
    """Hidden width of the network that makes the filter, or the order of the rational function."""
    rtf_init: Literal["zero", "xavier", "montel"] = "zero"
    """Coefficients of a rational filter at first: none, U(±√(6/(N + 1))/N) or U(±1/N)."""


@dataclass(frozen=True)
class TiledFilterOptions(LongFilterOptions):
    """And those whose input projection is tiled."""

    proj_groups: int = 4
    """The input projection yields a 1/groups share of the channels and is tiled."""
    rtf_denominators: int | None = None
    """Denominators that equal groups of channels share; none means one for each channel."""


@dataclass(frozen=True)
class HyenaOptions(TiledFilterOptions):
    """Gated long convolution with an implicit filter, one filter per channel."""

    inner_factor: int = 4
    """Inner channels per unit of width."""
    filter_order: int = 4
    kernel: Literal["auto", "toeplitz", "fft"] = "auto"
    """How the long convolution is computed; both are exact."""


@dataclass(frozen=True)
class MultiHeadHyenaOptions(TiledFilterOptions):
    """Hyena over outer products, one filter per group of channels."""

    num_heads: int = 16
    """H: group size in layout `code`, number of groups in layout `paper`."""
    layout: Literal["code", "paper"] = "code"
    """`code`: d/H groups of H channels, as published code has it; `paper`: H groups of d/H."""
    filter_order: int = 2
    kernel: Literal["auto", "toeplitz", "fft"] = "auto"
    """`toeplitz` is masked linear attention with a learned decay; `fft` convolves products."""


@dataclass(frozen=True)
class BasedOptions:
    """Taylor linear attention beside a sliding window."""

    num_heads: int = 4
    """Heads H of both; the width must be divisible by it."""
    feature_width: int = 16
    """Width of a head's queries and keys before the Taylor map."""
    window: int = 64
    """A position attends softly to itself and this many positions before it."""
    backend: Literal["auto", "sdpa", "flash", "eager"] = "auto"
    """How the window's softmax is computed."""
    kernel: Literal["auto", "reference", "fused"] = "auto"
    """`fused` is the kernel of flash-linear-attention, if it is installed; `auto` takes it on a GPU
    where the layer computes in half precision."""


@dataclass(frozen=True)
class MambaOptions:
    """Selective state space with a diagonal state per channel."""

    d_state: int = 4
    """State N per inner channel."""
    d_conv: int = 4
    """Taps of the causal filter before the recurrence."""
    expand: int = 2
    """Inner channels per unit of width."""
    dt_rank: int | None = None
    """Rank of the map that makes the step sizes; none means width / 16, rounded up."""
    dt_min: float = 1e-3
    """Smallest step size at the start."""
    dt_max: float = 0.1
    """Largest step size at the start."""
    dt_scale: float = 1.0
    """Scale of the step-size map's weights at the start."""
    dt_init_floor: float = 1e-4
    """No step size starts below this."""
    kernel: Literal["auto", "reference", "fused"] = "auto"
    """`fused` is the kernel of mamba-ssm, `auto` takes it on a GPU where it is installed."""


@dataclass(frozen=True)
class DeltaNetOptions:
    """The delta rule, with or without a decay of the memory."""

    num_heads: int = 8
    """Heads H; the width must be divisible by it."""
    short_conv: int = 4
    """Length of the depthwise causal filter on queries, keys and values; 1 is none over time."""
    negative_eigenvalues: bool = False
    """Writes up to twice the difference (β in (0, 2)): a step may then flip what a key holds."""
    chunk: int = 32
    """Tokens whose writes one triangular system yields; any length gives the same numbers."""
    kernel: Literal["auto", "reference", "fused"] = "auto"
    """`fused` is the kernel of flash-linear-attention, if it is installed; `auto` takes it on a GPU
    where the layer computes in half precision."""


@dataclass(frozen=True)
class HyenaExpertsOptions(LongFilterOptions):
    """Hyena whose channels are experts; a router picks which of them reach the output."""

    expert_width: int = 16
    """Channels of an expert."""
    num_experts: int = 8
    """Experts E."""
    active: int = 2
    """Experts that a token uses."""
    filter_order: int = 16
    legacy: bool = False
    """Route as the published code does: experts that were not picked keep a weight."""
    kernel: Literal["auto", "toeplitz", "fft"] = "auto"
    """How the long convolution is computed; both are exact."""


@dataclass(frozen=True)
class MoEMLPOptions:
    """Sparse mixture of small gated perceptrons."""

    hidden: int = 16
    """Hidden width of an expert."""
    num_experts: int = 8
    """Experts E."""
    active: int = 2
    """Experts that a token uses."""
    bias: bool = False
    """Biases in the experts."""
    legacy: bool = False
    """The published layer: one dense output map, and experts that were not picked keep a weight."""
    kernel: Literal["auto", "dense", "dispatch"] = "auto"
    """Compute all experts and weigh them, or sort tokens by expert; both are exact."""


@dataclass(frozen=True)
class GatedLinearAttentionOptions:
    """Linear attention whose key channels forget at rates of their own."""

    num_heads: int = 1
    """Heads H; the width must be divisible by it."""
    gate_rank: int = 16
    """Rank of the map that makes the rates."""
    gate_divisor: float = 16.0
    """The log of the gate is divided by this, so that little is forgotten at first."""
    clamp_min: float | None = None
    """Lower bound of the log of a gate; none means none."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norm of each head."""
    form: Literal["factored", "halved"] = "factored"
    """How a chunk is computed: split at its middle, or exactly for any decay."""
    kernel: Literal["auto", "reference", "fused"] = "auto"
    """`fused` is the kernel of flash-linear-attention, if it is installed; `auto` takes it on a GPU
    where the layer computes in half precision."""


@dataclass(frozen=True)
class Mamba2Options:
    """State space with one decay per head."""

    d_state: int = 8
    """State N per inner channel."""
    d_conv: int = 4
    """Taps of the causal filter before the recurrence."""
    expand: int = 2
    """Inner channels per unit of width."""
    head_dim: int = 32
    """Inner channels P of a head."""
    groups: int = 1
    """Groups of heads that share their input and output maps."""
    chunk: int = 32
    """Steps that are computed together."""
    dt_min: float = 1e-3
    """Smallest step size at the start."""
    dt_max: float = 0.1
    """Largest step size at the start."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norm before the output map."""
    kernel: Literal["auto", "reference", "fused"] = "auto"
    """`fused` is the kernel of mamba-ssm, `auto` takes it on a GPU where it is installed."""


@dataclass(frozen=True)
class RetNetOptions:
    """Linear attention with fixed decays and rotated queries and keys."""

    num_heads: int = 8
    """Heads H; the width of a head must be even."""
    xpos: bool = True
    """Channels that turn fast forget faster, on top of the decay of their head."""
    norm_eps: float = 1e-5
    """Added to the variance in the norm of each head."""
    kernel: Literal["auto", "reference", "fused"] = "auto"
    """`fused` is the kernel of flash-linear-attention, if it is installed; `auto` takes it on a GPU
    where the layer computes in half precision."""


@dataclass(frozen=True)
class RWKV7Options:
    """The generalised delta rule."""

    head_dim: int = 16
    """Width of a head; the layer's width must be divisible by it."""
    decay_rank: int = 32
    """Rank of the map from a token to its decays."""
    rate_rank: int = 32
    """Rank of the map from a token to its removal rates."""
    gate_rank: int = 64
    """Rank of the output gate."""
    chunk: int = 32
    """Tokens whose removals one triangular system yields; any length gives the same numbers."""
    kernel: Literal["auto", "reference", "fused"] = "auto"
    """`fused` is the kernel of flash-linear-attention, if it is installed; `auto` takes it on a GPU
    where the layer computes in half precision."""


@dataclass(frozen=True)
class RWKV5TimeMixerOptions:
    """RWKV 5: token shift, fixed decays per channel, a bonus for the present token."""

    head_dim: int = 16
    """Width of a head."""
    divisor: float = 8.0
    """What is read from the state is divided by this before its norm."""
    form: Literal["factored", "halved"] = "factored"
    """How a chunk is computed: split at its middle, or exactly for any decay."""
    kernel: Literal["auto", "reference", "fused"] = "auto"
    """`fused` is the kernel of flash-linear-attention, if it is installed; `auto` takes it on a GPU
    where the layer computes in half precision."""


@dataclass(frozen=True)
class RWKV6TimeMixerOptions:
    """RWKV 6: token shift and decays that follow the input."""

    head_dim: int = 16
    """Width of a head."""
    mix_rank: int = 32
    """Rank of the maps that correct the token shift."""
    decay_rank: int = 64
    """Rank of the map that makes the decays."""
    form: Literal["factored", "halved"] = "halved"
    """How a chunk is computed: split at its middle, or exactly for any decay."""
    kernel: Literal["auto", "reference", "fused"] = "auto"
    """`fused` is the kernel of flash-linear-attention, if it is installed; `auto` takes it on a GPU
    where the layer computes in half precision."""


@dataclass(frozen=True)
class RWKVChannelMixerOptions:
    """Gated perceptron with squared relu over a token and the one before it."""

    hidden: int | None = None
    """Hidden width; none means four times the width."""


@dataclass(frozen=True)
class MLSTMOptions:
    """Matrix memory with exponential input gates."""

    num_heads: int = 8
    """Heads H; the width must be divisible by it."""
    chunk: int = 32
    """Steps that are computed together."""
    norm_eps: float = 1e-5
    """Added to the variance in the norm of each head."""
