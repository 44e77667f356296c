"""Checkpoints of a run: written whole, verified before use, the newest good one found again.

    checkpoints/<phase>/step_00000200/    last two of each phase
    checkpoints/<phase>/best/             the best by a score, where a script keeps one

A checkpoint belongs to one run (its key) and one phase; a damaged, foreign or half-written one is
reported and the one before it is used.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench import seeding, storage
from workbench.errors import CheckpointError, DivergedError

CHECKPOINTS_KEPT = 2


class Checkpoints:
    """The checkpoints in `folder` of the run named by `key`."""

    def __init__(
        self, folder: Path, key: str, note: Callable[[str], None], allow_divergence: bool = False
    ):
        self.folder = folder
        self.key = key
        self.note = note
        self.allow_divergence = allow_divergence
        self._skipped: set[Path] = set()

    # ------------------------------------------------------------ writing

    def save(self, phase: str, step: int, state: Mapping[str, Any], facts: Mapping[str, Any]):
        """Write the state of `step`, then remove all but the last two of this phase.

        Args:
            state: names → objects with `state_dict`.
            facts: plain values kept in the header, such as the length of metrics.jsonl.

        Raises:
            DivergedError: a weight is not finite; nothing is written.
            CheckpointError: no space; the earlier checkpoint is intact.
        """
        path = self._phase_folder(phase) / f"step_{step:08d}"
        self._write(path, phase, step, state, facts)
        for old in self._steps_on_disk(phase)[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(self._phase_folder(phase) / f"step_{old:08d}", ignore_errors=True)
        return path

    def keep_best(
        self,
        phase: str,
        step: int,
        state: Mapping[str, Any],
        facts: Mapping[str, Any],
        score: float,
        *,
        higher: bool = True,
    ) -> bool:
        """Write `best` when `score` beats the one kept there; True if it was written.

        A resumed run passes the same steps with the same scores again: equal is not better.
        """
        path = self._phase_folder(phase) / "best"
        header = self._header_of_best(phase)
        if header is not None:
            kept = float(header["score"])
            if not (score > kept if higher else score < kept):
                return False
        self._write(path, phase, step, state, {**facts, "score": float(score)})
        return True

    def _write(
        self,
        path: Path,
        phase: str,
        step: int,
        state: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> None:
        from safetensors import SafetensorError

        tree = {
            "objects": {name: dict(thing.state_dict()) for name, thing in state.items()},
            "random": seeding.capture(),
        }
        self._require_finite(tree["objects"], step)
        header = {"run": self.key, "phase": phase, "step": step, **facts}
        try:
            storage.save_tree(path, tree, header)
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(self.folder.parent).free
            raise CheckpointError(
                f"cannot write {path}: {error} (about {_tree_bytes(tree)} bytes needed, {free} "
                "free); the earlier checkpoint is intact, free some space and run the same "
                "command to continue"
            ) from None

    def _require_finite(self, objects: Mapping[str, Any], step: int) -> None:
        """A checkpoint with NaN in the weights would replace a good one: refuse it."""
        if self.allow_divergence:
            return
        tensors: dict[str, Any] = {}
        storage.pack(objects, tensors)  # moments of the optimiser lie deeper than weights
        for key, value in tensors.items():
            if hasattr(value, "isfinite") and value.is_floating_point():
                finite = value.isfinite()
                if not bool(finite.all()):
                    raise DivergedError(
                        f"{key.lstrip('.')} holds {int((~finite).sum())} non-finite values at step "
                        f"{step}; the last checkpoint is from before; lower the learning rate"
                    )

    # ------------------------------------------------------------ reading

    def resume(self, phase: str, state: Mapping[str, Any]) -> int | None:
        """Load the newest good checkpoint of `phase` into `state`; its step, None without one.

        Raises:
            CheckpointError: it was written by another version or does not fit.
        """
        for path, header in self._verified(phase):
            tree = self._load(path, state)
            try:
                seeding.restore(tree["random"])
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{path}: the random states are incomplete ({error})"
                ) from None
            return int(header["step"])
        return None

    def load_best(self, phase: str, state: Mapping[str, Any]) -> int:
        """Load what `keep_best` kept; its step. Random states are left as they are.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        header = self._header_of_best(phase)
        path = self._phase_folder(phase) / "best"
        if header is None:
            raise CheckpointError(f"{path}: no good checkpoint; run with --fresh")
        self._load(path, state)
        return int(header["step"])

    def newest(self) -> dict[str, Any] | None:
        """The header of the newest good checkpoint of all phases."""
        if not self.folder.is_dir():
            return None
        headers = []
        for entry in self.folder.iterdir():
            headers += [header for _, header in self._verified(entry.name)][:1]
        return max(headers, key=lambda header: header["metrics_bytes"], default=None)

    def _load(self, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
        tree = storage.load_tree(path)
        if set(state) ^ set(tree["objects"]):
            raise CheckpointError(
                f"{path}: holds {sorted(tree['objects'])}, this script saves {sorted(state)}; "
                "was it written by another version? use --fresh"
            )
        for name, thing in state.items():
            try:
                thing.load_state_dict(tree["objects"][name])
            except (KeyError, RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"{path}: {name} does not fit: {error}; use --fresh"
                ) from None
        return tree

    def _header_of_best(self, phase: str) -> dict[str, Any] | None:
        path = self._phase_folder(phase) / "best"
        if not path.is_dir():
            return None
        try:
            header = storage.read_header(path)
            self._require_own(path, header, {"run": self.key, "phase": phase})
            float(header["score"])
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            self.note(f"best checkpoint skipped: {error}")
            return None
        return header

    def _verified(self, phase: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Complete, unaltered checkpoints of this run and phase, newest first."""
        for step in reversed(self._steps_on_disk(phase)):
            path = self._phase_folder(phase) / f"step_{step:08d}"
            try:
                header = storage.read_header(path)
                self._require_own(path, header, {"run": self.key, "phase": phase, "step": step})
            except CheckpointError as error:
                if path not in self._skipped:
                    self._skipped.add(path)
                    self.note(f"checkpoint skipped: {error}; using the previous one")
                continue
            yield path, header

    def _require_own(
        self, path: Path, header: Mapping[str, Any], expected: Mapping[str, Any]
    ) -> None:
        for key, value in expected.items():
            if header.get(key) != value:
                raise CheckpointError(f"{path}: {key} is {header.get(key)!r}, expected {value!r}")

    def _phase_folder(self, phase: str) -> Path:
        return self.folder / phase_name(phase)

    def _steps_on_disk(self, phase: str) -> list[int]:
        """Steps with a folder, ascending; ordered by number, never by name or time."""
        folder = self._phase_folder(phase)
        if not folder.is_dir():
            return []
        found = [re.fullmatch(r"step_(\d{8,})", p.name) for p in folder.iterdir()]
        return sorted(int(m.group(1)) for m in found if m)


def phase_name(name: str) -> str:
    """`name` as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def _tree_bytes(tree: Any) -> int:
    tensors: dict[str, Any] = {}
    storage.pack(tree, tensors)
    return sum(getattr(t, "nbytes", 0) for t in tensors.values())
