"""Every way to compress a model, held to the same bits: the rows of all comparisons.

An :class:`Arm` is one method with its codebook and allocation. All arms share the calibration, the
random signs and the units of the run, so a stopped comparison goes on where it was.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lplr_q.activation_aware.decompose import PreparedHessian
from lplr_q.activation_aware.discovery import linear_weight
from lplr_q.activation_aware.hessian import Calibration
from lplr_q.allocate import allocate, build_item, read_allocation
from lplr_q.bits import average, group_for_budget, matched_budget
from lplr_q.linalg.ldl import regularise
from lplr_q.prediction import Choice, Survey, survey
from lplr_q.quantize_model import (
    CompressionSettings,
    compress_sublayer,
    install,
    prepare_sublayer,
    result_tree,
    round_sublayer,
    settings_for,
)
from lplr_q.sensitivity import output_sensitivity
from workbench.run import Run

ROUNDING = ("rtn", "gptq")


@dataclass(frozen=True)
class Arm:
    """One way to compress."""

    label: str
    """Prefix of its units and folders."""
    title: str
    """Name in tables and figures."""
    method: str
    """rtn, gptq, quip-sharp or lplr-ldlq."""
    codebook: str = "e8p"
    """Codebook of Q."""
    allocation: str = "uniform"
    """uniform, auto, or an allocation file."""


@dataclass(frozen=True)
class Compressed:
    """The model of one arm at one budget."""

    model: nn.Module
    layers: list[dict[str, Any]]
    true_bits: float
    curves: list[dict[str, Any]]
    """The error after every sub-step of every sublayer."""


@dataclass
class Contest:
    """One model and its calibration, compressed in many ways to the same budgets."""

    run: Run
    model: nn.Module
    calibration: Calibration
    settings: CompressionSettings
    """What all arms of Q + L R share; budget, codebook and method come from the arm."""
    overhead: float
    """Bits per weight that scales and signs may add to a budget, the same for every arm."""
    sensitivity: str = "fisher"
    """fisher, kl or uniform."""
    tokens: Tensor | None = None
    """Calibration tokens for the sensitivities, and which of them are no padding."""
    mask: Tensor | None = None
    batch_size: int = 8
    probes: int = 3
    """Real decompositions per sublayer that correct the predicted errors."""
    _prepared: tuple[str, Any] = ("", None)

    # ------------------------------------------------------------ what arms share

    @property
    def names(self) -> list[str]:
        """Sublayers in the order of the model."""
        return list(self.calibration.key_of)

    def weight(self, name: str) -> Tensor:
        """The original matrix, float32, where the computation is."""
        own = linear_weight(self.model.get_submodule(name))
        return own.detach().float().to(self.run.device.device)

    def prepared(self, name: str) -> PreparedHessian:
        """Rotated, factored Hessian; the last one is kept for the sublayers that share it."""
        key = self.calibration.key_of[name]
        if self._prepared[0] != key:
            weight = linear_weight(self.model.get_submodule(name))
            found = prepare_sublayer(
                self.calibration,
                name,
                weight.shape[1],
                self.settings,
                self.run.streams.torch,
                device=self.run.device.device,
            )
            self._prepared = (key, found)
        return self._prepared[1]

    def budget(self, shape: Sequence[int], bits: float) -> float:
        """What group-wise rounding spends on such a matrix at this budget."""
        return matched_budget(shape[0], shape[1], bits, self.overhead)

    # ------------------------------------------------------------ arms

    def compress(self, arm: Arm, bits: float) -> Compressed:
        """A copy of the model with every sublayer replaced by the arm's form."""
        if arm.method in ROUNDING:
            return self._rounded(arm, bits)
        chosen = self.allocation(arm, bits)
        compressed = copy.deepcopy(self.model)
        layers, curves = [], []
        for name in self.run.progress(self.names, f"compress to {bits:g} bits, {arm.title}"):
            own = self._own_settings(arm, bits, name, chosen)
            tree = self.run.once(f"{arm.label}-{bits:g}/{name}", self._unit(name, own))
            install(compressed, name, tree)
            layers.append(self._layer_row(arm, bits, name, tree, chosen))
            curves += [
                {"bits": bits, "method": arm.title, "layer": name, "step": step, **entry}
                for step, entry in enumerate(tree["history"], 1)
            ]
        return _compressed(compressed, layers, curves)

    def _own_settings(
        self, arm: Arm, bits: float, name: str, chosen: dict[str, Any] | None
    ) -> CompressionSettings:
        common = dataclasses.replace(self.settings, method=arm.method, codebook=arm.codebook)
        if arm.method == "quip-sharp":
            return dataclasses.replace(common, bits=None, q_bits=int(bits), rank=0, sweeps=2)
        if chosen is not None:
            return settings_for(name, common, chosen)
        shape = linear_weight(self.model.get_submodule(name)).shape
        return dataclasses.replace(common, bits=self.budget(shape, bits))

    def _unit(self, name: str, settings: CompressionSettings) -> Callable[[], dict[str, Any]]:
        def compute() -> dict[str, Any]:
            begin = time.monotonic()
            weight, prepared = self.weight(name), self.prepared(name)
            result = compress_sublayer(weight, prepared, name, settings, self.run.streams.torch)
            tree = result_tree(result)
            return {**tree, "seconds": round(time.monotonic() - begin, 3)}

        return compute

    def _rounded(self, arm: Arm, bits: float) -> Compressed:
        """RTN or GPTQ with the smallest group whose scales and zero points fit the budget."""
        rounded = copy.deepcopy(self.model)
        layers = []
        hessian: tuple[str, Any] = ("", None)
        for name in self.run.progress(self.names, f"{arm.method} at {bits:g} bits"):
            key = self.calibration.key_of[name]
            if hessian[0] != key:
                matrix = self.calibration.of(name).matrix().to(self.run.device.device)
                hessian = (key, regularise(matrix, sigma=self.settings.sigma_reg, name=name))
            begin = time.monotonic()
            weight = self.weight(name)
            group = group_for_budget(weight.shape[1], bits + self.overhead, bits=int(bits))
            own = dataclasses.replace(
                self.settings, method=arm.method, bits=None, q_bits=int(bits), group=group
            )
            tree = round_sublayer(weight, hessian[1], own)
            tree["seconds"] = round(time.monotonic() - begin, 3)
            install(rounded, name, tree)
            layers.append(self._layer_row(arm, bits, name, tree, None))
        return _compressed(rounded, layers)

    def _layer_row(
        self, arm: Arm, bits: float, name: str, tree: dict[str, Any], chosen: Any
    ) -> dict[str, Any]:
        form = tree["settings"]
        foretold = (chosen or {}).get("predicted", {}).get(name, {})
        best = min(tree["history"], key=lambda h: h["error"], default={"round": 1})
        return {
            "bits": bits,
            "method": arm.title,
            "layer": name,
            "kind": name.rpartition(".")[2],
            "outputs": form["out_features"],
            "inputs": form["in_features"],
            "codebook": form.get("codebook", ""),
            "q_bits": form.get("q_bits", form.get("bits")),
            "rank": form.get("rank", 0),
            "true_bits": tree["bits_per_weight"],
            "error": tree["error"],
            "predicted": foretold.get("error"),
            "frobenius": tree["frobenius"],
            "best_round": best["round"],
            "seconds": tree["seconds"],
        }

    # ------------------------------------------------------------ allocation

    def allocation(self, arm: Arm, bits: float) -> dict[str, Any] | None:
        """What every sublayer gets: None (alike), a file, or the solution for this budget."""
        if arm.allocation == "uniform" or arm.method != "lplr-ldlq":
            return None
        if arm.allocation != "auto":
            return {"modules": read_allocation(arm.allocation)}
        found = self.run.once(
            f"allocation/{arm.label}-{bits:g}", lambda: self._allocate(arm, bits).to_tree()
        )
        self.run.save_json(f"allocation-{arm.label}-{bits:g}.json", found)
        return found

    def _allocate(self, arm: Arm, bits: float) -> Any:
        known = {name: self._survey(arm, name) for name in self.names}
        target = average(
            (self.budget(s.spectrum.shape, bits), s.spectrum.shape[0] * s.spectrum.shape[1])
            for s in known.values()
        )
        items = [
            build_item(
                name,
                found,
                target=target,
                sensitivity=self.sensitivities.get(name),
                codebooks=(arm.codebook,),
                factor_bits=self.settings.factor_bits,
            )
            for name, found in known.items()
        ]
        return allocate(items, target)

    def _survey(self, arm: Arm, name: str) -> Survey:
        """Spectrum and probes of one sublayer, measured once per codebook."""

        def compute() -> dict[str, Any]:
            weight, prepared = self.weight(name), self.prepared(name)

            def measure(choice: Choice) -> float:
                settings = dataclasses.replace(
                    self.settings,
                    method="lplr-ldlq",
                    bits=None,
                    rounds=1,
                    **choice.entry(),
                )
                return compress_sublayer(
                    weight, prepared, name, settings, self.run.streams.torch
                ).error

            found = survey(
                weight,
                prepared,
                measure,
                codebooks=(arm.codebook,),
                factor_bits=self.settings.factor_bits,
                limit=self.probes,
            )
            return found.to_tree()

        return Survey.from_tree(self.run.once(f"survey-{arm.codebook}/{name}", compute))

    @cached_property
    def sensitivities(self) -> dict[str, float]:
        """Nats per token per unit of tr(E H E^T), H divided by its mean diagonal."""
        if self.sensitivity == "uniform":
            return {}
        if self.tokens is None:
            raise ValueError("tokens are needed for sensitivities")
        tokens, mask = self.tokens, self.mask

        def compute() -> dict[str, float]:
            return output_sensitivity(
                self.model,
                tokens,
                self.names,
                kind=self.sensitivity,
                mask=mask,
                batch_size=self.batch_size,
                generator=self.run.streams.torch("sensitivity"),
                progress=lambda items: self.run.progress(items, "sensitivities"),
            )

        raw = self.run.once(f"sensitivity-{self.sensitivity}", compute)
        means = {
            key: float(moment.matrix().diagonal().mean())
            for key, moment in self.calibration.moments.items()
        }
        return {name: s * means[self.calibration.key_of[name]] for name, s in raw.items()}


def _compressed(
    model: nn.Module, layers: list[dict[str, Any]], curves: list[dict[str, Any]] | None = None
) -> Compressed:
    spent = [(row["true_bits"], row["outputs"] * row["inputs"]) for row in layers]
    return Compressed(model, layers, average(spent), curves or [])
