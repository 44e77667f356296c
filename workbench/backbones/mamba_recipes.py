"""Recipes of the two state-space models; same texts, tokenizer and loop as micro-mistral."""

from __future__ import annotations

from workbench.backbones.recipes import Recipe, Stage

MIXTURE = {"doc": 0.40, "world": 0.35, "sum": 0.10, "text": 0.15}

MICRO_MAMBA2 = Recipe(
    name="micro-mamba2",
    architecture="Mamba2ForCausalLM",
    config="workbench.backbones.mamba_init:micro_mamba2_config",
    initialise="workbench.backbones.mamba_init:initialise_mamba2",
    context="workbench.mamba:fast_mamba",
    tokens=800_000,
    mixture=MIXTURE,
    curriculum=(
        Stage(0.0, 256, (3, 8), (6, 12)),
        Stage(0.3, 256, (4, 12), (6, 12)),
        Stage(0.6, 512, (8, 24), (8, 16)),
        Stage(0.8, 512, (8, 40), (8, 14)),
    ),
    recall_gate=(400_000, 0.3),
)

MICRO_MAMBA = Recipe(
    name="micro-mamba",
    architecture="MambaForCausalLM",
    config="workbench.backbones.mamba_init:micro_mamba_config",
    initialise="workbench.backbones.mamba_init:initialise_mamba",
    context="workbench.mamba:fast_mamba",
    tokens=800_000,
    mixture={"doc": 0.30, "world": 0.50, "sum": 0.08, "text": 0.12},
    curriculum=(
        Stage(0.0, 256, (3, 8), (6, 12)),
        Stage(0.5, 256, (4, 12), (6, 12)),
        Stage(0.8, 512, (8, 24), (8, 16)),
    ),
)
