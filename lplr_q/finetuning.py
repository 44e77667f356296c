"""What the fine-tuning scripts share: settings, the compressed student, texts, saving, the table of
before and after.

All of them run alone, under ``torchrun --nproc-per-node N -m lplr_q.finetune_...`` and under
``accelerate launch --config_file configs/lplr_q/accelerate.ddp.yaml -m lplr_q.finetune_...`` (or
``.fsdp``, ``.zero2``: :mod:`lplr_q.sharding`); results do not depend on N beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.cli import RunField, RunOptions
from workbench.errors import ConfigError, require_least
from workbench.run import Run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lplr_q.evaluate import TextBlocks
    from lplr_q.tuning_loop import Job, Progress

Judge = Callable[[str, Any, float], None]
"""What is done with (stage, model, bits per weight): original, compressed, tuned."""
BUILT_IN = ("microworld", "stdlib")


@dataclass(frozen=True)
class Tuning:
    """Settings of every fine-tuning script."""

    base_model: str | None = None
    """The original: built-in name, folder or hub id. Without model_save_path: micro-mistral."""
    model_save_path: str | None = None
    """Folder of the compressed model; without it the original is compressed here first."""
    bits: float = 2.5
    """Without model_save_path: bits per weight, overheads included."""
    codebook: str = "e8p"
    """Without model_save_path: codebook of Q."""
    factor_bits: int | tuple[int, int] = 4
    """Without model_save_path: bits per entry of L and R."""
    include: str = ".*"
    """Without model_save_path: regular expression of the layers to compress."""
    calibration: tuple[str, ...] = ("microworld:doc", "stdlib")
    """Without model_save_path: texts whose activations make the Hessians."""
    calibration_tokens: int = 8192
    """Tokens of each calibration text."""
    ft_rank: int = 64
    """Components of L and R that train, as 16-bit numbers; layers of smaller rank train all."""
    batch_size: int = 1
    """Rows per forward pass and process."""
    gradient_accumulation_steps: int = 1
    """batch_size times this is a step, over all processes together."""
    epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Steps instead of epochs."""
    learning_rate: float = 1e-4
    """Of L and R."""
    weight_decay: float = 0.0
    """Of AdamW; signs and biases have none."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up."""
    warmup_steps: int | None = None
    """Steps of warm-up; None takes warmup_ratio."""
    warmup_ratio: float = 0.0
    """Share of all steps."""
    max_grad_norm: float = 1.0
    """Joint norm that gradients are scaled down to; 0 never."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    eval_steps: int | None = None
    """Steps between validations; None: once an epoch."""
    save_steps: int = 200
    """Steps between checkpoints."""
    patience: int = 0
    """Stop after so many validations without a better one; 0 never."""
    seed: int = 0
    """Seed of all named streams."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        require_least(self, 0, "ft_rank", "patience")
        require_least(self, 1, "batch_size", "gradient_accumulation_steps", "save_steps")
        require_least(self, 1, "calibration_tokens", "max_steps", "eval_steps")
        if self.epochs <= 0 or self.learning_rate <= 0:
            raise ConfigError("epochs and learning_rate must be positive")
        if not 0 <= self.warmup_ratio <= 1 or self.weight_decay < 0:
            raise ConfigError("expected warmup_ratio from 0 to 1 and weight_decay of at least 0")

    @property
    def original(self) -> str | None:
        """The model that was compressed, if it is known."""
        return self.base_model or (None if self.model_save_path else "micro-mistral")

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True)
class TextTuning(Tuning):
    """Tuning that is judged by perplexity."""

    evaluation: tuple[str, ...] = ("microworld:doc", "stdlib")
    """Held-out texts for perplexity before and after."""
    evaluation_tokens: int = 6144
    """Tokens of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluation_tokens < 1 or not self.evaluation:
            raise ConfigError("expected at least one evaluation text and one token of each")


def together(script: str, e: Tuning, work: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    """``work(run)`` in every process of a torchrun group; the results of rank 0 ({} elsewhere)."""
    import torch

    from lplr_q import distributed

    cuda = torch.cuda.is_available() and e.run.device.startswith(("auto", "cuda"))
    with distributed.group("cuda" if cuda else "cpu"):
        distributed.sharded()  # what cannot be done is said before the work
        with Run.open(script, distributed.own_run(script, e)) as run:
            done = torch.tensor([int(run.finished)], device="cuda" if cuda else "cpu")
            if int(distributed.broadcast(done)):
                return run.results
            results = work(run)
        return results if distributed.rank() == 0 else {}


def leader_folder(script: str, e: Tuning) -> Path:
    """The run folder of rank 0."""
    return Run.open(script, e).directory


# ---------------------------------------------------------------- the student


def load_student(run: Run, script: str, e: Tuning) -> tuple[nn.Module, Any]:
    """The compressed model as it was saved, and its tokenizer; compressed here if need be."""
    from lplr_q import distributed
    from lplr_q.activation_aware.quantized_layer import quantised_layers
    from lplr_q.hf import save_compressed

    folder = Path(e.model_save_path) if e.model_save_path else None
    if folder is None:
        folder = leader_folder(script, e) / "compressed"
        if distributed.rank() == 0:
            with distributed.by_itself():
                model, tokenizer = _compress(run, e)
            save_compressed(model, tokenizer, folder, notes={"model": e.original})
        distributed.barrier()
    model, tokenizer = run.load_model(e.model_save_path or folder, what="student")
    if not any(True for _ in quantised_layers(model)):
        raise ConfigError(
            f"{folder} holds no compressed layer; give the folder of a compressed model, or leave "
            "--model-save-path out"
        )
    if e.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def _compress(run: Run, e: Tuning) -> tuple[Any, Any]:
    """The original with every linear layer compressed, one unit each."""
    import torch

    from lplr_q import native
    from lplr_q.activation_aware.hessian import Calibration, collect_hessians
    from lplr_q.evaluate import load_blocks
    from lplr_q.quantize_model import (
        CompressionSettings,
        compress_sublayer,
        install,
        linear_weight,
        prepare_sublayer,
        result_tree,
    )

    assert e.original is not None
    model, tokenizer = run.load_model(e.original, what="base_model", dtype=None)
    run.note(native.status(run.device.device))
    settings = CompressionSettings(
        bits=e.bits, codebook=e.codebook, factor_bits=e.factor_bits, rounds=1, sweeps=1
    )

    def hessians() -> dict[str, Any]:
        length = min(256, e.calibration_tokens)
        parts = [
            load_blocks(tokenizer, s, tokens=e.calibration_tokens, length=length, split="train")
            for s in e.calibration
        ]
        return collect_hessians(
            model,
            torch.cat([p.tokens for p in parts]),
            mask=torch.cat([p.counted for p in parts]),
            include=e.include,
            progress=lambda items: run.progress(items, "hessians"),
        ).to_tree()

    calibration = Calibration.from_tree(run.once("hessians", hessians))
    prepared: dict[str, Any] = {}
    for name in run.progress(list(calibration.key_of), f"compress to {e.bits:g} bits"):
        weight = linear_weight(model.get_submodule(name)).detach().float().cpu()
        key = calibration.key_of[name]

        def compute(name: str = name, weight: Tensor = weight, key: str = key) -> dict[str, Any]:
            if key not in prepared:
                prepared.clear()
                prepared[key] = prepare_sublayer(
                    calibration, name, weight.shape[1], settings, run.streams.torch
                )
            found = compress_sublayer(weight, prepared[key], name, settings, run.streams.torch)
            return result_tree(found)

        install(model, name, run.once(f"compress/{name}", compute))
    return model, tokenizer


# ---------------------------------------------------------------- before, during and after training


def judge_before(run: Run, e: Tuning, student: Any, judge: Judge, original: Any = None) -> None:
    """On rank 0: the original, where it is known, and the compressed model."""
    from lplr_q import distributed

    if distributed.rank() > 0:
        return
    if e.original is not None:
        judge("original", original or load_original(run, e, "original"), 16.0)
    judge("compressed", student, stored_bits(student))


def trained_parts(
    run: Run, e: Tuning, student: nn.Module, *, signs: bool
) -> tuple[int, dict[str, list[Any]]]:
    """Let ``ft_rank`` components (and the signs) of the student train; (rank, parameters)."""
    from lplr_q.trainable import make_trainable

    rank = widest(student, e.ft_rank, run) if e.ft_rank else 0
    return rank, make_trainable(student, signs=signs, ft_rank=rank)


def batches(run: Run, n: int, size: int) -> Iterator[slice]:
    """Places 0 to n in slices of ``size``, for validation."""
    for start in run.progress(range(0, n, size), "validate"):
        yield slice(start, start + size)


def tune(
    run: Run, e: Tuning, job: Job, student: nn.Module, tokenizer: Any, judge: Judge
) -> Progress | None:
    """Train, store the whole tuned model and judge it; None in processes that only help rank 0."""
    from lplr_q import distributed
    from lplr_q.tuning_loop import fit

    progress = fit(run, e, job)
    if distributed.rank() > 0:
        return None
    tuned = save_tuned(run, e, student, tokenizer)
    judge("tuned", tuned, stored_bits(tuned))
    return progress


# ---------------------------------------------------------------- texts


def token_blocks(
    tokenizer: Any, source: str | Path, *, split: str, length: int, n: int | None, seed: int = 0
) -> TextBlocks:
    """At most ``n`` rows of ``length`` tokens of a text source or file; None takes all."""
    import torch

    from lplr_q.eval_tasks import hub_rows
    from lplr_q.evaluate import TextBlocks, load_blocks
    from workbench.text import load_texts, pack_blocks, read_texts

    if isinstance(source, Path):
        texts = read_texts(source)
    elif source.startswith(BUILT_IN):
        return load_blocks(
            tokenizer, source, tokens=(n or 64) * length, length=length, split=split, seed=seed
        )
    elif source == "wikitext2":
        rows = hub_rows("Salesforce/wikitext:wikitext-2-raw-v1", split)
        texts = [row["text"] for row in rows if row["text"].strip()]
    else:
        texts = load_texts(source, n=100_000, split=split, seed=seed)
    blocks = pack_blocks(tokenizer, texts, length)[:n]
    return TextBlocks(str(source), blocks, torch.ones_like(blocks, dtype=torch.bool))


def concatenated(parts: list[TextBlocks]) -> tuple[Tensor, Tensor]:
    """(tokens, counted targets) of several sources with rows of one length."""
    import torch

    return (
        torch.cat([p.tokens for p in parts]),
        torch.cat([p.counted[:, 1:] for p in parts]),
    )


# ---------------------------------------------------------------- afterwards


def stored_bits(model: Any) -> float:
    """Bits per weight of a compressed model's linear layers, in memory as in the file."""
    from lplr_q.activation_aware.quantized_layer import quantised_layers

    layers = [layer.stored_bits() for _, layer in quantised_layers(model)]
    return sum(b.total for b in layers) / sum(b.weights for b in layers)


def load_original(run: Run, e: Tuning, what: str) -> Any:
    """The frozen original."""
    if e.original is None:
        raise ConfigError("give --base-model: the original that the folder was compressed from")
    model, _ = run.load_model(e.original, what=what)
    return model.requires_grad_(False)


def save_tuned(run: Run, e: Tuning, model: Any, tokenizer: Any) -> Any:
    """``trained.safetensors`` and the whole model under ``model/``; the latter, loaded afresh."""
    from lplr_q.activation_aware.quantized_layer import merge_trained, quantised_layers
    from lplr_q.hf import save_compressed

    tensors = {
        f"{name}.{own}": parameter.detach().cpu().contiguous()
        for name, layer in quantised_layers(model)
        for own, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    about = {"base_model": str(e.original), "tuned_by": run.script}
    run.save_tensors("trained.safetensors", tensors, about)
    merge_trained(model)
    save_compressed(model, tokenizer, run.path("model"), notes=about)
    return run.load_model(run.path("model"), what="tuned")[0]


def language_model_nats(model: Any, ids: Tensor) -> Tensor:
    """-ln p of every token after the first; (rows, length - 1), with gradient."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    nats = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nats.view(ids.shape[0], -1)


def tuning_groups(e: Tuning, parameters: dict[str, list[Any]], **rates: float) -> list[Any]:
    """AdamW groups: signs (and a head) without decay, factors with it; empty ones left out."""
    return [
        {
            "params": listed,
            "lr": rates.get(name, e.learning_rate),
            "weight_decay": e.weight_decay if name == "factors" else 0.0,
        }
        for name, listed in parameters.items()
        if listed
    ]


def widest(student: Any, ft_rank: int, run: Run) -> int:
    """``ft_rank``, or the largest rank of the model with a note if that is less.

    Raises:
        ConfigError: the model has no components at all.
    """
    from lplr_q.activation_aware.quantized_layer import quantised_layers

    largest = max((layer.rank for _, layer in quantised_layers(student)), default=0)
    if ft_rank and not largest:
        raise ConfigError(
            "the model was compressed without L and R (rank 0); compress with more bits, or train "
            "the signs with lplr_q.finetune_rht"
        )
    if ft_rank > largest:
        run.note(f"ft_rank={ft_rank}: the largest rank is {largest}, all components train")
    return min(ft_rank, largest)
