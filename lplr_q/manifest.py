"""Units of work on disk: one compressed sublayer each, and what all of them belong to.

    work/<module>.safetensors    codes, scales, signs
    work/<module>.json           written last: errors per iteration, settings, seconds, SHA-256
    manifest.json                model, weights, calibration, settings, version

A unit counts when its JSON is there and the SHA-256 of its tensors is the recorded one; anything
else (a killed process, a cut file) is done again. Keys with "seconds" or "peak" in them are
measurements and differ from run to run; everything else is byte-identical.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.errors import ConfigError, DataError
from workbench.record import changed_fields

FORMAT = 1
WORK = "work"
MANIFEST = "manifest.json"


def version() -> str:
    """Version of this package."""
    try:
        return importlib.metadata.version("fivefold")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def agree_on_manifest(path: Path, manifest: dict[str, Any], *, what: str) -> None:
    """Write the manifest, or compare it with the one that is there.

    Raises:
        ConfigError: the folder holds work of another origin; lists every differing key.
    """
    whole = {"format": FORMAT, "version": version(), **json.loads(json.dumps(manifest))}
    if not path.is_file():
        storage.write_json(path, whole)
        return
    old = storage.read_json(path)
    if not isinstance(old, dict):
        raise DataError(f"{path}: expected a JSON object; delete the folder and begin anew")
    changed = changed_fields(old, whole)
    if changed:
        raise ConfigError(
            f"{path.parent} holds {what} of another origin:\n  "
            + "\n  ".join(changed[:12])
            + "\ngive another folder, delete this one, or bring the old settings back"
        )


def unit_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """(tensors, record) of a unit."""
    work = folder / WORK
    return work / f"{name}.safetensors", work / f"{name}.json"


def write_unit(folder: Path, name: str, tree: dict[str, Any]) -> None:
    """Store a finished unit; ``tree["buffers"]`` are its tensors, the rest its record."""
    tensors, record = unit_paths(folder, name)
    storage.write_safetensors(tensors, tree["buffers"])
    rest = {key: value for key, value in tree.items() if key != "buffers"}
    storage.write_json(record, {**rest, "sha256": storage.sha256(tensors)})


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """The record of a finished and undamaged unit; None when it has to be done (again)."""
    tensors, record = unit_paths(folder, name)
    if not record.is_file() or not tensors.is_file():
        return None
    try:
        found = storage.read_json(record)
    except DataError:
        return None
    if not isinstance(found, dict) or found.get("sha256") != storage.sha256(tensors):
        return None
    return found


def read_unit(folder: Path, name: str) -> dict[str, Any]:
    """A finished unit with its tensors.

    Raises:
        DataError: it is missing or damaged.
    """
    found = read_record(folder, name)
    if found is None:
        raise DataError(
            f"{unit_paths(folder, name)[0]}: missing or damaged; run the same command to make it"
        )
    return {**found, "buffers": storage.read_safetensors(unit_paths(folder, name)[0])}
