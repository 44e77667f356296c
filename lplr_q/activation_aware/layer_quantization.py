"""One decoder block: its sublayers are decomposed one by one, looked at, and put into layers.
[CALDERA, README of the published code]

    quantizer = compressor.get_layer_quantizer(3)
    quantizer.compress_sublayer(SubLayer.QUERY)
    quantizer.plot_errors().savefig("errors.png")
    linear = quantizer.get_quantized_linear_layer(SubLayer.QUERY, ft_rank=16)

Sublayers with the same input share one prepared Hessian. Every result depends on the weight, the
Hessian, the parameters and a named random stream alone, never on the order of the calls.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lplr_q.activation_aware.dataclasses import LPLRParams, SubLayerInfo
from lplr_q.activation_aware.decompose import (
    Decomposition,
    PreparedHessian,
    decompose,
    prepare_hessian,
    quip_sharp,
)
from lplr_q.activation_aware.moments import SecondMoment
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear
from workbench import storage
from workbench.errors import ConfigError, DataError, unknown_name
from workbench.seeding import Streams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIELDS = ("per_iter_errors", "layer_idx", "sublayer", "datetime", "timestamp", "params")
"""What every file of errors has, under the published names."""


class ActivationAwareLayerQuant:
    """Decompositions of the linear layers of one decoder block.

    ``weight_of`` and ``moment_of`` are asked by full name when a sublayer is compressed, so that
    nothing but the results is held.
    """

    def __init__(
        self,
        layer_idx: int,
        sublayers: Sequence[SubLayerInfo],
        params: LPLRParams,
        *,
        weight_of: Callable[[str], Tensor],
        moment_of: Callable[[str], SecondMoment],
        bias_of: Callable[[str], Tensor | None] = lambda _name: None,
        device: torch.device | str | None = None,
        label: str | None = None,
        seed: int = 0,
    ) -> None:
        self.layer_idx = layer_idx
        self.params = params
        self.label = label or f"layer {layer_idx}"
        self.device = torch.device(device or "cpu")
        self._infos = {info.sublayer: info for info in sublayers}
        self._weight_of, self._moment_of, self._bias_of = weight_of, moment_of, bias_of
        self._streams = Streams(seed)
        self._prepared: tuple[str, PreparedHessian] | None = None

    # ------------------------------------------------------------ which sublayers

    @property
    def sublayers(self) -> list[str]:
        """Names of the sublayers inside the block."""
        return list(self._infos)

    def info(self, sublayer: Enum | str) -> SubLayerInfo:
        """What is known of a sublayer, by `SubLayer` member, name inside the block or last part.

        Raises:
            ConfigError: this block has no such sublayer, or several.
        """
        return self._infos[find_sublayer(sublayer, self._infos)]

    # ------------------------------------------------------------ the work

    def compress_sublayer(self, sublayer: Enum | str) -> Decomposition:
        """Decompose a sublayer under the Hessian of its input; kept until it is cleaned up.

        Raises:
            DataError: Hessian or weight cannot be used; the message names layer and sublayer.
        """
        info = self.info(sublayer)
        weight = self._weight_of(info.name).detach().float().to(self.device)
        where = f"layer {self.layer_idx}, {info.sublayer}"
        if tuple(weight.shape) != info.shape:
            raise DataError(f"{where}: weight of shape {tuple(weight.shape)}, not {info.shape}")
        try:
            prepared = self._prepare(info)
            result = self._decompose(weight, prepared, info)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{where}: {error}") from None
        self._infos[info.sublayer] = replace(info, decomposition=result)
        return result

    def compress(self, progress: Callable[[Iterable], Iterable] = iter) -> list[SubLayerInfo]:
        """Decompose every sublayer of the block that has no result yet."""
        for name in progress(self.sublayers):
            if self._infos[name].decomposition is None:
                self.compress_sublayer(name)
        return list(self._infos.values())

    def _prepare(self, info: SubLayerInfo) -> PreparedHessian:
        if self._prepared is None or self._prepared[0] != info.key:
            self._prepared = None  # at most one is held
            rotated = self.params.rotated
            found = prepare_hessian(
                self._moment_of(info.name).matrix().to(self.device),
                info.shape[1],
                generator=self._streams.torch(f"signs/in/{info.key}") if rotated else None,
                sigma=self.params.quip_args.sigma_reg,
                rotation=self.params.quip_args.incoh_mode,
            )
            self._prepared = (info.key, found)
        return self._prepared[1]

    def _decompose(
        self, weight: Tensor, prepared: PreparedHessian, info: SubLayerInfo
    ) -> Decomposition:
        generator = self._streams.torch(f"signs/out/{info.name}")
        return decompose_with(self.params, weight, prepared, generator)

    def get_quantized_linear_layer(
        self, sublayer: Enum | str, ft_rank: int | None = None
    ) -> LPLRQuantizedLinear:
        """The layer that computes with the codes; ``ft_rank`` components stay 16-bit parameters.

        By default as many as the parameters say. A bias of the original layer is kept.

        Raises:
            ConfigError: the sublayer was not compressed, or has fewer components.
        """
        info = self.info(sublayer)
        result = self._result(info)
        tuned = self.params.ft_rank if ft_rank is None else ft_rank
        if not 0 <= tuned <= result.rank:
            raise ConfigError(
                f"ft_rank={tuned}, but layer {self.layer_idx}, {info.sublayer} has "
                f"{result.rank} components"
            )
        return LPLRQuantizedLinear.from_decomposition(
            result, self._bias_of(info.name), ft_rank=tuned
        )

    def clean_up_sublayer(self, sublayer: Enum | str) -> None:
        """Forget the result of a sublayer, and the Hessian once no sublayer here waits for it."""
        info = self.info(sublayer)
        self._infos[info.sublayer] = replace(info, decomposition=None)
        waiting = any(
            other.key == info.key and other.decomposition is None
            for other in self._infos.values()
            if other.sublayer != info.sublayer
        )
        if self._prepared is not None and self._prepared[0] == info.key and not waiting:
            self._prepared = None

    # ------------------------------------------------------------ errors

    def _result(self, info: SubLayerInfo) -> Decomposition:
        if info.decomposition is None:
            raise ConfigError(
                f"layer {self.layer_idx}, {info.sublayer} has not been compressed; call "
                f"compress_sublayer({info.sublayer!r}) first"
            )
        return info.decomposition

    def min_error(self, sublayer: Enum | str) -> float:
        """e = sqrt( tr(E H E^T) / tr(W H W^T) ) of what is returned: the best iterate, from codes.

        Raises:
            ConfigError: the sublayer was not compressed.
        """
        return self._result(self.info(sublayer)).error

    def errors(self, sublayer: Enum | str) -> dict[str, Any]:
        """The errors of every sub-step of a sublayer, and what made them, as plain values."""
        info = self.info(sublayer)
        result = self._result(info)
        return error_record(
            result.history,
            layer_idx=self.layer_idx,
            sublayer=info.sublayer,
            params=asdict(self.params),
            label=self.label,
            hessian={"key": info.key, "tokens": info.tokens},
            error=result.error,
            frobenius=result.frobenius,
            bits_per_weight=None if result.bits is None else result.bits.per_weight,
        )

    def export_errors_json(self, sublayer: Enum | str | None, savefile: Path | str) -> list[Path]:
        """Write the errors of a sublayer into a file; with None, of all finished ones into a
        folder. ``.json`` is added where it is missing.

        Raises:
            ConfigError: nothing has been compressed.
        """
        path = Path(savefile)
        if sublayer is not None:
            named = path if path.suffix == ".json" else path.with_name(path.name + ".json")
            return [storage.write_json(named, self.errors(sublayer))]
        return [
            storage.write_json(path / f"layer_{self.layer_idx:03d}.{name}.json", self.errors(name))
            for name in self._finished()
        ]

    def plot_errors(
        self,
        sublayer: Enum | str | None = None,
        plot_first_iter: bool = True,
        savefile: Path | str | None = None,
    ) -> Figure:
        """Error after every sub-step, log y: of a sublayer, one line per component; with None, of
        all finished ones, one line each.

        Raises:
            ConfigError: nothing has been compressed.
        """
        if sublayer is not None:
            rows = component_rows(self.errors(sublayer))
            title = f"{self.label}, {self.info(sublayer).sublayer}"
        else:
            rows = [row for name in self._finished() for row in step_rows(self.errors(name), name)]
            title = self.label
        return error_figure(rows, title=title, first=plot_first_iter, savefile=savefile)

    @staticmethod
    def plot_errors_json(
        file: Path | str | Iterable[Path | str],
        plot_first_iter: bool = True,
        savefile: Path | str | None = None,
    ) -> Figure:
        """The same figures from files (or a folder of files) that were exported.

        Raises:
            DataError: no file, or one that holds no errors; names file and field.
        """
        records = [read_errors(path) for path in error_files(file)]
        if len(records) == 1:
            rows = component_rows(records[0])
            title = f"layer {records[0]['layer_idx']}, {records[0]['sublayer']}"
        else:
            title = ""
            rows = [
                row
                for record in records
                for row in step_rows(record, f"{record['layer_idx']} {record['sublayer']}")
            ]
        return error_figure(rows, title=title, first=plot_first_iter, savefile=savefile)

    def _finished(self) -> list[str]:
        done = [name for name, info in self._infos.items() if info.decomposition is not None]
        if not done:
            raise ConfigError(f"layer {self.layer_idx}: nothing has been compressed yet")
        return done


# ---------------------------------------------------------------- one matrix, by its parameters


def decompose_with(
    params: LPLRParams, weight: Tensor, prepared: PreparedHessian, generator: torch.Generator
) -> Decomposition:
    """Decompose a matrix as ``params`` say."""
    if params.effective_method == "quip-sharp":
        return quip_sharp(weight, prepared, q_bits=params.Q_bits, generator=generator)
    settings = params.to_settings(tuple(weight.shape))
    return decompose(weight, prepared, **settings, generator=generator)


def find_sublayer(sublayer: Enum | str, known: Iterable[str]) -> str:
    """The one of ``known`` names that is meant: a whole name, or its last part or parts.

    A `SubLayer` member stands for whichever of its names is there.

    Raises:
        ConfigError: none or several fit.
    """
    names = list(known)
    asked = names_of(sublayer)
    for name in asked:
        if name in names:
            return name
    fitting = [n for n in names if any(n.endswith(f".{a}") for a in asked)]
    if len(fitting) == 1:
        return fitting[0]
    shown = sublayer.name if isinstance(sublayer, Enum) else str(sublayer)
    if fitting:
        raise ConfigError(f"sublayer {shown!r} is one of {', '.join(fitting)}; give more of it")
    raise unknown_name("sublayer", shown, names)


def names_of(sublayer: Enum | str) -> tuple[str, ...]:
    """Names that a sublayer goes by."""
    if not isinstance(sublayer, Enum):
        return (str(sublayer),)
    return (*getattr(sublayer, "suffixes", ()), str(sublayer.value))


# ---------------------------------------------------------------- errors as files and figures


def error_record(
    history: Sequence[Mapping[str, Any]],
    *,
    layer_idx: int,
    sublayer: str,
    params: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """Errors per component and iteration with their origin, in the fields of the published files.

    ``datetime`` is UTC in ISO 8601, ``timestamp`` the same in seconds since 1970.
    """
    now = datetime.datetime.now(datetime.UTC)
    per_component: dict[str, list[float]] = {}
    for step in history:
        per_component.setdefault(step["component"], []).append(step["error"])
    return {
        "per_iter_errors": per_component,
        "layer_idx": layer_idx,
        "sublayer": sublayer,
        "datetime": now.isoformat(timespec="seconds"),
        "timestamp": now.timestamp(),
        "params": dict(params),
        "history": [dict(step) for step in history],
        **more,
    }


def error_files(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    """Files of errors: those named, and all in the folders named.

    Raises:
        DataError: there is none.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    files = []
    for path in map(Path, given):
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{', '.join(map(str, given))}: no file of errors (*.json)")
    return files


def read_errors(file: Path) -> dict[str, Any]:
    """A file that `export_errors_json` wrote.

    Raises:
        DataError: missing, or without a field.
    """
    record = storage.read_json(file)
    missing = [f for f in (*FIELDS, "history") if not isinstance(record, dict) or f not in record]
    if missing:
        raise DataError(f"{file}: no {', '.join(missing)}; expected a file of export_errors_json")
    return record


def step_rows(record: Mapping[str, Any], series: str) -> list[dict[str, Any]]:
    """One row per sub-step: its number, round, component and error."""
    return [
        {
            "series": series,
            "step": number,
            "round": step["round"],
            "component": step["component"],
            "error": step["error"],
        }
        for number, step in enumerate(record["history"], start=1)
    ]


def component_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same with one series per component, by round."""
    return [
        {**row, "series": f"after {row['component']}", "step": row["round"]}
        for row in step_rows(record, "")
    ]


def error_figure(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    first: bool = True,
    savefile: Path | str | None = None,
) -> Figure:
    """Relative activation-aware error by step, one line per series, log y.

    Without ``first`` the first round is left out where there is another one.
    """
    from matplotlib.ticker import MaxNLocator

    from workbench.plots import line_plot, new_figure

    if not first and any(row["round"] > 1 for row in rows):
        rows = [row for row in rows if row["round"] > 1]
    figure, axes = new_figure(6.4, 3.8)
    by_round = all(row["step"] == row["round"] for row in rows)
    line_plot(
        axes,
        rows,
        x="step",
        y="error",
        series="series",
        xlabel="round" if by_round else "sub-step",
        ylabel="relative activation-aware error e (log)",
        title=title,
        log="y",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if savefile is not None:
        figure.savefig(Path(savefile), dpi=200)
    return figure
