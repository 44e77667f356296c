"""Compress a whole model and save it so that plain from_pretrained loads it.
[LPLR-LDLQ; QuIP#; GPTQ]

    python -m lplr_q.quantize_save --base-model micro-mistral --target-bpw 2.5
    python -m lplr_q.quantize_save --base-model FOLDER --hessian-save-path HESSIANS \\
        --Q-bits 2 --L-bits 4 --R-bits 4 --rank 256 --iters 20 --model-save-path OUT
    python -m lplr_q.quantize_save --base-model FOLDER --method quip-sharp --devices cuda:0 cuda:1

One sublayer is one unit of work: the same command continues after any interruption and ends with
the same bytes, whatever the number of workers. Layer ranges (--start-layer, --stop-layer) with one
--model-save-path add up. rtn and gptq give a model in its own number format whose weights are
rounded: it loads anywhere, and its bits per weight are what the codes would take when packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lplr_q.activation_aware.dataclasses import DataParameters, LPLRParams, ModelParameters
from workbench.cli import RunField, RunOptions, cli
from workbench.errors import ConfigError
from workbench.run import Run

if TYPE_CHECKING:
    from lplr_q.quantize_model import CompressionSettings

BASELINES = ("rtn", "gptq")
LEAST_RANK = 0.01
"""Of the inputs; the gain of L R goes with (1 - r / 2n)^2."""


@dataclass(frozen=True)
class Parameters(LPLRParams):
    """How one matrix becomes Q + L R, or is rounded in groups for comparison."""

    method: Literal["lplr-ldlq", "lplr", "quip-sharp", "rtn", "gptq"] = "lplr-ldlq"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Q + L R, L R alone, Q alone as QuIP# does it, or group-wise rounding (rtn, gptq)."""
    group: int | None = None
    """Columns per scale of rtn and gptq; None takes the smallest that fits target_bpw."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method in BASELINES and self.group is None and self.target_bpw is None:
            raise ConfigError(f"method={self.method} needs --target-bpw or --group")

    def _check_names(self) -> None:
        if self.method not in BASELINES:
            super()._check_names()


Flat = Annotated[Parameters, tyro.conf.arg(name="")]
PARAMETERS = Parameters(L_bits=4, R_bits=4, rank=16, iters=1, hadamard_transform=True)


@dataclass(frozen=True)
class Experiment:
    """Which model becomes what."""

    base_model: str = "micro-mistral"
    """Built-in name, local folder or hub id."""
    params: Flat = PARAMETERS
    """How each matrix is compressed."""
    allocation: Path | None = None
    """JSON with codebook, bits and rank of every sublayer."""
    hessian_save_path: Path | None = None
    """Folder written by save_hessians; None collects them here."""
    model_save_path: Path | None = None
    """Folder of the result; by default `model` in the run's folder."""
    data: DataParameters = DataParameters(
        devset=("microworld:doc", "stdlib"), devset_size=48, context_length=512, batch_size=8
    )
    """Calibration text when there are no Hessians yet."""
    inputs: Literal["original", "compressed"] = "original"
    """What the Hessians see: the original model, or the compressed blocks before (in turns)."""
    error_propagation: float = 0.0
    """With compressed inputs: share of the earlier blocks' error that weights make up for."""
    include: str = ".*"
    """Regular expression: linear layers of the decoder blocks to compress."""
    exclude: str | None = None
    """Regular expression: those to leave alone."""
    start_layer: int = 0
    """First decoder block."""
    stop_layer: int | None = None
    """Block to stop before; None is the end."""
    devices: tuple[str, ...] = ()
    """Devices that share the work, e.g. cuda:0 cuda:1; none is that of --device."""
    workers: int = 1
    """Processes."""
    keep: bool = False
    """Keep the Hessians that were collected here."""
    rht: Literal["fallback", "strict"] = "fallback"
    """Widths without a Hadamard matrix: take the Hartley transform, or refuse the model."""
    seed: Annotated[int, tyro.conf.arg(aliases=("--random-seed",))] = 42
    """Seed of the signs."""
    run: RunField = RunOptions()

    def __post_init__(self) -> None:
        """Settings that cannot work together."""
        stop = self.stop_layer
        if self.start_layer < 0 or (stop is not None and stop <= self.start_layer):
            raise ConfigError(
                f"start_layer={self.start_layer}, stop_layer={stop}: no block in between"
            )
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers}; use at least 1")
        if not 0 <= self.error_propagation <= 1:
            raise ConfigError(f"error_propagation={self.error_propagation}; use 0 to 1")
        if self.error_propagation and self.inputs != "compressed":
            raise ConfigError("error_propagation needs --inputs compressed")
        if self.inputs == "compressed" and self.hessian_save_path is not None:
            raise ConfigError(
                "--inputs compressed makes its Hessians between the blocks; leave "
                "--hessian-save-path out"
            )
        if self.inputs == "compressed" and (self.workers > 1 or len(self.devices) > 1):
            raise ConfigError("--inputs compressed works block after block; use one worker")
        mode = self.params.quip_args.incoh_mode
        if self.rht == "strict" and mode != "had":
            raise ConfigError(f"--rht strict with --incoh_mode {mode}: that is no Hadamard matrix")


EXPERIMENT = Experiment()  # edit me


def settings_of(e: Experiment) -> CompressionSettings:
    """The settings of `compress_model` that these flags mean."""
    from lplr_q.quantize_model import CompressionSettings

    params = e.params
    chosen = params.to_settings()
    if params.target_bpw is not None and params.has_low_rank:
        chosen["rank"] = None
    return CompressionSettings(
        **chosen,
        method=params.effective_method,
        bits=params.target_bpw,
        rht=params.rotated,
        sigma_reg=params.quip_args.sigma_reg,
        rotation=params.quip_args.incoh_mode,
        ft_rank=params.ft_rank,
        group=params.group,
        seed=e.seed,
    )


def main(experiment: Experiment) -> dict[str, Any]:
    """Hessians where needed, compress, save; returns bits, errors and the folder."""
    with Run.open("lplr_q.quantize_save", experiment) as run:
        return run.results if run.finished else _quantize(run, experiment)


def _quantize(run: Run, e: Experiment) -> dict[str, Any]:
    from lplr_q import native
    from lplr_q.activation_aware.discovery import fused_experts, unfuse_experts
    from lplr_q.calibration import use_token
    from lplr_q.quantize_model import assemble
    from workbench import storage
    from workbench.device import require_device

    for device in e.devices:
        require_device(device)
    use_token(ModelParameters(base_model=e.base_model))
    settings = settings_of(e)
    allocation = None
    if e.allocation is not None:
        run.require_same("allocation", storage.sha256(e.allocation))
        allocation = storage.read_json(e.allocation)
    target = e.model_save_path or run.directory / "model"
    work = run.directory if e.model_save_path is None else target.with_name(target.name + ".work")
    model, tokenizer = run.load_model(e.base_model, dtype=None)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigError(f"{e.base_model} is already quantised; give the original model")
    run.note(native.status(run.device.device))
    unfuse_experts(model)
    left = [name for name, fits in fused_experts(model).items() if not fits]
    if left:
        run.note(f"{len(left)} modules of fused experts stay in 16 bit, e.g. {left[0]}")
    names = chosen_names(model, e)
    if e.params.rotated and e.params.method not in BASELINES:
        require_rotations(model, names, settings.rotation, strict=e.rht == "strict")
    if e.inputs == "compressed":
        records = _in_turns(run, e, model, tokenizer, settings, allocation, work, names)
    else:
        _at_once(run, e, model, tokenizer, settings, allocation, work, names)
        records = assemble(model, work)
    report = _save(e, model, tokenizer, target, records)
    results = _report(run, e, records, report)
    if not e.keep and e.hessian_save_path is None:
        import shutil

        shutil.rmtree(run.directory / "hessians", ignore_errors=True)
    return results


def chosen_names(model: Any, e: Experiment) -> list[str]:
    """Sublayers of the blocks from start_layer to stop_layer.

    Raises:
        ConfigError: there are not so many blocks.
    """
    from lplr_q.activation_aware.hessian import linear_names

    found = linear_names(model, include=e.include, exclude=e.exclude)
    stop = len(found) if e.stop_layer is None else e.stop_layer
    if e.start_layer >= len(found) or stop > len(found):
        raise ConfigError(
            f"start_layer={e.start_layer}, stop_layer={stop}: {e.base_model} has {len(found)} "
            "decoder blocks"
        )
    names = [name for index in range(e.start_layer, stop) for name in found[index]]
    if not names:
        raise ConfigError(f"no linear layer of these blocks matches include={e.include!r}")
    return names


def require_rotations(model: Any, names: list[str], rotation: str, *, strict: bool) -> None:
    """Raise ConfigError naming the first layer one of whose sides cannot be rotated so; ``strict``
    accepts Hadamard matrices only."""
    from lplr_q.activation_aware.discovery import linear_shape
    from lplr_q.linalg.hadamard import require_hadamard, rotation_plan

    for name in names:
        for width in linear_shape(model.get_submodule(name)):
            try:
                rotation_plan(width, rotation)
                if strict:
                    require_hadamard(width, rotation)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None


def _at_once(
    run: Run,
    e: Experiment,
    model: Any,
    tokenizer: Any,
    settings: CompressionSettings,
    allocation: Any,
    work: Path,
    names: list[str],
) -> None:
    """All Hessians from the original model, then all sublayers in any order."""
    from lplr_q.activation_aware.hessian import collect_hessians, load_hessians
    from lplr_q.calibration import calibration_blocks, fingerprint
    from lplr_q.quantize_model import compress_model
    from workbench.models import resolve

    hessians = e.hessian_save_path
    if hessians is None:
        hessians = run.directory / "hessians"
        tokens, counted = calibration_blocks(e.data, tokenizer)
        chosen = {"include": e.include, "exclude": e.exclude}
        calibration = collect_hessians(
            model,
            tokens,
            mask=counted,
            batch_size=e.data.batch_size,
            folder=hessians,
            fingerprint=fingerprint(e.base_model, model, tokens, counted, **chosen),
            progress=lambda items: run.progress(items, "hessians"),
            **chosen,
        )
    else:
        calibration = load_hessians(hessians)
        run.require_same("hessians", calibration.digest())
    for warning in calibration.warnings():
        run.note(warning)
    called = [name for name in names if name in calibration.key_of]
    missing = sorted(set(names) - set(called))
    if missing and e.hessian_save_path is None:
        run.note(f"{len(missing)} layers are never called and stay as they are: {missing[0]}, ...")
        names = called
    kind, place = resolve(e.base_model)
    source = place if kind == "folder" and _same_names(place, names) else model
    devices = e.devices or (str(run.device.device),)
    compress_model(
        source,
        hessians,
        settings,
        work,
        allocation=allocation,
        names=names,
        workers=e.workers,
        devices=devices,
        threads=max(1, run.device.threads // max(e.workers, len(devices))),
        progress=lambda items: run.progress(items, "compress"),
    )


def _same_names(folder: str, names: list[str]) -> bool:
    """Whether the files hold every matrix under its own name (experts may be stored fused)."""
    from lplr_q.weights import FolderWeights
    from workbench.errors import DataError

    weights = FolderWeights.open(folder)
    try:
        return bool([weights.tensor_name(name) for name in names])
    except DataError:
        return False


def _in_turns(
    run: Run,
    e: Experiment,
    model: Any,
    tokenizer: Any,
    settings: CompressionSettings,
    allocation: Any,
    work: Path,
    names: list[str],
) -> dict[str, dict[str, Any]]:
    """Hessians of a block from the compressed blocks before it, then the block."""
    from lplr_q.calibration import calibration_blocks, fingerprint
    from lplr_q.interleaved import compress_in_turns

    tokens, counted = calibration_blocks(e.data, tokenizer)
    chosen = {"include": e.include, "exclude": e.exclude}
    return compress_in_turns(
        model,
        tokens,
        settings,
        work,
        fingerprint=fingerprint(e.base_model, model, tokens, counted, **chosen),
        mask=counted,
        batch_size=e.data.batch_size,
        allocation=allocation,
        names=names,
        alpha=e.error_propagation,
        progress=lambda items: run.progress(items, "compress"),
        **chosen,
    )


def _save(
    e: Experiment, model: Any, tokenizer: Any, target: Path, records: dict[str, Any]
) -> dict[str, Any]:
    """Write the model folder and its report; bits from the files where codes are stored."""
    from lplr_q.bits import average
    from lplr_q.hf import exact_dtype, save_compressed
    from workbench import storage

    counted = average(
        (r["bits_per_weight"], r["settings"]["in_features"] * r["settings"]["out_features"])
        for r in records.values()
    )
    notes = {"model": e.base_model, "method": e.params.effective_method}
    if notes["method"] in BASELINES:
        model.to(exact_dtype(model)).save_pretrained(target)
        tokenizer.save_pretrained(target)
        report = {"bits_per_weight": counted, "packed": False}
    else:
        report = {**save_compressed(model, tokenizer, target, notes=notes), "packed": True}
    plain = {
        name: {k: v for k, v in r.items() if "seconds" not in k and "peak" not in k}
        for name, r in records.items()
    }
    report = {**report, "counted_bits_per_weight": counted}
    storage.write_json(target / "lplr_q_report.json", {**notes, **report, "modules": plain})
    return report


def _report(
    run: Run, e: Experiment, records: dict[str, Any], report: dict[str, Any]
) -> dict[str, Any]:
    rows = [
        {
            "layer": name,
            "outputs": r["settings"]["out_features"],
            "inputs": r["settings"]["in_features"],
            "q_bits": r["settings"].get("q_bits", r["settings"].get("bits")),
            "rank": r["settings"].get("rank", 0),
            "rank_over_inputs": r["settings"].get("rank", 0) / r["settings"]["in_features"],
            "true_bits": r["bits_per_weight"],
            "error": r["error"],
            "frobenius": r["frobenius"],
            "seconds": r["seconds"],
        }
        for name, r in records.items()
    ]
    low = [row for row in rows if 0 < row["rank_over_inputs"] < LEAST_RANK]
    if low:
        run.note(
            f"{len(low)} layers have a rank below {LEAST_RANK:.0%} of their inputs, e.g. "
            f"{low[0]['layer']} with {low[0]['rank']} of {low[0]['inputs']}: L R gains little there"
        )
    run.table("layers", rows, caption="Every compressed layer; the error is weighted by H.")
    worst = max(rows, key=lambda r: r["error"])
    mean = sum(r["error"] for r in rows) / len(rows)
    method = e.params.effective_method
    where = "model" if e.model_save_path is None else str(e.model_save_path)
    return run.finish(
        {
            "folder": where,
            "method": method,
            "layers": len(rows),
            "bits_per_weight": report["bits_per_weight"],
            "counted_bits_per_weight": report["counted_bits_per_weight"],
            "packed": report["packed"],
            "mean_error": mean,
            "worst_error": worst["error"],
            "worst_layer": worst["layer"],
        },
        title=f"{e.base_model} by {method}",
        question="How small does the model get, and what is lost in each layer?",
        summary=f"{len(rows)} layers at {report['bits_per_weight']:.3f} bits per weight, mean "
        f"relative error {mean:.3f}, largest {worst['error']:.3f} in {worst['layer']}.",
    )


if __name__ == "__main__":
    cli(main, EXPERIMENT)
