"""Second moments of layer inputs: sums, storage, and the set of them that calibrates a model.

    H = X X^T / N,   kept as mean mu and centred part: H = Hc + mu mu^T       [CALDERA §5; GPTQ §3]

One file per layer input holds the lower triangle of Hc row by row, mu and the number of tokens:

    hessians/fingerprint.json            what they were made from
    hessians/003.mlp.up_proj.safetensors   block 3, the input of up_proj (and of all that share it)
    hessians/003.json                    written last: which sublayer uses which, SHA-256 of each
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lplr_q import distributed
from lplr_q.manifest import agree_on_manifest, digest_of
from workbench import storage
from workbench.errors import DataError

ROWS_AT_ONCE = 4096
DOUBLE_UP_TO = 1024
"""Wider inputs are multiplied in float32 on the CPU too (twice as fast)."""

COMMAND = "python -m lplr_q.save_hessians --base-model MODEL"


@dataclass(frozen=True)
class SecondMoment:
    """Mean, centred second moment (float32) and number of tokens of one layer input."""

    mean: Float[Tensor, " n"]
    centred: Float[Tensor, "n n"]
    count: int

    def matrix(self) -> Float[Tensor, "n n"]:
        """H = Hc + mu mu^T in float64."""
        mean = self.mean.double()
        return self.centred.to(torch.float64, copy=True).addr_(mean, mean)

    def to_tree(self) -> dict[str, Any]:
        """For storage: the lower triangle of Hc row by row, mu, and the count."""
        n = len(self.mean)
        rows, columns = torch.tril_indices(n, n)
        return {"flat": self.centred[rows, columns], "mean": self.mean, "count": self.count}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], *, name: str = "Hessian") -> SecondMoment:
        """Inverse of :meth:`to_tree`.

        Raises:
            DataError: entries missing, or a triangle whose length does not fit the mean.
        """
        missing = {"flat", "mean", "count"} - set(tree)
        if missing:
            raise DataError(f"{name}: {', '.join(sorted(missing))} missing; collect it again")
        n = len(tree["mean"])
        if tree["flat"].numel() != n * (n + 1) // 2:
            raise DataError(
                f"{name}: {tree['flat'].numel()} entries, {n * (n + 1) // 2} expected for width {n}"
            )
        centred, first = torch.empty(n, n), 0
        for i in range(n):
            centred[i, : i + 1] = centred[: i + 1, i] = tree["flat"][first : first + i + 1]
            first += i + 1
        return cls(tree["mean"].float(), centred, int(tree["count"]))


class SecondMomentAccumulator:
    """Running sums of (x - c)^T (x - c), x - c and the token count, in float64.

    c is the mean of the first rows: products may then be taken in float32 over at most 4 096 rows
    without a large mean drowning the rest. ``single`` None takes float64 products on the CPU up to
    a width of 1 024, float32 elsewhere.
    """

    def __init__(self, n: int, *, single: bool | None = None) -> None:
        self.sum_squares = torch.zeros(n, n, dtype=torch.float64)
        self.sum = torch.zeros(n, dtype=torch.float64)
        self.shift = torch.zeros(n, dtype=torch.float64)
        self.count = 0
        self.single = single

    def add(self, x: Float[Tensor, "*batch n"]) -> None:
        """Add every vector along the last axis.

        Raises:
            DataError: a value that is not finite.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        finite = torch.isfinite(rows)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise DataError(f"{bad} non-finite inputs after {self.count} tokens")
        if not len(rows):
            return
        single = self.single
        if single is None:
            wide = len(self.sum) > DOUBLE_UP_TO and rows.dtype != torch.float64
            single = rows.device.type != "cpu" or wide
        if not self.count and single:
            self.shift = rows[:ROWS_AT_ONCE].float().mean(0).double().cpu()
        shift = self.shift.to(rows.device, torch.float32 if single else torch.float64)
        for chunk in rows.split(ROWS_AT_ONCE):
            centred = chunk.to(shift.dtype) - shift
            self.sum_squares += (centred.T @ centred).to(self.sum_squares)
            self.sum += centred.sum(0, dtype=torch.float64).to(self.sum.device)
        self.count += rows.shape[0]

    def _move_to(self, shift: Float[Tensor, " n"]) -> None:
        """The same sums about another c:  S' = S + s d^T + d s^T + N d d^T,  d = c - c'."""
        d = self.shift - shift
        if bool((d != 0).any()):
            cross = self.sum[:, None] * d[None, :]
            self.sum_squares += cross + cross.T + self.count * d[:, None] * d[None, :]
            self.sum += self.count * d
        self.shift = shift.clone()

    def merge(self, other: SecondMomentAccumulator) -> None:
        """Add another shard's sums; exact to float64. ``other`` is left about this one's c."""
        if other.sum.shape != self.sum.shape:
            raise DataError(f"widths {len(self.sum)} and {len(other.sum)} cannot be merged")
        if not self.count:
            self._move_to(other.shift)
        other._move_to(self.shift)
        self.sum_squares += other.sum_squares
        self.sum += other.sum
        self.count += other.count

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """The sums over all processes under torchrun, on every one of them."""
        if distributed.world() == 1:
            return
        self._move_to(torch.zeros_like(self.shift))
        for name in ("sum_squares", "sum"):
            total = distributed.all_reduce_sum(getattr(self, name).to(device))
            setattr(self, name, total.cpu())
        count = torch.tensor([self.count], dtype=torch.int64, device=device)
        self.count = int(distributed.all_reduce_sum(count))

    def to_tree(self) -> dict[str, Any]:
        """The sums so far, to be continued later."""
        return {
            "sum_squares": self.sum_squares,
            "sum": self.sum,
            "shift": self.shift,
            "count": self.count,
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> SecondMomentAccumulator:
        """Inverse of :meth:`to_tree`."""
        sums = cls(len(tree["sum"]))
        for name in ("sum_squares", "sum", "shift"):
            setattr(sums, name, tree[name].double().clone())
        sums.count = int(tree["count"])
        return sums

    def finish(self) -> SecondMoment:
        """The second moment seen so far.

        Raises:
            DataError: no token was seen.
        """
        if not self.count:
            raise DataError("no calibration token reached this layer; use more or other text")
        mean = self.sum / self.count
        squares = (self.sum_squares + self.sum_squares.T) / (2 * self.count)
        centred = squares - mean[:, None] * mean[None, :]
        return SecondMoment((mean + self.shift).float(), centred.float(), self.count)


@dataclass(frozen=True)
class Calibration:
    """Second moments by key, and which key every linear layer uses."""

    moments: Mapping[str, SecondMoment]
    key_of: dict[str, str]

    def of(self, name: str) -> SecondMoment:
        """The second moment of the input of the linear layer ``name``.

        Raises:
            DataError: it was not calibrated.
        """
        if name not in self.key_of:
            raise DataError(f"no Hessian for {name}; collect Hessians with this layer included")
        return self.moments[self.key_of[name]]

    def extent(self, name: str) -> tuple[int, int]:
        """(tokens, width) of what :meth:`of` returns, from the record where there is one.

        Raises:
            DataError: it was not calibrated.
        """
        if isinstance(self.moments, StoredMoments) and name in self.key_of:
            entry = self.moments.entries[self.key_of[name]]
            if {"count", "width"} <= set(entry):
                return int(entry["count"]), int(entry["width"])
        moment = self.of(name)
        return moment.count, len(moment.mean)

    def digest(self) -> str:
        """SHA-256 of everything in it."""
        if isinstance(self.moments, StoredMoments):
            files = {key: entry["sha256"] for key, entry in self.moments.entries.items()}
        else:
            files = {key: _digest(moment) for key, moment in self.moments.items()}
        return digest_of({"key_of": self.key_of, "files": files})

    def warnings(self) -> list[str]:
        """One line for each Hessian that saw fewer tokens than it is wide."""
        if isinstance(self.moments, StoredMoments):
            seen = {k: (e["count"], e["width"]) for k, e in self.moments.entries.items()}
        else:
            seen = {k: (m.count, len(m.mean)) for k, m in self.moments.items()}
        return [
            f"{key}: {count} tokens for width {width}; the Hessian is rank deficient and held up "
            "by --sigma-reg only"
            for key, (count, width) in seen.items()
            if count < width
        ]

    def to_tree(self) -> dict[str, Any]:
        """For storage."""
        moments = {key: moment.to_tree() for key, moment in self.moments.items()}
        return {"moments": moments, "key_of": dict(self.key_of)}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Calibration:
        """Inverse of :meth:`to_tree`."""
        moments = {
            key: SecondMoment.from_tree(moment, name=key) for key, moment in tree["moments"].items()
        }
        return cls(moments, dict(tree["key_of"]))


def _digest(moment: SecondMoment) -> str:
    digest = hashlib.sha256(str(moment.count).encode())
    for tensor in (moment.mean, moment.centred):
        digest.update(memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()


# ---------------------------------------------------------------- files


class StoredMoments(Mapping[str, SecondMoment]):
    """Moments read from their files when asked for; nothing is kept."""

    def __init__(self, folder: Path, entries: dict[str, dict[str, Any]]) -> None:
        self.folder, self.entries = folder, entries

    def __getitem__(self, key: str) -> SecondMoment:
        """The second moment of this key.

        Raises:
            DataError: the file is missing, damaged or not the one that was recorded.
        """
        entry = self.entries[key]
        path = self.folder / entry["file"]
        layer, _, sublayer = key.partition(".")
        what = f"Hessian of layer {layer}, {sublayer}"
        if not path.is_file():
            raise DataError(f"{path}: {what} is missing; make it with: {COMMAND}")
        try:
            tensors = storage.read_safetensors(path)
        except DataError as error:
            raise DataError(
                f"{path}: {what} is damaged ({error}); delete it and make it with: {COMMAND}"
            ) from None
        if storage.sha256(path) != entry["sha256"]:
            raise DataError(
                f"{path}: {what} was altered; delete the folder and make it with: {COMMAND}"
            )
        found = {**tensors, "count": int(tensors["count"]) if "count" in tensors else None}
        found = {name: value for name, value in found.items() if value is not None}
        return SecondMoment.from_tree(found, name=f"{path}: {what}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def moment_file(key: str) -> str:
    """File name of a key ``<block>.<sublayer>``.

    >>> moment_file("3.mlp.up_proj")
    '003.mlp.up_proj.safetensors'
    """
    layer, _, rest = key.partition(".")
    return f"{int(layer):03d}.{rest}.safetensors"


def begin_hessians(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Say what the Hessians in this folder are made from.

    Raises:
        ConfigError: it holds Hessians of another origin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    agree_on_manifest(folder / "fingerprint.json", dict(fingerprint), what="Hessians")


def write_block(folder: Path, layer: int, block: Calibration) -> None:
    """Store the moments of one decoder block; its record last."""
    files = {}
    for key, moment in block.moments.items():
        tree = moment.to_tree()
        count = torch.tensor(tree.pop("count"), dtype=torch.int64)
        path = storage.write_safetensors(folder / moment_file(key), {**tree, "count": count})
        files[key] = {
            "file": path.name,
            "sha256": storage.sha256(path),
            "count": moment.count,
            "width": len(moment.mean),
        }
    record = {"key_of": block.key_of, "files": files}
    storage.write_json(folder / f"{layer:03d}.json", record)


def block_is_stored(folder: Path, layer: int) -> bool:
    """Whether all moments of the block are there, undamaged."""
    record = folder / f"{layer:03d}.json"
    if not record.is_file():
        return False
    try:
        files = storage.read_json(record)["files"].values()
        return all(
            (folder / e["file"]).is_file() and storage.sha256(folder / e["file"]) == e["sha256"]
            for e in files
        )
    except (DataError, KeyError, TypeError, AttributeError):
        return False


def save_hessians(
    calibration: Calibration, folder: Path | str, fingerprint: Mapping[str, Any]
) -> None:
    """Store all moments block by block.

    Raises:
        ConfigError: the folder holds Hessians with another fingerprint.
    """
    folder = Path(folder)
    layers = sorted({int(key.partition(".")[0]) for key in calibration.moments})
    begin_hessians(folder, {**fingerprint, "layers": layers})
    for layer in layers:
        moments = {
            key: calibration.moments[key]
            for key in calibration.moments
            if int(key.partition(".")[0]) == layer
        }
        key_of = {name: key for name, key in calibration.key_of.items() if key in moments}
        write_block(folder, layer, Calibration(moments, key_of))


def load_hessians(folder: Path | str) -> Calibration:
    """The calibration in a folder; each moment is read from its file when it is used.

    Raises:
        DataError: no such folder, or blocks that were never finished; says how to make them.
    """
    folder = Path(folder)
    if not (folder / "fingerprint.json").is_file():
        raise DataError(f"{folder}: no Hessians here; make them with: {COMMAND}")
    fingerprint = storage.read_json(folder / "fingerprint.json")
    layers = fingerprint.get("layers", [])
    key_of: dict[str, str] = {}
    entries: dict[str, dict[str, Any]] = {}
    for layer in layers:
        record = folder / f"{int(layer):03d}.json"
        if not record.is_file():
            raise DataError(
                f"{record}: the Hessians of layer {layer} are missing; the same command that made "
                f"the others makes them: {COMMAND}"
            )
        block = storage.read_json(record)
        key_of |= block["key_of"]
        entries |= block["files"]
    if not entries:
        raise DataError(f"{folder}: no Hessian in it; make them with: {COMMAND}")
    return Calibration(StoredMoments(folder, entries), key_of)
