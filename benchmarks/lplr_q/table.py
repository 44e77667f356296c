"""Perplexity over 16 bit by method, all held to the same total bits per weight.

    python benchmarks/lplr_q/table.py --model micro-mistral
    python benchmarks/lplr_q/table.py --model micro-mamba2
    python benchmarks/lplr_q/table.py --model FOLDER --calibration own --evaluation own

Every budget is what group-wise rounding spends with codes, scales and zero points; no other method
uses more. `own` is text drawn from the model itself at temperature 1, for models whose training
text is not at hand: calibration and evaluation are different draws. A stopped run goes on where it
was; rows of the same model are replaced in `table.csv` beside this file, and `table.svg` is drawn.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workbench.cli import RunField, RunOptions, cli
from workbench.run import Run

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Experiment:
    """One model, the budgets, and the text it is judged on."""

    model: str = "micro-mistral"
    """Built-in name, local folder or hub id."""
    shown_as: str | None = None
    """Name in the table; None takes the last part of --model."""
    bits: tuple[float, ...] = (2.0, 3.0, 4.0)
    """Nominal budgets."""
    overhead: float = 0.15
    """Bits per weight that scales and signs may add."""
    arms: tuple[str, ...] = ("rtn", "gptq", "quip", "e8p", "tcq", "tcq-auto")
    """Which rows; a codebook with -auto is allocated over the model."""
    sensitivity: Literal["fisher", "kl", "uniform"] = "fisher"
    """What an error counts in the allocation."""
    rounds: int = 1
    sweeps: int = 1
    calibration: tuple[str, ...] = ("microworld:doc", "stdlib")
    """Texts whose activations make the Hessians; own = drawn from the model."""
    evaluation: tuple[str, ...] = ("microworld:doc", "stdlib")
    """Held-out texts; own = drawn from the model."""
    calibration_tokens: int = 12288
    evaluation_tokens: int = 12288
    length: int = 256
    seed: int = 0
    output: Path = HERE / "table.csv"
    """Where the rows go."""
    run: RunField = RunOptions()


EXPERIMENT = Experiment()
GUESSES = {
    "rtn": ("RTN", "rtn", "e8p", "uniform"),
    "gptq": ("GPTQ", "gptq", "e8p", "uniform"),
    "quip": ("QuIP#-style", "quip-sharp", "e8p", "uniform"),
}


def arm_of(key: str) -> Any:
    """The arm of a key of --arms."""
    from lplr_q.contest import Arm

    if key in GUESSES:
        title, method, codebook, allocation = GUESSES[key]
        return Arm(key, title, method, codebook, allocation)
    automatic = key.endswith("-auto")
    codebook = key.removesuffix("-auto")
    title = f"LPLR-LDLQ {codebook.upper()}" + (", allocated" if automatic else "")
    return Arm(f"lplr-{key}", title, "lplr-ldlq", codebook, "auto" if automatic else "uniform")


def own_text(run: Run, model: Any, tokenizer: Any, *, purpose: str, tokens: int, length: int):
    """Rows drawn from the model token by token at temperature 1."""
    import torch

    from lplr_q.evaluate import TextBlocks

    def compute() -> dict[str, Any]:
        generator = run.streams.torch(f"own/{purpose}")
        rows = max(2, tokens // length)
        ids = torch.full((rows, 1), int(tokenizer.bos_token_id))
        cache, given = None, ids
        with torch.inference_mode():
            for _ in range(length - 1):
                out = model(input_ids=given, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                chances = out.logits[:, -1].float().softmax(-1)
                given = torch.multinomial(chances, 1, generator=generator)
                ids = torch.cat([ids, given], 1)
        return {"ids": ids.clone()}

    ids = run.once(f"own-text/{purpose}", compute)["ids"]
    return TextBlocks("own", ids, torch.ones_like(ids, dtype=torch.bool))


def texts_for(run: Run, experiment: Experiment, model: Any, tokenizer: Any, purpose: str) -> list:
    """Calibration or evaluation blocks of every source."""
    from lplr_q.evaluate import load_blocks

    tokens = getattr(experiment, f"{purpose}_tokens")
    split = "train" if purpose == "calibration" else "test"
    found = []
    for source in getattr(experiment, purpose):
        if source == "own":
            found.append(
                own_text(
                    run, model, tokenizer, purpose=purpose, tokens=tokens, length=experiment.length
                )
            )
            continue
        found.append(
            load_blocks(
                tokenizer, source, tokens=tokens, length=experiment.length, split=split,
                seed=experiment.seed,
            )
        )  # fmt: skip
    return found


def main(experiment: Experiment) -> dict:
    """All arms at all budgets; the table and its figure."""
    with Run.open("lplr_q.table", experiment) as run:
        if run.finished:
            return run.results
        import torch

        from lplr_q.activation_aware.hessian import Calibration, collect_hessians
        from lplr_q.activation_aware.quantized_layer import quantised_layers, set_mode
        from lplr_q.contest import Contest
        from lplr_q.evaluate import nats_by_source
        from lplr_q.quantize_model import CompressionSettings

        model, tokenizer = run.load_model(experiment.model, dtype=None)
        calibration = texts_for(run, experiment, model, tokenizer, "calibration")
        texts = texts_for(run, experiment, model, tokenizer, "evaluation")
        tokens = torch.cat([part.tokens for part in calibration])
        mask = torch.cat([part.counted for part in calibration])
        hessians = run.once(
            "hessians",
            lambda: collect_hessians(
                model, tokens, mask=mask, progress=lambda items: run.progress(items, "hessians")
            ).to_tree(),
        )
        contest = Contest(
            run,
            model,
            Calibration.from_tree(hessians),
            CompressionSettings(rounds=experiment.rounds, sweeps=experiment.sweeps),
            experiment.overhead,
            sensitivity=experiment.sensitivity,
            tokens=tokens,
            mask=mask,
        )
        base = run.once("evaluate/16-bit", lambda: nats_by_source(model, texts))
        rows: list[dict[str, Any]] = []
        for bits in experiment.bits:
            by_key: dict[str, Any] = {}
            for key in experiment.arms:
                arm = arm_of(key)

                def compute(arm: Any = arm, bits: float = bits) -> dict[str, Any]:
                    found = contest.compress(arm, bits)
                    if any(True for _ in quantised_layers(found.model)):
                        set_mode(found.model, "cached")
                    nats = nats_by_source(found.model, texts)
                    return {"nats": nats, "true_bits": found.true_bits, "layers": found.layers}

                by_key[key] = run.once(f"evaluate/{arm.label}-{bits:g}", compute)
                for text in texts:
                    rows.append(table_row(experiment, text, bits, key, by_key, base))
                run.log(len(rows), {f"{key}/{bits:g}": rows[-1]["ratio"]})
        return report(run, experiment, rows)


def table_row(
    experiment: Experiment, text: Any, bits: float, key: str, by_key: dict[str, Any], base: Any
) -> dict[str, Any]:
    """Ratios to 16 bit, to GPTQ and to the uniform setting, paired over blocks of text."""
    from lplr_q.evaluate import perplexity_columns
    from lplr_q.report import short_source

    found = by_key[key]
    nats = found["nats"][text.name]
    columns = perplexity_columns(text, nats, base[text.name])
    row = {
        "model": experiment.shown_as or Path(experiment.model).name,
        "text": short_source(text.name),
        "bits": bits,
        "method": arm_of(key).title,
        "true_bits": found["true_bits"],
        **columns,
    }
    for other, column in (("gptq", "to_gptq"), (key.removesuffix("-auto"), "to_uniform")):
        if other == key or other not in by_key:
            row |= {column: None, f"{column}_low": None, f"{column}_high": None}
            continue
        against = perplexity_columns(text, nats, by_key[other]["nats"][text.name])
        row |= {
            column: against["ratio"],
            f"{column}_low": against["ratio_low"],
            f"{column}_high": against["ratio_high"],
        }
    errors = {layer["layer"]: layer["error"] for layer in by_key.get("gptq", {}).get("layers", [])}
    better = [layer["error"] < errors[layer["layer"]] for layer in found["layers"] if errors]
    row["layers_below_gptq"] = sum(better) / len(better) if better and key != "gptq" else None
    row["median_error"] = sorted(layer["error"] for layer in found["layers"])[
        len(found["layers"]) // 2
    ]
    row["compress_seconds"] = round(sum(layer["seconds"] for layer in found["layers"]), 1)
    return row


def report(run: Run, experiment: Experiment, rows: list[dict[str, Any]]) -> dict:
    """The run's own table, and the joint one of all models with its figure."""
    from lplr_q.report import ratio_figure
    from workbench.tables import read_csv, write_csv

    run.table("table", rows, caption="Perplexity over 16 bit at equal total bits.")
    names = {row["model"] for row in rows}
    kept: list[dict[str, Any]] = []
    if experiment.output.is_file():
        kept = [row for row in read_csv(experiment.output) if row["model"] not in names]
    # seconds belong to the machine of the moment: they stay in the run's own table
    rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    write_csv(experiment.output, [*kept, *rows])
    figure = ratio_figure([*kept, *rows])
    figure.savefig(experiment.output.with_suffix(".svg"), bbox_inches="tight")
    run.figure(
        "ratio",
        ratio_figure(rows),
        rows,
        caption="Perplexity over 16 bit; bars are paired 95 % intervals.",
        alt="; ".join(
            f"{r['text']}, {r['method']} at {r['true_bits']:.2f} bits: {r['ratio']:.3g}"
            for r in rows
        ),
    )
    return run.finish({"rows": rows}, title=f"Bits and methods on {experiment.model}")


if __name__ == "__main__":
    cli(main, EXPERIMENT)
