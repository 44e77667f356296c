"""Singular values of every sublayer over the layers, of W itself and of W as its inputs see it.
[CALDERA §2]

    python -m lplr_q.sv_profile --model micro-mistral
    python -m lplr_q.sv_profile --model FOLDER --calibration text.jsonl --rank 256

The spectrum says what rank pays: of a fast decaying one, L R takes much in few components. What
counts is the spectrum of W C with H = C C^T (the error L R leaves is its tail, exactly); it decays
faster than that of W, because the inputs are correlated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lplr_q.layer_study import LayerStudy, load_study
from workbench.cli import cli
from workbench.errors import require_least
from workbench.run import Run

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

FORMS = ("plain", "whitened")


@dataclass(frozen=True)
class Experiment(LayerStudy):
    """Whose spectra, under which inputs."""

    include: str = ".*"
    """Regular expression: linear layers of the decoder blocks to look at."""
    rank: int = 16
    """Components whose energy is reported."""

    def __post_init__(self) -> None:
        """Settings that cannot work."""
        super().__post_init__()
        require_least(self, 1, "rank")


EXPERIMENT = Experiment()  # edit me


# ---------------------------------------------------------------- one matrix


def spectra(
    weight: Float[Tensor, "m n"], hessian: Float[Tensor, "n n"] | None, *, sigma: float = 1e-2
) -> dict[str, Float[Tensor, " k"]]:
    """Singular values of W ("plain") and of W C with H = C C^T ("whitened"), each of norm 1.

    sum_(i > r) s_i^2 of "whitened" is the squared relative error that the best L R of rank r
    leaves.   [CALDERA §4.2]
    """
    import torch

    from lplr_q.linalg.ldl import cholesky, regularise, require_finite

    require_finite("weight", weight)
    found = {"plain": torch.linalg.svdvals(weight.double())}
    if hessian is not None:
        factor = cholesky(regularise(hessian, sigma=sigma))
        found["whitened"] = torch.linalg.svdvals(weight.double() @ factor)
    return {k: v / v.norm().clamp_min(1e-300) for k, v in found.items()}


def effective_rank(values: Float[Tensor, " k"]) -> float:
    """exp of the entropy of p_i = s_i^2 / sum s^2: k when all are equal, 1 when one is all.
    [Roy & Vetterli 2007, with squares]
    """
    import torch

    share = values.square() / values.square().sum().clamp_min(1e-300)
    return float(torch.special.entr(share).sum().exp())


def energy(values: Float[Tensor, " k"], rank: int) -> float:
    """Share of the squared norm in the first ``rank`` singular values."""
    total = values.square().sum().clamp_min(1e-300)
    return float(values[:rank].square().sum() / total)


# ---------------------------------------------------------------- the script


def main(experiment: Experiment) -> dict[str, Any]:
    """Measure every sublayer (one unit each), then average over the layers."""
    with Run.open("lplr_q.sv_profile", experiment) as run:
        if run.finished:
            return run.results
        from lplr_q.weights import ModuleWeights

        model, calibration = load_study(run, experiment, include=experiment.include)
        found: dict[str, dict[str, Tensor]] = {}
        for name in run.progress(list(calibration.key_of), "spectra"):
            weight = ModuleWeights(model)(name)
            hessian = calibration.of(name).matrix()
            found[name] = run.once(
                f"spectrum/{name}",
                lambda w=weight, h=hessian: spectra(w, h, sigma=experiment.sigma_reg),
            )
        return report(run, experiment, found)


def report(run: Run, experiment: Experiment, found: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Tables, figures, results."""
    from lplr_q.activation_aware.weight_compression import layer_index, short_name

    layers = [
        {
            "layer": layer_index(name),
            "sublayer": short_name(name),
            "form": form,
            "components": len(values),
            "energy": energy(values, experiment.rank),
            "effective_rank": effective_rank(values),
            "largest": float(values[0]),
        }
        for name, forms in found.items()
        for form, values in forms.items()
    ]
    curves = curve_rows(found)
    summary = summary_rows(layers)
    run.table(
        "layers",
        layers,
        caption=f"Every matrix; energy is the share of the first {experiment.rank} components.",
    )
    run.table(
        "summary",
        summary,
        caption=f"Mean over layers of the energy of the first {experiment.rank} components and of "
        "the effective rank, with the standard deviation over layers.",
    )
    n = max(row["layers"] for row in curves)
    run.figure(
        "spectra",
        spectrum_figure(curves, experiment.rank),
        curves,
        caption="Singular values of W and of W C (H = C C^T), each spectrum of norm 1; lines are "
        f"means over layers, bands one standard deviation, n = {n} layers; dotted: component "
        f"{experiment.rank}.",
        alt=describe(summary, experiment.rank),
    )
    values = {form: mean(r["energy"] for r in summary if r["form"] == form) for form in FORMS}
    return run.finish(
        {"rank": experiment.rank, "energy": values, "sublayers": summary},
        title=f"Spectra of {experiment.model}",
        question="How much of each matrix do a few components carry?",
        summary=f"The first {experiment.rank} components carry {values['plain']:.1%} of the energy "
        f"of W and {values['whitened']:.1%} of that of W C, on average over the sublayers.",
        headline={
            f"energy of W C in {experiment.rank} components": values["whitened"],
            f"energy of W in {experiment.rank} components": values["plain"],
        },
    )


def mean(values: Any) -> float:
    """Arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


def curve_rows(found: dict[str, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over layers of every singular value of each sublayer."""
    import torch

    from lplr_q.activation_aware.weight_compression import short_name

    groups: dict[tuple[str, str], list[Tensor]] = {}
    for name, forms in found.items():
        for form, values in forms.items():
            groups.setdefault((short_name(name), form), []).append(values)
    rows = []
    for (sublayer, form), members in groups.items():
        length = min(len(v) for v in members)  # layers may differ in width
        stack = torch.stack([v[:length] for v in members])
        deviation = stack.std(0, correction=0)
        for i in range(length):
            middle, spread = float(stack[:, i].mean()), float(deviation[i])
            rows.append(
                {
                    "sublayer": sublayer,
                    "form": form,
                    "component": i + 1,
                    "mean": middle,
                    "std": spread,
                    "low": max(middle - spread, float(stack[:, i].min())),
                    "high": middle + spread,
                    "layers": len(members),
                }
            )
    return rows


def summary_rows(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Energy and effective rank per sublayer and form: mean and standard deviation over layers."""
    rows = []
    for sublayer in dict.fromkeys(r["sublayer"] for r in layers):
        for form in FORMS:
            members = [r for r in layers if r["sublayer"] == sublayer and r["form"] == form]
            if not members:
                continue
            row: dict[str, Any] = {"sublayer": sublayer, "form": form, "layers": len(members)}
            for column in ("energy", "effective_rank"):
                values = [r[column] for r in members]
                middle = mean(values)
                row[column] = middle
                row[f"{column}_std"] = mean((v - middle) ** 2 for v in values) ** 0.5
            rows.append(row)
    return rows


SMALLEST = 1e-3
"""Singular values below are not drawn: the last one of a matrix may be zero."""


def spectrum_figure(rows: list[dict[str, Any]], rank: int) -> Any:
    """One panel per sublayer, log y: plain and whitened with their spread over layers."""
    from lplr_q.error_figures import sublayer_panels
    from workbench.plots import INK

    drawn: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["mean"] > SMALLEST:
            shown = {**row, "low": max(row["low"], SMALLEST)}
            drawn.setdefault(row["sublayer"], []).append(shown)
    figure, panels = sublayer_panels(
        drawn,
        height=2.6,
        x="component",
        y="mean",
        low="low",
        high="high",
        series="form",
        xlabel="component",
        ylabel="singular value (log)",
    )
    for panel in panels:
        panel.axvline(rank, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    return figure


def describe(rows: list[dict[str, Any]], rank: int) -> str:
    """The figure in words."""
    parts = [
        f"{r['sublayer']} {r['form']}: {r['energy']:.1%} in {rank} components, effective rank "
        f"{r['effective_rank']:.0f}"
        for r in rows
    ]
    return "Spectra by sublayer. " + "; ".join(parts)


if __name__ == "__main__":
    cli(main, EXPERIMENT)
