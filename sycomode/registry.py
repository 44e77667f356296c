"""Objectives and students by name; nothing heavy is imported here, so settings are checked at once.

Extend: `OBJECTIVES["mine"] = Objective("conversations", "my.module:loss", "…")`, or on the command
line `--objective my.module:loss`, with `loss(logits, lesson, mask, temperature) -> scalar tensor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Objective:
    """What a named objective reads and which loss it takes there."""

    reads: Literal["prompt", "position", "conversations"]
    """The prompt's own text; the one position after it; conversations from self-study."""
    loss: str
    """`module:function`."""
    sentence: str
    """What to expect of it."""
    whole: bool = False
    """It needs the teacher's whole distributions, not the k best."""


OBJECTIVES: dict[str, Objective] = {
    "causal_language_model": Objective(
        "prompt", "sycomode.train:next_token", "learns to recite the prompt: a baseline"
    ),
    "last_position_kl": Objective(
        "position", "sycomode.train:last_position", "learns to continue the prompt: a baseline"
    ),
    "hidden_last": Objective(
        "position", "sycomode.train:last_layer", "last layer at one position: a baseline"
    ),
    "hidden_all": Objective(
        "position", "sycomode.train:all_layers", "all layers at one position: a baseline"
    ),
    "kl_selfstudy": Objective(
        "conversations", "sycomode.train:teacher_kl", "teacher's distribution at every position"
    ),
    "sft_selfstudy": Objective(
        "conversations", "sycomode.train:next_token", "the teacher's sampled tokens only"
    ),
    "reverse_kl_selfstudy": Objective(
        "conversations", "sycomode.train:reverse", "mode-seeking KL", whole=True
    ),
    "jsd_selfstudy": Objective(
        "conversations", "sycomode.train:jensen_shannon", "between the two KLs", whole=True
    ),
}

ALIASES: dict[str, str] = {
    "distill_on_output_logits": "last_position_kl",
    "distill_on_hidden_layer": "hidden_last",
    "distill_on_all_hidden_layers": "hidden_all",
    "distill_on_generated_text": "kl_selfstudy",
}
"""Names of the original command line."""

CLASSIC_OBJECTIVES = ("causal_language_model", *ALIASES)
"""The five objectives of the original."""

STUDENTS: dict[str, str] = {
    "full": "all weights",
    "lora": "rank-r updates of all linear layers",
    "memory": "m input embeddings after BOS",
    "kv": "m key/value vectors per layer",
}
"""Kinds of students and what they train."""


def objective_named(name: str, top_k: int = 0) -> Objective:
    """The objective of a name, an alias or `module:function`.

    Raises:
        ConfigError: unknown (with the nearest three), or it needs more than the k best.
    """
    if ":" in name:
        return Objective("conversations", name, "given on the command line")
    canonical = ALIASES.get(name, name)
    if canonical not in OBJECTIVES:
        raise unknown_name("objective", name, [*OBJECTIVES, *ALIASES])
    found = OBJECTIVES[canonical]
    if found.whole and top_k:
        raise ConfigError(f"{name} needs whole distributions; set --top-k 0 (now {top_k})")
    return found


def check_students(names: Sequence[str]) -> None:
    """Refuse unknown or repeated students."""
    if not names:
        raise ConfigError("no students given; choose some of " + ", ".join(STUDENTS))
    for name in names:
        if name not in STUDENTS:
            raise unknown_name("student", name, STUDENTS)
    if len(set(names)) < len(names):
        raise ConfigError(f"students {', '.join(names)}: one occurs twice")
