"""Names of what is compressed, on what and how; every member is also its string."""

from __future__ import annotations

from enum import StrEnum


class SubLayer(StrEnum):
    """A linear map of a decoder block, whatever the model family calls it.

    ``suffixes`` are the ends of its module name: Llama, Mistral, Qwen first (the member's value),
    then Phi, GPT-2 and Mamba. A fused matrix is the sublayer of each of its parts.

    >>> SubLayer.O.suffixes
    ('o_proj', 'dense', 'attn.c_proj')
    """

    suffixes: tuple[str, ...]

    QUERY = "q_proj", "qkv_proj", "c_attn"
    KEY = "k_proj", "qkv_proj", "c_attn"
    VALUE = "v_proj", "qkv_proj", "c_attn"
    O = "o_proj", "dense", "attn.c_proj"  # noqa: E741 - the name it has in the papers
    UP = "up_proj", "gate_up_proj", "fc1", "c_fc", "in_proj"
    GATE = "gate_proj", "gate_up_proj", "in_proj"
    DOWN = "down_proj", "fc2", "mlp.c_proj", "out_proj"

    def __new__(cls, value: str, *others: str) -> SubLayer:
        """A member with its other names."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.suffixes = (value, *others)
        return member

    @classmethod
    def of(cls, name: str) -> tuple[SubLayer, ...]:
        """The sublayers that a module name stands for: several when it is fused, none when unknown.

        >>> SubLayer.of("model.layers.3.self_attn.k_proj")
        (<SubLayer.KEY: 'k_proj'>,)
        """
        return tuple(
            member
            for member in cls
            if any(name == end or name.endswith(f".{end}") for end in member.suffixes)
        )


class CalibSet(StrEnum):
    """Where calibration text comes from."""

    RP1T = "rp1t"
    FALCON = "falcon"
    WIKITEXT = "wikitext"
    FILE = "file"


class Sketch(StrEnum):
    """Random matrices of the data-agnostic variants."""

    GAUSSIAN = "gaussian"
    SPARSE = "sparse"
    SRHT = "srht"


class InitKind(StrEnum):
    """Where the alternation starts."""

    LR_FIRST = "lr_first"
    Q_FIRST = "q_first"
    ODLRI = "odlri"
    SRR = "srr"
    AUTO = "auto"
