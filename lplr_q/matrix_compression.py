"""Compress pictures, embeddings and weights without activations.   [arXiv 2310.11028 §5]

    python -m lplr_q.matrix_compression
    python -m lplr_q.matrix_compression --task images --image photo.png
    python -m lplr_q.matrix_compression --task layers --model gpt2 --bits 4 8

Every method gets the bits of naive quantisation (`--naive-bits`) times `--ratio`; the rank follows.
Tasks: images (PSNR, pictures side by side), neighbours (recall and accuracy of a nearest-neighbour
vote over compressed embeddings), layers (errors of all linear layers of a model), curve (seconds
and error over ranks).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lplr_q.report import in_bits
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError, DataError, require_least, unknown_name
from workbench.run import Run

if TYPE_CHECKING:
    import torch

TASKS = ("images", "neighbours", "layers", "curve")


@dataclass(frozen=True)
class Experiment:
    """Which matrices, which methods, which budgets."""

    task: Literal["all", "images", "neighbours", "layers", "curve"] = "all"
    """One demonstration, or all of them."""
    methods: tuple[str, ...] = ("naive", "dsvd", "lsvd", "lplr", "iterative", "lplr-q")
    """Of naive, dsvd, lsvd, lplr, iterative, lplr-q; naive is always there for comparison."""
    naive_bits: tuple[int, ...] = (1, 2, 4)
    """Budgets: bits per entry of naive quantisation."""
    bits: tuple[int, ...] = (4,)
    """Bits per entry of L; several are compared by `layers`, the first serves elsewhere."""
    bits_right: int = 0
    """Bits per entry of R; 0 = as L."""
    search: bool = False
    """Choose the bits of L and R per matrix among 2, 3, 4, 6 and 8 by measurement (not in curve);
    five times the work."""
    ratio: float = 1.0
    """Bits of L and R over those of naive quantisation."""
    sketch: str = "gaussian"
    """gaussian, sparse or srht."""
    power_iterations: int = 0
    """Power iterations of the sketch: more work, and closer to the SVD where the singular values
    fall slowly."""
    affine: bool = True
    """Fit a scale and an offset to every result (64 bits; LPLR-Q has scales of its own)."""
    image: Path | None = None
    """PNG file; none means the Shepp-Logan phantom."""
    size: int = 256
    """Pixels per side of the phantom."""
    model: str = "micro-mistral"
    """Model of `layers` and of the hidden states: built-in name, folder or hub id."""
    include: str = ""
    """Regular expression of the layers compressed by `layers`."""
    text: str = "microworld:doc"
    """Text whose hidden states are compressed: built-in, file or data set."""
    stored: int = 2000
    """Stored vectors."""
    queries: int = 1000
    """Vectors that ask for their neighbours."""
    k: int = 10
    """Neighbours asked for, and votes."""
    width: int = 700
    """Rows and columns of the matrix of `curve`."""
    ranks: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Ranks of `curve`."""
    exponent: float = 1.0
    """Singular values of the matrix of `curve`: (1 + i)^-exponent."""
    repeats: int = 2
    """Timings of each point of `curve`; the smallest counts."""
    seed: int = 0
    """Seed of all named streams."""
    state: str = ""
    """Filled in: digest of the picture, so that another one makes a new folder."""
    run: RunField = RunOptions()
    """Where and how."""

    def __post_init__(self) -> None:
        known = ("naive", "dsvd", "lsvd", "lplr", "iterative", "lplr-q")
        for method in self.methods:
            if method not in known:
                raise unknown_name("method", method, known)
        if self.sketch not in ("gaussian", "sparse", "srht"):
            raise unknown_name("sketch", self.sketch, ("gaussian", "sparse", "srht"))
        for name, values, low, high in (
            ("naive_bits", self.naive_bits, 1, 16),
            ("bits", self.bits, 1, 16),
            ("bits_right", (self.bits_right,), 0, 16),
        ):
            if not values or not all(low <= v <= high for v in values):
                raise ConfigError(f"{name}={values}; expected numbers from {low} to {high}")
        require_least(self, 1, "size", "stored", "queries", "k", "width", "repeats")
        if self.search and len(self.bits) > 1:
            raise ConfigError(f"bits={self.bits} with --search; give one width, it is not used")
        if self.power_iterations < 0:
            raise ConfigError(f"power_iterations={self.power_iterations}; expected 0 or more")
        if not self.ratio > 0:
            raise ConfigError(f"ratio={self.ratio}; expected a positive number, e.g. 1")
        if self.k > self.stored:
            raise ConfigError(f"k={self.k} neighbours of stored={self.stored} vectors")
        if not self.ranks or not all(1 <= rank <= self.width for rank in self.ranks):
            raise ConfigError(f"ranks={self.ranks}; expected numbers from 1 to width={self.width}")

    def chosen(self) -> tuple[str, ...]:
        """The methods, naive first."""
        return ("naive", *(m for m in self.methods if m != "naive"))

    def settings(self, bits: int) -> dict[str, Any]:
        """Arguments of the budget for one width of L; widths of 0 stand for measured ones."""
        return {
            "bits": 0 if self.search else bits,
            "bits_right": 0 if self.search else self.bits_right or bits,
            "ratio": self.ratio,
            "sketch": self.sketch,
            "power_iterations": self.power_iterations,
            "affine": self.affine,
            "search": self.search,
        }


EXPERIMENT = Experiment()  # edit me


def main(experiment: Experiment) -> dict[str, Any]:
    """Run the chosen demonstrations; returns their figures."""
    if experiment.image is not None:
        if not experiment.image.is_file():
            raise DataError(f"{experiment.image}: no such picture; give the path of a PNG file")
        digest = hashlib.sha256(experiment.image.read_bytes()).hexdigest()[:8]
        experiment = replace(experiment, state=experiment.state or digest)
    tasks = TASKS if experiment.task == "all" else (experiment.task,)
    functions = {
        "images": run_images, "neighbours": run_neighbours,
        "layers": run_layers, "curve": run_curve,
    }  # fmt: skip
    with Run.open("lplr_q.matrix_compression", experiment) as run:
        if run.finished:
            return run.results
        results: dict[str, Any] = {}
        said = []
        for task in tasks:
            values, sentence = functions[task](run, experiment)
            results |= values
            said.append(sentence)
            run.note(sentence)
        return run.finish(
            results,
            title="Low rank, low precision, no activations",
            question="What do fitted low-rank factors of few bits keep of a matrix?",
            summary=" ".join(said),
        )


def stream_of(run: Run) -> Callable[[str], torch.Generator]:
    """Named random streams of the methods."""
    return run.streams.torch


def run_images(run: Run, experiment: Experiment) -> tuple[dict[str, Any], str]:
    """Pictures at every budget."""
    from lplr_q.data_agnostic import figures, inputs, tasks

    device = run.device.device
    image = (
        inputs.shepp_logan(experiment.size)
        if experiment.image is None
        else inputs.read_image(experiment.image)
    ).to(device)
    settings = experiment.settings(experiment.bits[0])

    def compute(naive_bits: int) -> dict[str, Any]:
        rows, pictures = tasks.image_rows(
            image,
            experiment.chosen(),
            naive_bits=naive_bits,
            settings=settings,
            stream=stream_of(run),
        )
        return {"rows": rows, "pictures": pictures}

    rows, pictures = [], {}
    for naive_bits in run.progress(experiment.naive_bits, "images"):
        found = run.once(f"images-{naive_bits}", lambda b=naive_bits: compute(b))
        rows += found["rows"]
        pictures[naive_bits] = found["pictures"]
    what = "phantom" if experiment.image is None else experiment.image.name
    height, width = image.shape
    run.table("images", rows, caption=f"{what}, {height}x{width} pixels, equal bits per row.")
    words = "; ".join(
        f"{r['method']} at {in_bits(r['naive_bits'])} {r['psnr_db']:.1f} dB" for r in rows
    )
    factors = f"factors of {in_bits(settings['bits'], settings['bits_right'])}"
    if experiment.search:
        factors = "bits of the factors chosen by measurement"
    run.figure(
        "images",
        figures.picture_figure(image, pictures, rows),
        rows,
        caption=f"The {what} at equal size, {factors}; n = {height}x{width} pixels.",
        alt=f"Original and reconstructions side by side. {words}.",
    )
    run.figure(
        "images_psnr",
        figures.image_figure(rows),
        rows,
        caption=f"PSNR of the {what} against stored bits, {factors}; n = {height}x{width} pixels.",
        alt=f"PSNR by bits per pixel. {words}.",
    )
    values = {
        f"psnr_db_{key(row['method'])}_{row['naive_bits']}bit": row["psnr_db"] for row in rows
    }
    first = experiment.naive_bits[0]
    at = [row for row in rows if row["naive_bits"] == first]
    listed = ", ".join(f"{row['method']} {row['psnr_db']:.1f}" for row in at)
    return values, f"PSNR in dB of the {what} at {in_bits(first)} per pixel: {listed}."


def run_neighbours(run: Run, experiment: Experiment) -> tuple[dict[str, Any], str]:
    """Nearest neighbours over compressed vectors, made in code and of a model."""
    from lplr_q.data_agnostic import figures, tasks

    settings = experiment.settings(experiment.bits[0])
    sources = ("mixture", experiment.model)

    def compute(source: str) -> list[dict[str, Any]]:
        data = embeddings(run, experiment, source)
        rows: list[dict[str, Any]] = []
        for naive_bits in experiment.naive_bits:
            found = tasks.neighbour_rows(
                source,
                data,
                experiment.chosen(),
                naive_bits=naive_bits,
                k=experiment.k,
                settings=settings,
                stream=stream_of(run),
            )
            rows += found[1:] if rows else found
        return rows

    rows = []
    for i, source in enumerate(run.progress(sources, "neighbours")):
        rows += run.once(f"neighbours-{i}", lambda s=source: compute(s))
    run.table(
        "neighbours",
        rows,
        caption=f"{experiment.stored} stored vectors, {experiment.queries} queries, "
        f"k = {experiment.k}; intervals of the accuracy: Wilson, 95 %.",
    )
    words = "; ".join(
        f"{r['source']}, {r['method']} at {in_bits(r['naive_bits'])}: recall {r['recall']:.2f}, "
        f"accuracy {r['accuracy']:.2f}"
        for r in rows
    )
    run.figure(
        "neighbours",
        figures.neighbour_figure(rows, experiment.k),
        rows,
        caption=f"Neighbours found among compressed vectors; n = {experiment.queries} queries; "
        "grey: 95 % interval of the exact vote, the others are in the table.",
        alt=f"Recall and accuracy by bits per entry. {words}.",
    )
    values = {
        f"{column}_{i}_{key(r['method'])}_{r['naive_bits']}bit": r[column]
        for i, source in enumerate(sources)
        for r in rows
        if r["source"] == source
        for column in ("recall", "accuracy")
    }
    first = experiment.naive_bits[0]
    at = [r for r in rows if r["source"] == sources[-1] and r["naive_bits"] == first]
    listed = ", ".join(f"{r['method']} {r['recall']:.2f}" for r in at)
    said = f"Recall@{experiment.k} of {sources[-1]} states at {in_bits(first)}: {listed}."
    return values, said


def embeddings(run: Run, experiment: Experiment, source: str) -> Any:
    """Vectors by source: the mixture, or hidden states of a model."""
    from lplr_q.data_agnostic import inputs

    if source == "mixture":
        generator = stream_of(run)("mixture")
        return inputs.mixture_embeddings(experiment.stored, experiment.queries, generator)
    from workbench.text import load_texts

    model, tokenizer = run.load_model(source, device=run.device.device, dtype=run.device.dtype)
    texts = load_texts(experiment.text, n=max(64, experiment.stored // 8), split="test")
    return inputs.hidden_state_embeddings(
        model, tokenizer, texts, experiment.stored, experiment.queries
    )


def run_layers(run: Run, experiment: Experiment) -> tuple[dict[str, Any], str]:
    """Every linear layer of a model."""
    from lplr_q.data_agnostic import figures, inputs, tasks

    model, _ = run.load_model(experiment.model, device=run.device.device, dtype=run.device.dtype)
    weights = inputs.linear_weights(model, experiment.include)

    def compute(name: str) -> list[dict[str, Any]]:
        rows = []
        for bits in experiment.bits:
            for naive_bits in experiment.naive_bits:
                rows += tasks.layer_rows(
                    name,
                    weights[name],
                    experiment.chosen(),
                    naive_bits=naive_bits,
                    settings=experiment.settings(bits),
                    stream=stream_of(run),
                )
        return rows

    rows = []
    for i, name in enumerate(run.progress(list(weights), "layers")):
        rows += run.once(f"layer-{i}", lambda n=name: compute(n))
    summary = tasks.layer_summary(rows)
    run.table("layers", rows, caption="Every linear layer; relative Frobenius errors.")
    run.table(
        "layers_summary",
        summary,
        caption="Means over the matrices; better: matrices whose column sketch is below naive.",
    )
    words = "; ".join(
        f"{r['method']} with {r['bits']}-bit factors at {in_bits(r['naive_bits'])} "
        f"{r['column_sketch_error']:.3f}, naive {r['naive_error']:.3f}"
        for r in summary
    )
    run.figure(
        "layers",
        figures.layer_figure(summary),
        summary,
        caption=f"Weights of {experiment.model} at equal size; n = {len(weights)} matrices.",
        alt=f"Mean relative error by bits per weight. {words}.",
    )
    values = {
        f"layer_error_{key(r['method'])}_{r['bits']}x{r['naive_bits']}bit": r["column_sketch_error"]
        for r in summary
    }
    return values, best_layers(summary, experiment.naive_bits[0], len(weights))


def best_layers(summary: Sequence[Mapping[str, Any]], naive_bits: int, count: int) -> str:
    """One sentence: errors at one budget."""
    at = [r for r in summary if r["naive_bits"] == naive_bits]
    if not at:
        return "No low-rank method was asked for."
    listed = ", ".join(
        r["method"]
        + (f" ({r['bits']}-bit factors)" if r["bits"] else "")
        + f" {r['column_sketch_error']:.3f}"
        for r in at
    )
    return (
        f"Relative error of {count} weight matrices at {in_bits(naive_bits)} per weight: "
        f"naive {at[0]['naive_error']:.3f}, {listed}."
    )


def run_curve(run: Run, experiment: Experiment) -> tuple[dict[str, Any], str]:
    """Seconds and error over ranks on a matrix with a power-law spectrum."""
    from lplr_q.data_agnostic import figures, inputs, tasks

    width, bits = experiment.width, experiment.bits[0]
    generator = stream_of(run)("curve")
    matrix = inputs.power_law_matrix(width, width, experiment.exponent, generator)
    matrix = matrix.to(run.device.device)

    def compute(rank: int) -> list[dict[str, Any]]:
        return tasks.curve_rows(
            matrix,
            experiment.chosen(),
            rank=rank,
            bits=bits,
            bits_right=experiment.bits_right or bits,
            sketch=experiment.sketch,
            power_iterations=experiment.power_iterations,
            repeats=experiment.repeats,
            stream=stream_of(run),
        )

    rows = []
    for rank in run.progress(experiment.ranks, "curve"):
        rows += run.once(f"curve-{rank}", lambda r=rank: compute(r))
    if not rows:
        return {}, "No low-rank method was asked for."
    run.table("curve", rows, caption=f"{width}x{width} matrix, factors of {bits} bits.")
    words = "; ".join(
        f"{r['method']} rank {r['rank']}: {r['seconds']:.3f} s, error {r['relative_error']:.3f}"
        for r in rows
    )
    run.figure(
        "curve",
        figures.curve_figure(rows),
        rows,
        caption=f"One {width}x{width} matrix, singular values (1 + i)^-{experiment.exponent:g}; "
        f"smallest of {experiment.repeats} timings.",
        alt=f"Seconds and relative error by rank. {words}.",
    )
    values = {
        f"curve_{column}_{key(r['method'])}_rank{r['rank']}": r[column]
        for r in rows
        for column in ("relative_error", "seconds")
    }
    at = {r["method"]: r for r in rows if r["rank"] == experiment.ranks[0]}
    listed = ", ".join(f"{name} {r['relative_error']:.3f}" for name, r in at.items())
    return values, f"Error at rank {experiment.ranks[0]} of a {width}x{width} matrix: {listed}."


def key(method: str) -> str:
    """A method's title as part of a result's name."""
    return method.lower().replace(" ", "_").replace("-", "_")


if __name__ == "__main__":
    cli(main, EXPERIMENT)
