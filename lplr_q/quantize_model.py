"""Compress every linear layer of a decoder, one sublayer at a time.

Each sublayer is one unit of work: its result depends only on its weight, its Hessian, the settings
and a named random stream, so units can be done in any order, kept, and skipped when they exist.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor, nn

from lplr_q import distributed
from lplr_q.activation_aware.decompose import (
    Decomposition,
    PreparedHessian,
    decompose,
    prepare_hessian,
    quip_sharp,
)
from lplr_q.activation_aware.discovery import linear_weight, unfuse_experts, unfused_names
from lplr_q.activation_aware.hessian import Calibration, load_hessians
from lplr_q.activation_aware.quantized_layer import LPLRQuantizedLinear
from lplr_q.baselines import gptq, round_to_nearest
from lplr_q.bits import group_bits
from lplr_q.hf import require_uncompressed
from lplr_q.linalg.ldl import regularise
from lplr_q.linalg.ldlq import weighted_loss
from lplr_q.linalg.rows import row_chunks, squared_norm
from lplr_q.manifest import (
    MANIFEST,
    agree_on_manifest,
    digest_of,
    read_record,
    read_unit,
    write_unit,
)
from lplr_q.pool import Pool
from lplr_q.settings import (
    DECOMPOSE_FIELDS,
    METHODS,
    CompressionSettings,
    candidates,
    rounding_grid,
    settings_for,
)
from lplr_q.weights import FolderWeights, ModuleWeights, Weights
from workbench import storage
from workbench.errors import DataError
from workbench.seeding import Streams

__all__ = [
    "METHODS",
    "CompressionSettings",
    "Group",
    "Job",
    "assemble",
    "candidates",
    "compress_model",
    "compress_one",
    "compress_sublayer",
    "groups_of",
    "install",
    "peak_bytes",
    "prepare_sublayer",
    "result_tree",
    "settings_for",
]


def prepare_sublayer(
    calibration: Calibration,
    name: str,
    n: int,
    settings: CompressionSettings,
    generator_of: Callable[[str], torch.Generator],
    device: torch.device | str = "cpu",
) -> PreparedHessian:
    """Rotated and factored Hessian of the layer's input; the same for all layers that share it."""
    key = calibration.key_of.get(name)
    if key is None:
        raise DataError(f"no Hessian for {name}; collect Hessians with this layer included")
    try:
        return prepare_hessian(
            calibration.moments[key].matrix().to(device),
            n,
            generator=generator_of(f"signs/in/{key}") if settings.rht else None,
            sigma=settings.sigma_reg,
            compact=True,
            overwrite=True,
            rotation=settings.rotation,
        )
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def compress_sublayer(
    weight: Float[Tensor, "m n"],
    prepared: PreparedHessian,
    name: str,
    settings: CompressionSettings,
    generator_of: Callable[[str], torch.Generator],
    *,
    overwrite: bool = False,
) -> Decomposition:
    """The candidate (q_bits, rank) with the smallest activation-aware error; ``overwrite`` gives
    the memory of ``weight`` away."""
    common = {key: getattr(settings, key) for key in DECOMPOSE_FIELDS}

    def run(q_bits: int, rank: int, *, quick: bool) -> Decomposition:
        own: dict[str, Any] = {"q_bits": q_bits, "overwrite": overwrite and not quick}
        own["generator"] = generator_of(f"signs/out/{name}") if settings.rht else None
        if settings.method == "quip-sharp":
            return quip_sharp(weight, prepared, sweeps=settings.sweeps, **own)
        options = {**common, **own, "rank": rank}
        if quick:
            inner = min(2, settings.inner_iterations)
            options |= {"rounds": 1, "inner_iterations": inner, "sweeps": 0}
        return decompose(weight, prepared, **options)

    pairs = candidates(*weight.shape, settings)
    try:
        if len(pairs) > 1:  # one plain round tells them apart
            errors = [run(*pair, quick=True).error for pair in pairs]
            pairs = [pairs[errors.index(min(errors))]]
        return run(*pairs[0], quick=False)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def result_tree(result: Decomposition, ft_rank: int = 0) -> dict[str, Any]:
    """What a finished unit stores: the layer's tensors, its form and the measured figures."""
    trained = {"ft_rank": min(ft_rank, result.rank)} if ft_rank else {}
    layer = LPLRQuantizedLinear.from_decomposition(result, **trained)
    return {
        "buffers": {key: t.detach().cpu().clone() for key, t in layer.state_dict().items()},
        "settings": layer.settings(),
        "error": result.error,
        "frobenius": result.frobenius,
        "bits_per_weight": layer.stored_bits().per_weight,
        "history": result.history,
    }


def round_sublayer(
    weight: Float[Tensor, "m n"],
    hessian: Float[Tensor, "n n"],
    settings: CompressionSettings,
) -> dict[str, Any]:
    """The unit of rtn and gptq: a dense matrix of rounded weights and what it would take packed.

    See :func:`rounding_grid` for what it is rounded to.
    """
    m, n = weight.shape
    bits, group = rounding_grid(m, n, settings)
    if settings.method == "rtn":
        rounded = round_to_nearest(weight, bits=bits, group=group).weight
    else:
        rounded = gptq(weight, hessian, bits=bits, group=group).weight
    loss = total = square = whole = 0.0
    for rows in row_chunks(m):
        wide = weight[rows].double()
        difference = wide - rounded[rows]
        loss, total = (
            loss + weighted_loss(difference, hessian),
            total + weighted_loss(wide, hessian),
        )
        square, whole = square + squared_norm(difference), whole + squared_norm(wide)
    return {
        "buffers": {"weight": rounded.cpu()},
        "settings": {
            "dense": settings.method,
            "in_features": n,
            "out_features": m,
            "bits": bits,
            "group": group,
        },
        "error": math.sqrt(loss / max(total, 1e-300)),
        "frobenius": math.sqrt(square / max(whole, 1e-300)),
        "bits_per_weight": group_bits(m, n, bits=bits, group=group),
        "history": [],
    }


def install(model: nn.Module, name: str, tree: dict[str, Any]) -> nn.Module:
    """Put a finished unit in the place of the linear layer; its bias is kept.

    Units of rtn and gptq only change the weight of the layer that is there.
    """
    old: Any = model.get_submodule(name)
    weight = linear_weight(old)
    if "dense" in tree["settings"]:
        weight.copy_(tree["buffers"]["weight"])
        return old
    settings = {**tree["settings"], "bias": old.bias is not None}
    layer = LPLRQuantizedLinear.from_settings(settings, dtype=weight.dtype)
    state = dict(tree["buffers"])
    if old.bias is not None:
        state["bias"] = old.bias.detach()
    layer.load_state_dict(state)
    layer.to(weight.device)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
    return layer


# ---------------------------------------------------------------- whole models


@dataclass(frozen=True)
class Group:
    """Sublayers with the same input: the Hessian is factored once for all of them."""

    key: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """All that a process needs to do any group."""

    folder: Path
    settings: CompressionSettings
    allocation: Mapping[str, Any] | None = None

    def compress(
        self, group: Group, weights: Weights, calibration: Calibration, device: str = "cpu"
    ) -> bool:
        """Do what is left of a group; False when another process is at it."""
        lock = FileLock(self.folder / "work" / ".locks" / f"{group.key}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        with lock:
            left = [name for name in group.names if read_record(self.folder, name) is None]
            shared: dict[str, Any] = {}
            for name in left:
                begin = time.monotonic()
                own = settings_for(name, self.settings, self.allocation)
                weight = weights(name).to(device)
                fresh = isinstance(weights, FolderWeights)  # nobody else has this memory
                tree = compress_one(weight, calibration, name, own, shared, overwrite=fresh)
                del weight
                seconds = round(time.monotonic() - begin, 3)
                tree |= {"seconds": seconds, "peak_bytes": peak_bytes(device)}
                write_unit(self.folder, name, tree)
        return True


def compress_one(
    weight: Float[Tensor, "m n"],
    calibration: Calibration,
    name: str,
    settings: CompressionSettings,
    shared: dict[str, Any],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """The unit of one sublayer by any method; ``shared`` keeps what its group has in common,
    ``overwrite`` gives the memory of ``weight`` away."""
    count, width = calibration.extent(name)
    m, n = weight.shape
    if width != n:
        raise DataError(
            f"{name}: {m}x{n} weight with a Hessian of width {width}; they belong to "
            "different models"
        )
    device = weight.device
    if settings.method in ("rtn", "gptq"):
        if "hessian" not in shared:
            matrix = calibration.of(name).matrix().to(device)
            matrix = regularise(matrix, sigma=settings.sigma_reg, name=name, overwrite=True)
            shared["hessian"] = matrix.float()
            del matrix
        return round_sublayer(weight, shared["hessian"], settings)
    generator_of = Streams(settings.seed).torch
    if "prepared" not in shared:
        shared["prepared"] = prepare_sublayer(
            calibration, name, n, settings, generator_of, device=device
        )
    prepared = shared["prepared"]
    result = compress_sublayer(weight, prepared, name, settings, generator_of, overwrite=overwrite)
    return {**result_tree(result, settings.ft_rank), "inputs_seen": count}


def peak_bytes(device: str = "cpu") -> int:
    """Largest memory this process ever had: on the accelerator, or resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def groups_of(calibration: Calibration, names: Iterable[str] | None = None) -> list[Group]:
    """Sublayers by Hessian, in the order of the model."""
    wanted = None if names is None else set(names)
    found: dict[str, list[str]] = {}
    for name, key in calibration.key_of.items():
        if wanted is None or name in wanted:
            found.setdefault(key, []).append(name)
    if wanted is not None and wanted - set(calibration.key_of):
        missing = sorted(wanted - set(calibration.key_of))
        raise DataError(f"no Hessian for {missing[0]}; collect Hessians with this layer included")
    return [Group(key, tuple(members)) for key, members in found.items()]


def compress_model(
    model: nn.Module | Path | str,
    calibration: Calibration | Path | str,
    settings: CompressionSettings,
    folder: Path | str,
    *,
    allocation: Mapping[str, Any] | None = None,
    names: Iterable[str] | None = None,
    workers: int = 1,
    devices: Sequence[str] = ("cpu",),
    threads: int | None = None,
    progress: Callable[[Iterable], Iterator] = iter,
) -> dict[str, dict[str, Any]]:
    """Compress every calibrated sublayer into ``folder/work``; the record of each by name.

    What is there already is kept, so the same call after any crash ends with the same bytes; the
    number of workers changes nothing either (with equal ``threads``). Several processes may work
    on one folder at once. :func:`assemble` puts the units into a model.

    Args:
        model: a module, or a model folder whose weights are then read one matrix at a time.
        calibration: from ``collect_hessians``, or the folder written by ``save_hessians``.
        settings: one for all sublayers; ``allocation`` overrides codebook, bits and rank of each.
        names: only these sublayers.
        workers: processes; with several ``devices`` they take turns in claiming one.
        threads: of torch in every worker; None leaves what is set here.

    Raises:
        ConfigError: the folder holds units of another model, calibration or settings; the model is
            compressed already.
        DataError: a sublayer without Hessian, or of another shape; non-finite numbers.
    """
    if isinstance(model, nn.Module):
        require_uncompressed(model)
    folder = Path(folder)
    weights: ModuleWeights | FolderWeights
    weights = ModuleWeights(model) if isinstance(model, nn.Module) else FolderWeights.open(model)
    stored = None if isinstance(calibration, Calibration) else Path(calibration)
    hessians = calibration if isinstance(calibration, Calibration) else load_hessians(calibration)
    groups = groups_of(hessians, names)
    for group in groups:
        for name in group.names:
            settings_for(name, settings, allocation)  # complain before any work
    (folder / "work" / ".locks").mkdir(parents=True, exist_ok=True)
    agree_on_manifest(
        folder / MANIFEST,
        {
            "weights": weights.digest(),
            "calibration": hessians.digest(),
            "settings": settings.record(),
            "allocation": None if allocation is None else digest_of(allocation),
        },
        what="compressed sublayers",
    )
    job = Job(folder, settings, allocation)
    todo = [g for g in groups if any(read_record(folder, n) is None for n in g.names)]
    pool = Pool(workers, devices, torch.get_num_threads() if threads is None else threads)
    turn = distributed.rank() * len(todo) // distributed.world()  # ranks begin apart
    todo = todo[turn:] + todo[:turn]
    while todo:
        busy = pool.run(job, todo, weights, stored or hessians, progress)
        todo = [g for g in busy if any(read_record(folder, n) is None for n in g.names)]
        if todo:
            time.sleep(1)  # another process is at these; look again until they are done
    storage.sweep_litter(folder / "work")  # of killed processes; nobody writes here any more
    return {name: _record(folder, name) for group in groups for name in group.names}


def _record(folder: Path, name: str) -> dict[str, Any]:
    found = read_record(folder, name)
    if found is None:
        raise DataError(f"{folder}: unit {name} vanished while the model was compressed")
    return found


def assemble(
    model: nn.Module, folder: Path | str, names: Iterable[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Put finished units (all that ``folder/work`` holds, or ``names``) into the model.

    Experts are taken apart where needed. Returns the records by name.
    """
    folder = Path(folder)
    if names is None:
        names = sorted(p.stem for p in (folder / "work").glob("*.json"))
    names = list(names)
    if not names:
        raise DataError(f"{folder / 'work'} holds no compressed sublayer")
    unfuse_experts(model, unfused_names(names))
    records = {}
    for name in names:
        tree = read_unit(folder, name)
        install(model, name, tree)
        records[name] = {key: value for key, value in tree.items() if key != "buffers"}
    return records
