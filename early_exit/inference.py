"""Generate text with exits and show after which block each token left.   [DYNAMAX §4]

python -m early_exit.inference --exits runs/early_exit/train-1a2b3c4d --prompt "Q who owns"
python -m early_exit.inference --exits DIR --threshold 0.6 --policy propagate --accounting dynamax
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError
from workbench.run import Run

if TYPE_CHECKING:
    from early_exit.model import EarlyExitModel


@dataclass(frozen=True)
class Experiment:
    """Which exits, which prompt, how daring."""

    exits: Path | None = None
    """Folder written by early_exit.train; none = untrained exits by the published placement rule,
    for a criterion that needs no training."""
    model: str | None = None
    """Backbone; none = the one named in the exits' config, or micro-mistral."""
    prompt: str | None = None
    """Text to continue; none = a built-in document with questions."""
    max_new_tokens: int = 60
    """Tokens to generate at most."""
    criterion: str = "gate"
    """gate, maxprob, margin, entropy, saturation or fixed."""
    threshold: tuple[float, ...] = ()
    """λ: one, or one per exit; none = the one saved with the exits; 1 = never leave."""
    policy: Literal["auto", "propagate", "defer", "copy_token", "copy_layer", "skip"] = "auto"
    """State of skipped blocks; auto = defer, which is exact."""
    max_pending: int = 8
    """Longest queue of tokens with deferred blocks."""
    temperature: float = 0.0
    """0 = greedy."""
    top_k: int = 0
    """Sample among the k most probable tokens; 0 = all."""
    repetition_penalty: float = 1.0
    """As in Hugging Face's generate; 1 = off."""
    accounting: Literal["true", "dynamax"] = "true"
    """dynamax adds the published speed-up formula beside the three counts."""
    force: bool = False
    """Use exits trained for another backbone."""
    seed: int = 0
    """Seed of all named streams."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("--prompt is empty; give some text, or leave it out")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: expected 0 (greedy) or more")


EXPERIMENT = Experiment()  # edit me


def default_prompt() -> str:
    """A document of the built-in world with its first question still open."""
    from workbench.text import load_texts

    text = load_texts("microworld:doc", n=1, split="test", seed=3)[0]
    return text[: text.index(" A ") + 2] if " A " in text else text[:200]


def load(run: Run, experiment: Experiment) -> EarlyExitModel:
    """The backbone with its trained exits, or with untrained ones if no folder is given."""
    from early_exit.model import EarlyExitModel

    place = {"device": run.device.device, "dtype": run.device.dtype}
    if experiment.exits is not None:
        return EarlyExitModel.from_pretrained(
            experiment.model, exits_dir=experiment.exits, force=experiment.force, **place
        )
    if experiment.criterion == "gate":
        raise ConfigError(
            "--exits is missing and criterion gate needs trained gates: make some with python -m "
            "early_exit.train --model micro-mistral and give its run folder, or use --criterion "
            "maxprob, margin, entropy or saturation"
        )
    name = experiment.model or "micro-mistral"
    model, tokenizer = run.load_model(name)
    return EarlyExitModel.from_backbone(model, tokenizer, name=name)


def main(experiment: Experiment) -> dict[str, Any]:
    """Generate twice, with the full model and with exits, and compare."""
    with Run.open("early_exit.inference", experiment) as run:
        if run.finished:
            return run.results
        from early_exit.model import sampler
        from early_exit.report import heat_map_html, token_heat_map

        model = load(run, experiment)
        saved = model.config.get("thresholds", {}).get("default", 0.8)
        threshold = experiment.threshold or (float(saved),)
        prompt = experiment.prompt or default_prompt()

        def continue_with(limit: tuple[float, ...]) -> Any:
            choose = sampler(
                temperature=experiment.temperature,
                top_k=experiment.top_k,
                repetition_penalty=experiment.repetition_penalty,
                generator=run.streams.torch("sampling"),
            )
            return model.generate(
                prompt,
                max_new_tokens=experiment.max_new_tokens,
                choose=choose,
                criterion=experiment.criterion,
                threshold=limit,
                policy=experiment.policy,
                max_pending=experiment.max_pending,
            )

        full, early = continue_with((1.0,)), continue_with(threshold)
        top = model.adapter.n_layers
        same = [a == b for a, b in zip(full.tokens, early.tokens, strict=False)]
        run.note(f"full model: {full.text}")
        run.note(f"with exits: {early.text}")
        rows = [
            {
                "token": number,
                "text": early.pieces[number],
                "exit_layer": layer,
                "scores": " ".join(f"{s:.4f}" for s in early.scores[number]),
                "full_model": full.pieces[number] if number < len(full.pieces) else "",
            }
            for number, layer in enumerate(early.exit_layers)
        ]
        run.table("tokens", rows, caption="Every token with the block after which it left.")
        shown = ", ".join(f"{t:g}" for t in threshold)
        run.figure(
            "heat_map",
            token_heat_map(early.pieces, early.exit_layers, top),
            rows,
            caption=f"{len(rows)} tokens of {model.config['backbone']} with λ = {shown}; the "
            "colour is the block after which a token left.",
            alt=f"mean depth {early.tally.latency_blocks / len(rows):.2f} of {top} blocks",
        )
        run.save_text(
            "heat_map.html", heat_map_html(early.pieces, early.exit_layers, early.scores, top)
        )
        speed = early.speedups or {}
        values: dict[str, Any] = {
            "tokens": len(early.tokens),
            "prefill_tokens": early.prefill_tokens,
            **speed,
            "speedup_seconds": (full.seconds / len(full.tokens))
            / (early.seconds / len(early.tokens)),
            "exited": sum(e < top - 1 for e in early.exit_layers) / len(rows),
            "identical_positions": sum(same) / max(len(full.tokens), len(early.tokens)),
            "text": early.text,
            "full_text": full.text,
        }
        if experiment.accounting == "dynamax":
            values["speedup_dynamax"] = early.dynamax(
                top, model.adapter.family, experiment.policy == "propagate"
            )
        return run.finish(
            values,
            title="Text with exits",
            question="After which block was each token decided?",
            summary=f"{len(rows)} tokens at {speed['mean_blocks']:.2f} of {top} blocks on average "
            f"({speed['speedup_blocks']:.2f}× in blocks, {speed['speedup_work']:.2f}× with "
            f"deferred work, {speed['speedup_arithmetic']:.2f}× in arithmetic); "
            f"{100 * values['identical_positions']:.0f} % of positions as the full model's text.",
        )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
