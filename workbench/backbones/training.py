"""Training a built-in model from its recipe: the same loop for every architecture."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.backbones.batches import Encoder, make_batch
from workbench.backbones.evaluation import document_recall
from workbench.backbones.muon import Muon
from workbench.backbones.recipes import Recipe, load_object
from workbench.errors import DivergedError
from workbench.microworld import World
from workbench.microworld.prng import hash64
from workbench.optim import wsd_schedule
from workbench.tokenizer import VOCABULARY_SIZE, microworld_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.run import Run

PROBE_DOCUMENTS = 24


def build_model(recipe: Recipe, seed: int | None = None) -> PreTrainedModel:
    """The model of a recipe before its first step, in float32; global seeds stay as they were."""
    import transformers

    seed = recipe.seed if seed is None else seed
    config = load_object(recipe.config)(VOCABULARY_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash64(f"start {recipe.name} {seed}") >> 1)
        model = getattr(transformers, recipe.architecture)(config)
    if recipe.initialise is not None:
        load_object(recipe.initialise)(model, seed)
    return model.float()


def build_optimisers(recipe: Recipe, model: torch.nn.Module) -> dict[str, Any]:
    """Muon for the matrices inside the blocks, AdamW for the rest, and their schedules."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        excluded = any(part in name for part in recipe.not_muon)
        (matrices if parameter.ndim == 2 and not excluded else others).append(parameter)
    muon = Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay)
    adamw = torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedules = [_schedule(recipe, optimiser) for optimiser in (muon, adamw)]
    return {
        "muon": muon,
        "adamw": adamw,
        "muon_schedule": schedules[0],
        "adamw_schedule": schedules[1],
    }


def _schedule(recipe: Recipe, optimiser: torch.optim.Optimizer) -> Any:
    """Warm-up, constant, then one line down; or the recipe's own knots joined by lines."""
    warmup = min(recipe.warmup_steps, recipe.steps // 4)
    if not recipe.rate_knots:
        return wsd_schedule(
            optimiser,
            recipe.steps,
            warmup_steps=warmup,
            decay_fraction=recipe.decay_fraction,
            floor=recipe.final_rate,
        )
    tokens, shares = zip(*recipe.rate_knots, strict=True)

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return rising * float(np.interp(step * recipe.tokens_per_step, tokens, shares))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def weighted_loss(
    logits: Float[Tensor, "rows time vocab"],
    ids: Int[Tensor, "rows time"],
    weights: Float[Tensor, "rows time"],
) -> Float[Tensor, ""]:
    """Weighted mean of the nats of each token given those before it, Σ w·nll / Σ w."""
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    targets = weights[:, 1:].flatten()
    return (nats * targets).sum() / targets.sum()


def context_of(recipe: Recipe) -> AbstractContextManager[object]:
    """The context that a recipe wants held while its model computes (a faster kernel, say)."""
    return load_object(recipe.context)() if recipe.context else nullcontext()


def train_backbone(
    recipe: Recipe,
    run: Run,
    *,
    save_every: int = 100,
    probe_every: int = 100,
    publish_every: int = 0,
) -> PreTrainedModel:
    """The trained model of a recipe, resumable through `run`.

    Every `probe_every` steps the recall from documents of 8 and 24 facts is logged; every
    `publish_every` steps the weights are written in half precision into the run's folder.

    Raises:
        DivergedError: a loss that is not finite, or the recipe's recall gate is missed.
    """
    device = run.device.device
    model = build_model(recipe).to(device)
    optimisers = build_optimisers(recipe, model)
    world, encode = World(), Encoder(microworld_tokenizer())
    context = context_of(recipe)
    precision = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    gate_step = (
        math.ceil(recipe.recall_gate[0] / recipe.tokens_per_step) if recipe.recall_gate else 0
    )
    with context:
        for step in run.steps(
            recipe.steps, {"model": model, **optimisers}, save_every=save_every, label=recipe.name
        ):
            began = time.process_time()
            model.train()
            batch = make_batch(recipe, world, encode, step)
            ids = torch.from_numpy(batch.ids).to(device)
            weights = torch.from_numpy(batch.weights).to(device)
            with precision:
                logits = model(input_ids=ids, use_cache=False).logits
            loss = weighted_loss(logits.float(), ids, weights)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            run.require_finite(step, {"ids": ids}, loss=loss, gradient_norm=norm)
            for name in ("muon", "adamw"):
                optimisers[name].step()
                optimisers[name].zero_grad(set_to_none=True)
            for name in ("muon_schedule", "adamw_schedule"):
                optimisers[name].step()
            if run.every(step, 10):
                spent = time.process_time() - began
                run.log(step, {"train/loss_nats": loss.detach(), "train/step_cpu_seconds": spent})
            probing = run.every(step, probe_every) or step == gate_step
            if probing:
                _probe(recipe, run, model, encode, step, gate_step)
            if run.every(step, publish_every) or step == recipe.steps:
                save_backbone(model, run.directory / "weights")
    return model.eval()


def _probe(
    recipe: Recipe, run: Run, model: Any, encode: Encoder, step: int, gate_step: int
) -> None:
    """Log the recall from documents; stop a training that shows none by its gate."""
    recall = {
        f"probe/recall_{n}": document_recall(model, encode, n, PROBE_DOCUMENTS) for n in (8, 24)
    }
    run.log(step, recall)
    run.note(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in recall.items()))
    if (
        recipe.recall_gate
        and step == gate_step
        and recall["probe/recall_8"] < recipe.recall_gate[1]
    ):
        raise DivergedError(
            f"{recipe.name}: recall from documents of 8 facts is {recall['probe/recall_8']:.2f} "
            f"after {step} steps; at least {recipe.recall_gate[1]} was expected by now. Try "
            "another --seed"
        )


def save_backbone(model: PreTrainedModel, folder: Path) -> None:
    """Write a model in half precision and its tokenizer in Hugging Face layout."""
    import copy

    half = copy.deepcopy(model).to("cpu", torch.float16).eval()
    half.save_pretrained(str(folder))
    microworld_tokenizer().save_pretrained(str(folder))
