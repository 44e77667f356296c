"""Before and after: perplexity of the original, the compressed and the tuned model, paired."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lplr_q.finetuning import TextTuning, token_blocks

if TYPE_CHECKING:
    from lplr_q.tuning_loop import Progress
    from workbench.run import Run


class Comparison:
    """Perplexity of the original, the compressed and the tuned model on the same held-out texts."""

    def __init__(self, run: Run, e: TextTuning, tokenizer: Any, length: int) -> None:
        n = max(1, e.evaluation_tokens // length)
        self.run = run
        self.texts = [
            token_blocks(tokenizer, source, split="test", length=length, n=n, seed=e.seed)
            for source in e.evaluation
        ]
        self.stages: dict[str, dict[str, Any]] = {}
        self.bits: dict[str, float] = {}

    def judge(self, stage: str, model: Any, bits: float) -> None:
        """One more stage; its loss per token is a unit of the run."""
        from lplr_q.activation_aware.quantized_layer import set_mode
        from lplr_q.evaluate import nats_by_source

        set_mode(model, "cached")
        self.bits[stage] = bits
        self.stages[stage] = self.run.once(
            f"perplexity/{stage}", lambda: nats_by_source(model, self.texts, batch_size=4)
        )
        set_mode(model, "dequant")

    def rows(self) -> list[dict[str, Any]]:
        """Ratio to the first stage and change against the compressed one, both paired over rows."""
        from lplr_q.evaluate import perplexity_columns

        rows = []
        for text in self.texts:
            first = next(iter(self.stages.values()))[text.name]
            before = self.stages["compressed"][text.name]
            for name, nats in self.stages.items():
                row = {"text": text.name, "stage": name, "bits": self.bits[name]}
                row |= perplexity_columns(text, nats[text.name], first)
                change = perplexity_columns(text, nats[text.name], before)
                row |= {k.replace("ratio", "change"): change[k] for k in _PAIRED}
                rows.append(row)
        return rows


_PAIRED = ("ratio", "ratio_low", "ratio_high")


def curve_figure(run: Run, progress: Progress, label: str) -> None:
    """The validation curve of a run."""
    from workbench.plots import line_plot, new_figure

    rows = progress.curve
    name = next(key for key in rows[0] if key != "step")
    figure, axes = new_figure()
    line_plot(axes, rows, x="step", y=name, xlabel="step", ylabel=label)
    said = "; ".join(f"step {r['step']:g}: {r[name]:.4f}" for r in rows)
    run.figure("validation", figure, rows, caption=f"Validation: {label}.", alt=f"{label}: {said}")


def finish_perplexity(
    run: Run, e: TextTuning, what: str, comparison: Comparison, progress: Progress, label: str
) -> dict[str, Any]:
    """Table, figure and results of a run judged by perplexity."""
    rows = comparison.rows()
    run.table(
        "perplexity",
        rows,
        caption="Held-out perplexity; ratio to the first row, change against the compressed model, "
        "both paired over rows with 95 % intervals.",
    )
    curve_figure(run, progress, label)
    tuned = [r for r in rows if r["stage"] == "tuned"]
    said = "; ".join(
        f"{r['text']} {r['perplexity']:.3f} (x {r['change']:.3f} "
        f"[{r['change_low']:.3f}, {r['change_high']:.3f}])"
        for r in tuned
    )
    bits, steps = comparison.bits, progress.curve[-1]["step"]
    model = e.original or e.model_save_path
    return run.finish(
        {"rows": rows, "curve": progress.curve, "bits": bits, "steps": steps},
        title=f"Tuning {what} of {model} at {bits['compressed']:.2f} bits",
        question="How much of what compression cost comes back without touching a code?",
        summary=f"Perplexity after tuning {what}: {said}.",
        headline={f"perplexity after / before, {r['text']}": r["change"] for r in tuned},
    )
