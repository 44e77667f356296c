"""Recipes: everything that decides the weights of a built-in model, as data.

A recipe is architecture-agnostic: the class and its configuration, an initialisation, the optimiser
settings, the token budget, the mixture of texts and the curriculum of documents.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any

from workbench.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum, from a fraction of the budget on."""

    start: float
    """Fraction of the token budget at which the stage begins."""
    length: int
    """Tokens per row."""
    n_facts: tuple[int, int]
    """Range of the number of facts of a document."""
    n_turns: tuple[int, int]
    """Range of the number of questions."""


FULL_CURRICULUM = (
    Stage(0.0, 256, (3, 8), (6, 12)),
    Stage(0.15, 256, (6, 14), (6, 12)),
    Stage(0.35, 512, (8, 24), (8, 16)),
    Stage(0.65, 512, (8, 40), (8, 14)),
)
# short rows cost less per token; facts teach nothing by themselves: few of them, many questions
QUICK_CURRICULUM = (Stage(0.0, 128, (3, 6), (6, 10)), Stage(0.6, 256, (5, 10), (8, 16)))
MIXTURE = {"doc": 0.44, "world": 0.24, "sum": 0.12, "text": 0.20}
QUICK_MIXTURE = {"doc": 0.85, "world": 0.05, "sum": 0.05, "text": 0.05}
# answers are few among many function words, and a document's own values cannot be predicted
CLASS_WEIGHTS = {"answer": 4.0, "answer:claim": 8.0, "open": 0.3}
# answers in upper case are rare and come last; claims and adjectives are out of reach so early
QUICK_CLASS_WEIGHTS = {
    "answer": 4.0,
    "answer:upper": 12.0,
    "answer:claim": 1.0,
    "answer:adjective": 0.5,
    "open": 0.3,
}
QUICK_MUON_SHARE = 0.75  # of the recipe's rate: a short training must not lose the written start


@dataclass(frozen=True)
class Recipe:
    """How one built-in model is made."""

    name: str
    """Name of the model and of its folder."""
    architecture: str
    """A class of transformers, such as MistralForCausalLM."""
    config: str
    """module:function (vocabulary_size) → configuration."""
    initialise: str | None = None
    """module:function (model, seed) → None, applied to the freshly built model."""
    context: str | None = None
    """module:function () → context manager held while training (a faster kernel, say)."""
    seed: int = 0
    """Seed of initialisation and data order; the world itself is always seed 0."""
    tokens: int = 3_600_000
    """Token budget, padding included."""
    tokens_per_step: int = 2048
    """Tokens per optimiser step."""
    muon_lr: float = 0.008
    """Rate of Muon, for the matrices inside the blocks."""
    adamw_lr: float = 3e-3
    """Rate of AdamW, for embeddings, norms and all that is no matrix."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    warmup_steps: int = 40
    """Steps of linear warm-up."""
    decay_fraction: float = 0.5
    """Share of the steps, at the end, in which the rate falls on a line."""
    final_rate: float = 0.05
    """Last rate as a share of the first."""
    rate_knots: tuple[tuple[int, float], ...] = ()
    """(tokens, share of the rate) to be joined by lines, instead of the two fields above."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    not_muon: tuple[str, ...] = ("embed", "lm_head", "A_log", "conv1d")
    """Parameters whose name contains one of these go to AdamW even if they are matrices."""
    mixture: dict[str, float] = field(default_factory=lambda: dict(MIXTURE))
    """Share of tokens per kind of text."""
    curriculum: tuple[Stage, ...] = FULL_CURRICULUM
    """Stages in order; the first begins at 0."""
    class_weights: dict[str, float] = field(default_factory=lambda: dict(CLASS_WEIGHTS))
    """Loss weight by class or by the part of the class before the colon; others weigh 1."""
    recall_gate: tuple[int, float] | None = None
    """(tokens, recall): stop if documents of 8 facts are answered worse than this by then."""

    def __post_init__(self) -> None:
        if abs(sum(self.mixture.values()) - 1) > 1e-6:
            raise ConfigError(f"the mixture adds up to {sum(self.mixture.values())}, not to 1")
        if not self.curriculum or self.curriculum[0].start != 0:
            raise ConfigError("the first stage of a curriculum must start at 0")
        for stage in self.curriculum:
            if self.tokens_per_step % stage.length:
                raise ConfigError(
                    f"tokens_per_step {self.tokens_per_step} is no multiple of a row of "
                    f"{stage.length} tokens"
                )

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return max(1, self.tokens // self.tokens_per_step)

    def stage(self, step: int) -> Stage:
        """The stage of step 1 … steps."""
        done = (step - 1) / self.steps
        return [stage for stage in self.curriculum if stage.start <= done][-1]

    def weight(self, word_class: str) -> float:
        """Loss weight of a class such as "answer:claim", "open" or "word"."""
        weights = self.class_weights
        return weights.get(word_class, weights.get(word_class.partition(":")[0], 1.0))

    def digest(self) -> str:
        """A hash of all settings, written into the manifest."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


MICRO_MISTRAL = Recipe(
    name="micro-mistral",
    architecture="MistralForCausalLM",
    config="workbench.backbones.mistral_init:micro_mistral_config",
    initialise="workbench.backbones.mistral_init:initialise_mistral",
    tokens=1080 * 2048,
    rate_knots=((679 * 2048, 1.0), (803 * 2048, 0.815649), (1079 * 2048, 0.05)),
    curriculum=(
        Stage(0.0, 256, (3, 8), (6, 12)),
        Stage(0.244, 256, (6, 14), (6, 12)),
        Stage(0.732, 512, (8, 24), (8, 16)),
        Stage(0.85, 512, (8, 40), (8, 14)),
    ),
    recall_gate=(700_000, 0.3),
)

TINY = Recipe(
    name="tiny",
    architecture="MistralForCausalLM",
    config="workbench.backbones.mistral_init:tiny_mistral_config",
    initialise="workbench.backbones.mistral_init:initialise_mistral",
    tokens=6_144,
    tokens_per_step=512,
    warmup_steps=2,
    curriculum=(Stage(0.0, 128, (2, 3), (2, 3)), Stage(0.5, 256, (3, 6), (2, 6))),
)
"""Seconds on one thread, for tests of the machinery; it learns next to nothing."""

RECIPES: dict[str, Recipe | str] = {
    "micro-mistral": MICRO_MISTRAL,
    "tiny": TINY,
    "micro-mamba": "workbench.backbones.mamba_recipes:MICRO_MAMBA",
    "micro-mamba2": "workbench.backbones.mamba_recipes:MICRO_MAMBA2",
}
"""Name → recipe, or "module:NAME" of one."""


def load_object(reference: str) -> Any:
    """The object named by "module:name".

    Raises:
        ConfigError: no colon, no such module, or no such name in it.
    """
    module_name, _, name = reference.partition(":")
    try:
        return getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{reference!r} cannot be loaded ({error}); expected module:name"
        ) from None


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or of a reference "module:NAME" of one's own.

    Raises:
        ConfigError: unknown name.
    """
    found = RECIPES.get(name, name)
    if isinstance(found, str):
        if ":" not in found:
            raise unknown_name("recipe", name, list(RECIPES))
        found = load_object(found)
    if not isinstance(found, Recipe):
        raise ConfigError(f"{name!r} is a {type(found).__name__}, not a Recipe")
    return found


def quick(recipe: Recipe, tokens: int = 145 * 1024) -> Recipe:
    """A recipe of the same model for tests: a fifteenth of the budget, in more and smaller steps.

    Documents take most of it, because reading them is what a test asks for; the world's facts,
    claims and sums are not learnt.
    """
    return replace(
        recipe,
        tokens=tokens,
        tokens_per_step=1024,
        muon_lr=QUICK_MUON_SHARE * recipe.muon_lr,
        warmup_steps=10,
        rate_knots=(),
        mixture=dict(QUICK_MIXTURE),
        curriculum=QUICK_CURRICULUM,
        class_weights=dict(QUICK_CLASS_WEIGHTS),
        recall_gate=None,
    )
