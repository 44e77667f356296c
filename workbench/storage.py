"""Durable files: whole or absent, verified when read, never a pickle.

A file is written to `.tmp-<pid>-…` beside its place, flushed to the disk, renamed, and the folder
is flushed. A *tree* (nested dicts and lists of numbers, text and arrays) is a folder with
`tensors.safetensors` and `tree.json`; the latter is written last and holds the size and SHA-256
of every other file, so a folder is either complete and unaltered or refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import CheckpointError, DataError

if TYPE_CHECKING:
    import torch

MAX_JSON_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 16 * 2**20  # of a safetensors file: more than 100 000 tensors
MANIFEST = "tree.json"
TENSORS = "tensors.safetensors"


# ---------------------------------------------------------------- atomic files


def fsync_directory(path: Path) -> None:
    """Flush the folder's entries, so that a rename survives a power cut (no-op on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_mode(path: Path) -> None:
    """Give a file mode 0666 & ~umask (safetensors writes 0600, which locks out group mates)."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def atomic_write(path: Path | str, write: Callable[[Path], None]) -> Path:
    """Call `write(temporary)` and move the result to `path`, whole or not at all.

    Raises:
        OSError: the disk is full or the folder is not writable; the old file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        _open_mode(temporary)
        _fsync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
    return path


def write_text(path: Path | str, text: str) -> Path:
    """Write UTF-8 text with `\\n` line ends, atomically."""
    return write_bytes(path, text.encode("utf-8", errors="strict"))


def write_bytes(path: Path | str, data: bytes) -> Path:
    """Write bytes, atomically."""
    return atomic_write(path, lambda temporary: _write_plain(temporary, data))


def _write_plain(path: Path, data: bytes) -> None:
    with open(path, "wb") as handle:
        handle.write(data)


def write_json(path: Path | str, value: Any) -> Path:
    """Write strict JSON (no NaN or Infinity), atomically."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON `object_pairs_hook` that refuses an object with the same key twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} occurs twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN or Infinity, no duplicate keys, no bottomless nesting.

    Raises:
        ValueError: with the reason in one line.
    """
    try:
        return json.loads(
            text, object_pairs_hook=reject_duplicate_keys, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path | str) -> Any:
    """Read a strict JSON file.

    Raises:
        DataError: missing, not UTF-8, not JSON, duplicate key, or larger than 256 MB.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise DataError(f"{path}: larger than {MAX_JSON_BYTES} bytes; this is no record of ours")
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None


def sha256(path: Path | str) -> str:
    """SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ---------------------------------------------------------------- safetensors


def write_safetensors(
    path: Path | str,
    tensors: Mapping[str, torch.Tensor | np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write named tensors atomically; shared or strided tensors are copied first."""
    from safetensors.torch import save_file

    ready = {name: _plain_tensor(value) for name, value in tensors.items()}
    extra = dict(metadata) if metadata else None

    def write(temporary: Path) -> None:
        save_file(ready, str(temporary), metadata=extra)
        if extra and len(extra) > 1:
            _sort_metadata(temporary)

    return atomic_write(path, write)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors header in order, in place.

    The library keeps it in a hash map whose order changes from process to process, so that equal
    content would give unequal bytes.
    """
    with open(path, "r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            handle.seek(8)
            handle.write(text.ljust(size))


def _plain_tensor(value: torch.Tensor | np.ndarray) -> torch.Tensor:
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(value)) if _is_array(value) else value
    return tensor.detach().cpu().contiguous().clone()


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def read_safetensors(path: Path | str) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        DataError: missing, truncated or no safetensors file (pickles are never opened).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with open(path, "rb") as handle:
        announced = int.from_bytes(handle.read(8), "little")
    if MAX_HEADER_BYTES < announced < path.stat().st_size:
        raise DataError(
            f"{path}: not a complete safetensors file we would read: a header of {announced} bytes "
            f"(at most {MAX_HEADER_BYTES})"
        )
    try:
        return load_file(str(path))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"{path}: not a complete safetensors file ({error}); "
            f"found {path.stat().st_size} bytes; write it again or restore a copy"
        ) from None


# ---------------------------------------------------------------- trees


def pack(value: Any, tensors: dict[str, Any], name: str = "") -> Any:
    """The JSON form of a tree; arrays go to `tensors`, under their path, and leave a reference."""
    kind = type(value).__name__
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.ndarray):
        tensors[name or "value"] = value
        return {"$array": name or "value"}
    if kind in ("Tensor", "Parameter") and hasattr(value, "detach"):
        tensors[name or "value"] = value
        return {"$tensor": name or "value"}
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return number if math.isfinite(number) else {"$float": repr(number)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return {"$tuple": [pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        items = [(key, pack(v, tensors, f"{name}.{key}")) for key, v in value.items()]
        return dict(items) if plain else {"$items": [[key, v] for key, v in items]}
    raise TypeError(f"cannot store {kind} at {name!r}; use numbers, text, arrays, lists and dicts")


def unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (key, inner), *_ = value.items()
        if key == "$tensor":
            return tensors[inner]
        if key == "$array":
            return tensors[inner].numpy()
        if key == "$float":
            return float(inner)
        if key == "$tuple":
            return tuple(unpack(v, tensors) for v in inner)
        if key == "$items":
            return {k: unpack(v, tensors) for k, v in inner}
    return {key: unpack(v, tensors) for key, v in value.items()}


def save_tree(path: Path | str, tree: Any, header: Mapping[str, Any] | None = None) -> Path:
    """Write a tree as a folder, atomically; an existing folder of that name is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        tensors: dict[str, Any] = {}
        packed = pack(tree, tensors)
        files = {}
        if tensors:
            file = write_safetensors(temporary / TENSORS, tensors)
            files[TENSORS] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        manifest = {"format": 1, **(header or {}), "files": files, "tree": packed}
        text = json.dumps(manifest, allow_nan=False, ensure_ascii=False, indent=0)
        digest = hashlib.sha256(text.encode()).hexdigest()
        write_text(temporary / MANIFEST, f"{digest}\n{text}\n")
        _replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)
    return path


def _replace_directory(source: Path, target: Path) -> None:
    """Rename a folder onto a place that may be taken (rename cannot replace a full folder)."""
    if target.exists():
        old = target.with_name(f".tmp-{os.getpid()}-old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(source, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(source, target)


def read_header(path: Path | str) -> dict[str, Any]:
    """The verified manifest of a tree folder, without loading its tensors.

    Raises:
        CheckpointError: the manifest is missing, cut or altered, or a listed file is missing, of
            another size or of another SHA-256.
    """
    path = Path(path)
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path}: incomplete, {MANIFEST} is missing")
    try:
        digest, _, body = file.read_text(encoding="utf-8").partition("\n")
    except UnicodeDecodeError:
        raise CheckpointError(f"{file}: altered, not UTF-8") from None
    whole, body = body.endswith("\n"), body.removesuffix("\n")
    if not whole or hashlib.sha256(body.encode()).hexdigest() != digest:
        raise CheckpointError(f"{file}: altered or cut, its SHA-256 differs from its first line")
    manifest = parse_json(body)
    for name, expected in manifest["files"].items():
        part = path / name
        if not part.is_file():
            raise CheckpointError(f"{part}: missing, though {MANIFEST} lists it")
        size = part.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{part}: {size} bytes, expected {expected['bytes']}")
        if sha256(part) != expected["sha256"]:
            raise CheckpointError(f"{part}: altered, its SHA-256 is not the one in {MANIFEST}")
    return manifest


def load_tree(path: Path | str) -> Any:
    """Read a tree written by `save_tree`, verified.

    Raises:
        CheckpointError: see `read_header`.
    """
    manifest = read_header(path)
    tensors: dict[str, Any] = {}
    if TENSORS in manifest["files"]:
        try:
            tensors = dict(read_safetensors(Path(path) / TENSORS))
        except DataError as error:
            raise CheckpointError(str(error)) from None
    return unpack(manifest["tree"], tensors)


def sweep_litter(path: Path) -> list[Path]:
    """Remove `.tmp-*` left by killed processes below `path` (call it only while holding a lock)."""
    litter = [p for p in path.rglob(".tmp*") if p.name.startswith(".tmp")]
    for item in litter:
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)
    return litter
