"""Compress a language model to W = Q + L R and compare with RTN and GPTQ.
[LPLR-Q; CALDERA Alg. 1]

    python -m lplr_q.run --model micro-mistral --bits 2 2.5
    python -m lplr_q.run --config configs/lplr_q/run.tour.yaml
    python -m lplr_q.run --model FOLDER --calibration text.jsonl --evaluation text.jsonl

Hessians -> compress -> save -> reload in a fresh load -> perplexity against true bits per weight.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError
from workbench.run import Run

if TYPE_CHECKING:
    from lplr_q.activation_aware.hessian import Calibration
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
    methods: tuple[Literal["rtn", "gptq", "lplr-ldlq"], ...] = ("rtn", "gptq", "lplr-ldlq")
    """What is compared."""
    codebook: str = "e8p"
    """Codebook of Q: e8p, lloyd-max or module:factory."""
    q_bits: int | None = None
    """Bits of Q; None takes the widest that fits the budget, the rest goes to L and R."""
    try_widths: int = 1
    """With q_bits None: widths of Q to try per layer, widest first; the smallest error wins."""
    factor_bits: int = 4
    """Bits per entry of L and R; 16 keeps them in bfloat16."""
    rounds: int = 1
    """Outer rounds of the alternation; the best iterate is kept."""
    inner_iterations: int = 5
    """Least-squares steps for the rounded factors per round."""
    sweeps: int = 1
    """Guarded refinement sweeps after LDLQ."""
    init: Literal["lr_first", "q_first"] = "lr_first"
    """Which component is updated first."""
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
        if self.overhead < 0:
            raise ConfigError(f"overhead={self.overhead}; it cannot be negative")
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds}: nothing would be decomposed; use at least 1")
        if self.length < 8 or self.batch_size < 1:
            raise ConfigError(f"length={self.length}, batch_size={self.batch_size}: too small")


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict:
    """Run the comparison; returns the rows of the table and what was stored."""
    with Run.open("lplr_q.run", experiment) as run:
        if run.finished:
            return run.results
        from lplr_q.evaluate import load_blocks

        model, tokenizer = run.load_model(experiment.model, dtype=None)
        texts = [
            load_blocks(
                tokenizer,
                source,
                tokens=experiment.evaluation_tokens,
                length=experiment.length,
                split="test",
                seed=experiment.seed,
            )
            for source in experiment.evaluation
        ]
        calibration = _calibrate(run, experiment, model, tokenizer)
        base = run.once("evaluate/16-bit", lambda: _nats(experiment, model, texts))
        rows = [_row(text, "16-bit", 16.0, 16.0, base, base) for text in texts]
        layers: list[dict[str, Any]] = []
        stored: dict[str, Any] = {}
        for bits in experiment.bits:
            for method in experiment.methods:
                if method == "lplr-ldlq":
                    found = _lplr(run, experiment, model, tokenizer, calibration, texts, bits)
                    layers += found["layers"]
                    stored[f"{bits:g}"] = found["stored"]
                else:
                    found = _baseline(run, experiment, model, calibration, texts, bits, method)
                for text in texts:
                    rows.append(_row(text, method, bits, found["true_bits"], found["nats"], base))
                    run.log(len(rows), {f"{method}/{bits:g}/{text.name}": rows[-1]["perplexity"]})
        return _report(run, experiment, rows, layers, stored)


def _calibrate(run: Run, experiment: Experiment, model: Any, tokenizer: Any) -> Calibration:
    """Hessians of all sublayers from the training split of the calibration texts."""
    import torch

    from lplr_q.activation_aware.hessian import Calibration, collect_hessians
    from lplr_q.evaluate import load_blocks

    def compute() -> dict[str, Any]:
        parts = [
            load_blocks(
                tokenizer,
                source,
                tokens=experiment.calibration_tokens,
                length=experiment.length,
                split="train",
                seed=experiment.seed,
            )
            for source in experiment.calibration
        ]
        return collect_hessians(
            model,
            torch.cat([p.tokens for p in parts]),
            mask=torch.cat([p.counted for p in parts]),
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


def _settings(experiment: Experiment, bits: float) -> CompressionSettings:
    from lplr_q.quantize_model import CompressionSettings

    return CompressionSettings(
        bits=bits + experiment.overhead,
        codebook=experiment.codebook,
        q_bits=experiment.q_bits,
        try_widths=experiment.try_widths,
        factor_bits=experiment.factor_bits,
        rounds=experiment.rounds,
        inner_iterations=experiment.inner_iterations,
        sweeps=experiment.sweeps,
        init=experiment.init,
        rht=experiment.rht,
        sigma_reg=experiment.sigma_reg,
    )


def _lplr(
    run: Run,
    experiment: Experiment,
    model: Any,
    tokenizer: Any,
    calibration: Calibration,
    texts: list[TextBlocks],
    bits: float,
) -> dict[str, Any]:
    """Compress every sublayer (one unit each), save, load afresh, evaluate what was loaded."""
    import copy

    from lplr_q.bits import matched_budget
    from lplr_q.quantize_model import compress_sublayer, install, prepare_sublayer, result_tree

    settings = _settings(experiment, bits)
    compressed = copy.deepcopy(model)
    layers = []
    prepared_key, prepared = "", None
    for name in run.progress(list(calibration.key_of), f"compress to {bits:g} bits"):
        weight = model.get_submodule(name).weight.detach().float().cpu()

        def compute(name: str = name, weight: Any = weight) -> dict[str, Any]:
            nonlocal prepared_key, prepared
            budget = matched_budget(*weight.shape, bits, experiment.overhead)
            own = dataclasses.replace(settings, bits=budget)
            if prepared is None or prepared_key != calibration.key_of[name]:
                prepared_key = calibration.key_of[name]
                prepared = prepare_sublayer(
                    calibration, name, weight.shape[1], settings, run.streams.torch
                )
            result = compress_sublayer(weight, prepared, name, own, run.streams.torch)
            return result_tree(result)

        tree = run.once(f"lplr-{bits:g}/{name}", compute)
        install(compressed, name, tree)
        layers.append(_layer_row(bits, name, weight, tree))
    stored = _save_and_reload(run, experiment, compressed, tokenizer, texts, bits)
    return {
        "layers": layers,
        "true_bits": stored["bits_per_weight"],
        "nats": stored.pop("nats"),
        "stored": stored,
    }


def _layer_row(bits: float, name: str, weight: Any, tree: dict[str, Any]) -> dict[str, Any]:
    return {
        "bits": bits,
        "layer": name,
        "kind": name.rpartition(".")[2],
        "outputs": weight.shape[0],
        "inputs": weight.shape[1],
        "q_bits": tree["settings"]["q_bits"],
        "rank": tree["settings"]["rank"],
        "true_bits": tree["bits_per_weight"],
        "error": tree["error"],
        "frobenius": tree["frobenius"],
        "best_round": min(tree["history"], key=lambda h: h["error"])["round"],
    }


def _save_and_reload(
    run: Run,
    experiment: Experiment,
    compressed: Any,
    tokenizer: Any,
    texts: list[TextBlocks],
    bits: float,
) -> dict[str, Any]:
    """Write the model folder, load it as a stranger would, compare logits, evaluate."""
    import torch

    from lplr_q.activation_aware.quantized_layer import set_mode
    from lplr_q.hf import save_compressed
    from workbench.models import load_model

    folder = run.path(f"models/lplr-{bits:g}")
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
        **run.once(f"evaluate/lplr-{bits:g}", compute),
        "folder": folder.relative_to(run.directory).as_posix(),
    }


def _baseline(
    run: Run,
    experiment: Experiment,
    model: Any,
    calibration: Calibration,
    texts: list[TextBlocks],
    bits: float,
    method: str,
) -> dict[str, Any]:
    """RTN or GPTQ with the smallest group whose scales and zero points fit the same budget."""

    def compute() -> dict[str, Any]:
        import copy

        from lplr_q.baselines import gptq, round_to_nearest
        from lplr_q.bits import average, group_bits, group_for_budget
        from lplr_q.linalg.ldl import regularise

        rounded = copy.deepcopy(model)
        width = int(bits)
        spent = []
        for name in run.progress(list(calibration.key_of), f"{method} at {bits:g} bits"):
            linear = rounded.get_submodule(name)
            weight = linear.weight.detach().float().cpu()
            m, n = weight.shape
            group = group_for_budget(n, bits + experiment.overhead, bits=width)
            if method == "rtn":
                result = round_to_nearest(weight, bits=width, group=group)
            else:
                hessian = regularise(
                    calibration.of(name).matrix(), sigma=experiment.sigma_reg, name=name
                )
                result = gptq(weight, hessian, bits=width, group=group)
            linear.weight.data.copy_(result.weight)
            spent.append((group_bits(m, n, bits=width, group=group), m * n))
        return {"nats": _nats(experiment, rounded, texts), "true_bits": average(spent)}

    return run.once(f"evaluate/{method}-{bits:g}", compute)


def _row(
    text: TextBlocks, method: str, bits: float, true_bits: float, nats: Any, base: Any
) -> dict[str, Any]:
    from lplr_q.evaluate import perplexity_columns
    from lplr_q.report import METHOD_NAMES, short_source

    return {
        "text": short_source(text.name),
        "bits": bits,
        "method": METHOD_NAMES[method],
        "true_bits": true_bits,
        **perplexity_columns(text, nats[text.name], base[text.name]),
    }


def _report(
    run: Run,
    experiment: Experiment,
    rows: list[dict[str, Any]],
    layers: list[dict[str, Any]],
    stored: dict[str, Any],
) -> dict:
    """Tables, figures, results."""
    from lplr_q.report import error_figure, headline, perplexity_alt, perplexity_figure

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
        run.table("layers", layers, caption="Every compressed layer; the error is weighted by H.")
        figure, drawn = error_figure(layers)
        run.figure(
            "error_by_layer",
            figure,
            drawn,
            caption=f"Relative activation-aware error, median over blocks; {len(layers)} layers",
            alt="; ".join(f"{r['sublayer']} {r['budget']}: {r['error']:.3f}" for r in drawn),
        )
    summary = headline(rows, min(experiment.bits, key=lambda b: abs(b - 2.5)))
    return run.finish(
        {"rows": rows, "stored": stored},
        title=f"Compressing {experiment.model} to a few bits per weight",
        question="How few bits per weight does the model need, every scale and sign counted?",
        summary=summary,
        headline=_headline(rows),
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
