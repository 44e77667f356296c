"""Compress a language model to W = Q + L R and compare with RTN, GPTQ and QuIP#.
[LPLR-Q; CALDERA Alg. 1]

    python -m lplr_q.run --model micro-mistral --bits 2 2.5
    python -m lplr_q.run --model FOLDER --target-bpw 2.4 --codebook tcq --allocation auto
    python -m lplr_q.run --tiny                    # trains a small model first; no downloads
    python -m lplr_q.run --model FOLDER --calibration text.jsonl --evaluation text.jsonl

Hessians -> compress -> save -> reload in a fresh load -> perplexity against true bits per weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError
from workbench.run import Run

if TYPE_CHECKING:
    from lplr_q.activation_aware.hessian import Calibration
    from lplr_q.contest import Arm, Contest
    from lplr_q.evaluate import TextBlocks
    from lplr_q.quantize_model import CompressionSettings


@dataclass(frozen=True)
class Experiment:
    """Which model, which budgets, how it is calibrated and judged."""

    model: str = "micro-mistral"
    """Built-in name, local folder or hub id."""
    bits: tuple[float, ...] = (2.0, 2.5, 3.0, 4.0)
    """Budgets in bits per weight."""
    overhead: float = 0.15
    """Bits per weight that scales and signs may add, the same for every method."""
    target_bpw: float | None = None
    """One total budget, scales and signs included; replaces --bits and --overhead."""
    methods: tuple[Literal["rtn", "gptq", "quip-sharp", "lplr-ldlq"], ...] = (
        "rtn",
        "gptq",
        "lplr-ldlq",
    )
    """What is compared."""
    codebook: str = "e8p"
    """Codebook of Q: e8p, tcq, lloyd-max or module:factory."""
    allocation: str = "uniform"
    """uniform: every layer the same budget; auto: one budget for the model; or a JSON file."""
    sensitivity: Literal["fisher", "kl", "uniform"] = "fisher"
    """What an error counts in the automatic allocation."""
    q_bits: int | None = None
    """Bits of Q; None takes the widest that fits the budget, the rest goes to L and R."""
    try_widths: int = 1
    """With q_bits None: widths of Q to try per layer, widest first; the smallest error wins."""
    factor_bits: int | tuple[int, int] = 4
    """Bits per entry of L and R, or two numbers: of L, of R; 16 keeps them in bfloat16."""
    rounds: int = 1
    """Outer rounds of the alternation; the best iterate is kept."""
    inner_iterations: int = 5
    """Least-squares steps for the rounded factors per round."""
    sweeps: int = 1
    """Guarded refinement sweeps after LDLQ."""
    init: Literal["lr_first", "q_first", "odlri", "srr", "auto"] = "lr_first"
    """Where the alternation starts."""
    q_hessian: Literal["plain", "downdate", "projq", "auto"] = "plain"
    """What the Q step minimises."""
    rht: bool = True
    """Randomised Hadamard transform on both sides."""
    sigma_reg: float = 0.01
    """Multiple of the mean diagonal added to each Hessian."""
    include: str = ".*"
    """Regular expression: linear layers of the decoder blocks to compress."""
    calibration: tuple[str, ...] = ("microworld:doc", "stdlib")
    """Texts whose activations make the Hessians."""
    calibration_tokens: int = 16384
    """Tokens of each calibration text."""
    evaluation: tuple[str, ...] = ("microworld:doc", "stdlib")
    """Held-out texts, reported apart."""
    evaluation_tokens: int = 8192
    """Tokens of each evaluation text."""
    length: int = 512
    """Tokens per row."""
    batch_size: int = 8
    """Rows per forward pass."""
    tiny: bool = False
    """Train a small model first and compress that instead of --model."""
    tiny_steps: int = 240
    """Its training steps."""
    seed: int = 0
    """Seed of all named streams."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        """Settings that cannot work together."""
        for name in ("bits", "methods", "calibration", "evaluation"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give at least one")
        for bits in self.bits:
            if not 1 <= bits <= 8:
                raise ConfigError(f"bits={bits:g}; choose budgets from 1 to 8")
        if self.target_bpw is not None and not 1 <= self.target_bpw <= 8:
            raise ConfigError(f"target_bpw={self.target_bpw:g}; choose from 1 to 8")
        if self.tiny_steps < 1:
            raise ConfigError(f"tiny_steps={self.tiny_steps}: nothing would be trained")
        if self.overhead < 0:
            raise ConfigError(f"overhead={self.overhead}; it cannot be negative")
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds}: nothing would be decomposed; use at least 1")
        if self.length < 8 or self.batch_size < 1:
            raise ConfigError(f"length={self.length}, batch_size={self.batch_size}: too small")

    @property
    def budgets(self) -> tuple[float, ...]:
        """Nominal budgets: --target-bpw alone, or --bits."""
        return self.bits if self.target_bpw is None else (self.target_bpw,)

    @property
    def allowance(self) -> float:
        """Bits that scales and signs may add to a nominal budget."""
        return self.overhead if self.target_bpw is None else 0.0


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict:
    """Run the comparison; returns the rows of the table and what was stored."""
    with Run.open("lplr_q.run", experiment) as run:
        if run.finished:
            return run.results
        model, tokenizer = _model(run, experiment)
        texts = _texts(experiment, tokenizer, "evaluation")
        calibration = _texts(experiment, tokenizer, "calibration")
        contest = _contest(run, experiment, model, calibration)
        base = run.once("evaluate/16-bit", lambda: _nats(experiment, model, texts))
        rows = [_row(text, "16-bit", 16.0, 16.0, base, base) for text in texts]
        layers: list[dict[str, Any]] = []
        curves: list[dict[str, Any]] = []
        stored: dict[str, Any] = {}
        for bits in experiment.budgets:
            for arm in _arms(experiment):
                found = _evaluate(run, experiment, contest, arm, tokenizer, texts, bits)
                layers += found["layers"]
                curves += found.get("curves", [])
                if "stored" in found:
                    name = f"{bits:g}" if arm.method == "lplr-ldlq" else f"{arm.label}-{bits:g}"
                    stored[name] = found["stored"]
                for text in texts:
                    rows.append(
                        _row(text, arm.title, bits, found["true_bits"], found["nats"], base)
                    )
                    key = f"{arm.method}/{bits:g}/{text.name}"
                    run.log(len(rows), {key: rows[-1]["perplexity"]})
        if experiment.tiny and stored:
            stored["adapter"] = run.once("adapter", lambda: _adapter(run, stored, texts))
        return _report(run, experiment, rows, layers, curves, stored)


def _adapter(run: Run, stored: dict[str, Any], texts: list[TextBlocks]) -> dict[str, Any]:
    """A few LoRA steps on the smallest stored model, loaded afresh."""
    from lplr_q.toy import tune_adapter
    from workbench.models import load_model

    first = next(iter(stored.values()))
    model, _ = load_model(run.directory / first["folder"], device=run.device.device)
    tokens, counted = (t[:4].to(run.device.device) for t in (texts[0].tokens, texts[0].counted))
    return tune_adapter(model, tokens, counted, seed=run.streams.integer("adapter"))


def _model(run: Run, experiment: Experiment) -> tuple[Any, Any]:
    if not experiment.tiny:
        from lplr_q.hf import require_uncompressed

        model, tokenizer = run.load_model(experiment.model, dtype=None)
        require_uncompressed(model)
        return model, tokenizer
    from lplr_q.toy import train_toy

    return train_toy(run, steps=experiment.tiny_steps)


def _texts(experiment: Experiment, tokenizer: Any, purpose: str) -> list[TextBlocks]:
    """Blocks of the calibration (training split) or evaluation (test split) texts."""
    from lplr_q.evaluate import load_blocks

    calibrating = purpose == "calibration"
    return [
        load_blocks(
            tokenizer,
            source,
            tokens=experiment.calibration_tokens if calibrating else experiment.evaluation_tokens,
            length=experiment.length,
            split="train" if calibrating else "test",
            seed=experiment.seed,
        )
        for source in getattr(experiment, purpose)
    ]


def _arms(experiment: Experiment) -> list[Arm]:
    from lplr_q.contest import Arm
    from lplr_q.report import METHOD_NAMES

    arms = []
    for method in experiment.methods:
        title = METHOD_NAMES[method]
        if method != "lplr-ldlq":
            label = "quip" if method == "quip-sharp" else method
            arms.append(Arm(label, title, method))
            continue
        if experiment.allocation != "uniform":
            title += ", allocated"
        arms.append(Arm("lplr", title, method, experiment.codebook, experiment.allocation))
    return arms


def _contest(
    run: Run, experiment: Experiment, model: Any, calibration: list[TextBlocks]
) -> Contest:
    """Model, Hessians from the calibration texts and settings that all arms share."""
    import torch

    from lplr_q import native
    from lplr_q.contest import Contest

    run.note(native.status(run.device.device))
    tokens = torch.cat([part.tokens for part in calibration])
    mask = torch.cat([part.counted for part in calibration])
    return Contest(
        run,
        model,
        _calibrate(run, experiment, model, tokens, mask),
        _settings(experiment),
        experiment.allowance,
        sensitivity=experiment.sensitivity,
        tokens=tokens,
        mask=mask,
        batch_size=experiment.batch_size,
    )


def _calibrate(run: Run, experiment: Experiment, model: Any, tokens: Any, mask: Any) -> Calibration:
    """Hessians of all sublayers."""
    from lplr_q.activation_aware.hessian import Calibration, collect_hessians

    def compute() -> dict[str, Any]:
        return collect_hessians(
            model,
            tokens,
            mask=mask,
            batch_size=experiment.batch_size,
            include=experiment.include,
            progress=lambda items: run.progress(items, "hessians"),
        ).to_tree()

    calibration = Calibration.from_tree(run.once("hessians", compute))
    for key, moment in calibration.moments.items():
        if moment.count < len(moment.mean):
            run.note(
                f"{key}: {moment.count} tokens for width {len(moment.mean)}; the Hessian is rank "
                "deficient and held up by --sigma-reg only"
            )
    return calibration


def _nats(experiment: Experiment, model: Any, texts: list[TextBlocks]) -> dict[str, Any]:
    from lplr_q.evaluate import nats_by_source

    return nats_by_source(model, texts, batch_size=experiment.batch_size)


def _settings(experiment: Experiment) -> CompressionSettings:
    from lplr_q.quantize_model import CompressionSettings

    return CompressionSettings(
        codebook=experiment.codebook,
        q_bits=experiment.q_bits,
        try_widths=experiment.try_widths,
        factor_bits=experiment.factor_bits,
        rounds=experiment.rounds,
        inner_iterations=experiment.inner_iterations,
        sweeps=experiment.sweeps,
        init=experiment.init,
        q_hessian=experiment.q_hessian,
        rht=experiment.rht,
        sigma_reg=experiment.sigma_reg,
    )


def _evaluate(
    run: Run,
    experiment: Experiment,
    contest: Contest,
    arm: Arm,
    tokenizer: Any,
    texts: list[TextBlocks],
    bits: float,
) -> dict[str, Any]:
    """Nats of one arm at one budget; formats of ours are saved and loaded afresh before."""
    from lplr_q.contest import ROUNDING

    if arm.method in ROUNDING:

        def compute() -> dict[str, Any]:
            found = contest.compress(arm, bits)
            nats = _nats(experiment, found.model, texts)
            return {"nats": nats, "true_bits": found.true_bits, "layers": found.layers}

        return run.once(f"evaluate/{arm.label}-{bits:g}", compute)
    found = contest.compress(arm, bits)
    stored = _save_and_reload(run, experiment, found.model, tokenizer, texts, bits, arm)
    return {
        "layers": found.layers,
        "curves": found.curves,
        "true_bits": stored["bits_per_weight"],
        "nats": stored.pop("nats"),
        "stored": stored,
    }


def _save_and_reload(
    run: Run,
    experiment: Experiment,
    compressed: Any,
    tokenizer: Any,
    texts: list[TextBlocks],
    bits: float,
    arm: Arm,
) -> dict[str, Any]:
    """Write the model folder, load it as a stranger would, compare logits, evaluate."""
    import torch

    from lplr_q.activation_aware.quantized_layer import set_mode
    from lplr_q.hf import save_compressed
    from workbench.models import load_model

    folder = run.path(f"models/{arm.label}-{bits:g}")
    report = save_compressed(
        compressed, tokenizer, folder, notes={"model": experiment.model, "budget": bits}
    )

    def compute() -> dict[str, Any]:
        loaded, _ = load_model(folder, device=run.device.device)
        probe = texts[0].tokens[:1].to(run.device.device)
        with torch.no_grad():
            before = compressed(input_ids=probe, use_cache=False).logits
            after = loaded(input_ids=probe, use_cache=False).logits
        set_mode(loaded, "cached")
        nats = _nats(experiment, loaded, texts)
        return {"nats": nats, "reload_difference": float((before - after).abs().max())}

    return {
        **report,
        **run.once(f"evaluate/{arm.label}-{bits:g}", compute),
        "folder": folder.relative_to(run.directory).as_posix(),
    }


def _row(
    text: TextBlocks, method: str, bits: float, true_bits: float, nats: Any, base: Any
) -> dict[str, Any]:
    from lplr_q.evaluate import perplexity_columns
    from lplr_q.report import METHOD_NAMES, short_source

    return {
        "text": short_source(text.name),
        "bits": bits,
        "method": METHOD_NAMES.get(method, method),
        "true_bits": true_bits,
        **perplexity_columns(text, nats[text.name], base[text.name]),
    }


def _report(
    run: Run,
    experiment: Experiment,
    rows: list[dict[str, Any]],
    layers: list[dict[str, Any]],
    curves: list[dict[str, Any]],
    stored: dict[str, Any],
) -> dict:
    """Tables, figures, results."""
    from lplr_q.report import headline, perplexity_alt, perplexity_figure

    run.table(
        "perplexity",
        rows,
        caption="Perplexity on held-out text (95 % interval over blocks) and its ratio to the "
        "16-bit model (paired). true_bits counts codes, factors, scales, zero points and signs.",
    )
    run.figure(
        "perplexity",
        perplexity_figure(rows),
        rows,
        caption="Perplexity against true bits per weight; bands are 95 % intervals of the ratio to "
        "16 bit; n = "
        + ", ".join(f"{r['n_tokens']} tokens of {r['text']}" for r in rows if r["bits"] == 16),
        alt=perplexity_alt(rows),
    )
    if layers:
        _layer_report(run, layers, curves)
    summary = headline(rows, min(experiment.budgets, key=lambda b: abs(b - 2.5))) + "."
    model = "a model trained here" if experiment.tiny else experiment.model
    if "adapter" in stored:
        tuned = stored["adapter"]
        summary += (
            f" A LoRA adapter on its codes takes the loss of the rows it trains on from "
            f"{tuned['loss_before']:.3f} to {tuned['loss_after']:.3f} nats per token."
        )
    return run.finish(
        {"rows": rows, "stored": stored},
        title=f"Compressing {model} to a few bits per weight",
        question="How few bits per weight does the model need, every scale and sign counted?",
        summary=summary,
        headline=_headline(rows),
    )


def _layer_report(run: Run, layers: list[dict[str, Any]], curves: list[dict[str, Any]]) -> None:
    """What became of the single layers."""
    from lplr_q.report import curve_figure, error_figure, prediction_figure, worst_rows
    from workbench.tables import write_csv

    run.table(
        "worst",
        worst_rows(layers),
        caption="The ten sublayers with the largest error at each budget. Every layer of every "
        "method is in tables/layers.csv.",
    )
    write_csv(run.path("tables/layers.csv"), layers)
    figure, drawn = error_figure(layers)
    run.figure(
        "error_by_layer",
        figure,
        drawn,
        caption="Relative activation-aware error, median over blocks; "
        f"n = {len({r['layer'] for r in layers})} layers",
        alt="; ".join(f"{r['sublayer']} {r['budget']}: {r['error']:.3f}" for r in drawn),
    )
    if curves:
        figure, drawn = curve_figure(curves)
        run.figure(
            "error_by_step",
            figure,
            drawn,
            caption="Error after each sub-step, from decoded codes: median over "
            f"n = {drawn[0]['sublayers']} sublayers, itself and over the first whole state",
            alt="; ".join(f"{r['budget']} step {r['step']}: {r['error']:.3f}" for r in drawn),
        )
    foretold = prediction_figure(layers)
    if foretold is not None:
        figure, drawn = foretold
        ratios = sorted(r["error"] / r["predicted"] for r in drawn)
        run.figure(
            "foretold",
            figure,
            drawn,
            caption=f"Errors the allocation counted on, and those measured; n = {len(drawn)}",
            alt=f"measured over foretold error: least {ratios[0]:.2f}, median "
            f"{ratios[len(ratios) // 2]:.2f}, largest {ratios[-1]:.2f}",
        )


def _headline(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Perplexity over 16 bit at the smallest budget, by method, on the last (hardest) text."""
    few = [row for row in rows if row["bits"] < 16]
    if not few:
        return {}
    text, bits = few[-1]["text"], min(row["bits"] for row in few)
    return {
        f"perplexity ratio, {row['method']} at {row['true_bits']:.2f} bits ({text})": row["ratio"]
        for row in few
        if row["text"] == text and row["bits"] == bits
    }


if __name__ == "__main__":
    cli(main, EXPERIMENT)
