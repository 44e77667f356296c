"""Text from anywhere, checked once at the border, and packed into blocks of tokens.

    texts = load_texts("microworld:doc", n=200, split="test")
    texts = load_texts("../data/wikitext2/test.txt.gz")
    blocks = pack_blocks(tokenizer, texts, length=256)

Files may be .txt, .jsonl, .json or .csv, each also with .gz. A bad line is reported as
`file:line:field`, the first five and a count of the rest. Reading is bounded: one line at most
8 MB, one file at most 1 GB unpacked, no gzip member that unpacks to 200 times its size.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int64
from torch import Tensor

from workbench import storage
from workbench.errors import DataError, shorten, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LINE_BYTES = 8 * 2**20
MAX_FILE_BYTES = 2**30
MAX_RATIO = 200
"""A gzip file that unpacks to more than this many times its size is refused (text: 3 to 20)."""
FREE_BYTES = 4 * 2**20
"""A gzip file may unpack to so much whatever its size."""
SHOWN_ERRORS = 5
PASSAGE_CHARACTERS = 1000
"""Paragraphs of a plain text file are joined to passages of at least this length."""
TEST_SHARE = 0.1
"""Last part of a file without splits that `split="test"` reads."""
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "heldout"),
    "validation": ("validation", "valid", "val", "dev"),
}
MICROWORLD_KINDS = ("doc", "world", "sum", "text")

_UTF8_BOM = b"\xef\xbb\xbf"


# ---------------------------------------------------------------- bytes and lines


def _chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes, unpacked if it is gzip, in pieces, within the size bounds."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: is a folder; expected a file")
    size = path.stat().st_size
    with open(path, "rb") as probe:
        packed = probe.read(2) == b"\x1f\x8b"
        if packed and size > 18:  # the last four bytes announce the unpacked size
            probe.seek(-4, os.SEEK_END)
            _refuse_bomb(path, size, int.from_bytes(probe.read(4), "little"))
    total = 0
    opener = gzip.open if packed else open
    try:
        with opener(path, "rb") as handle:
            while piece := handle.read(2**20):
                total += len(piece)
                if total > MAX_FILE_BYTES:
                    raise DataError(
                        f"{path}: more than {MAX_FILE_BYTES} bytes unpacked; split it into parts"
                    )
                if packed:  # what was announced need not be true
                    _refuse_bomb(path, size, total)
                yield piece
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: gzip stream cut or damaged after {total} unpacked bytes ({error}); copy or "
            "download it again"
        ) from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None


def _refuse_bomb(path: Path, size: int, unpacked: int) -> None:
    if unpacked > FREE_BYTES and unpacked > MAX_RATIO * size:
        raise DataError(
            f"{path}: {size} bytes unpack to more than {MAX_RATIO} times as many; cut, damaged "
            "or a gzip bomb; refused"
        )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes without line end), for LF and CRLF files, with or without a BOM."""
    rest, number = b"", 0
    for piece in _chunks(path):
        parts = (rest + piece).split(b"\n")
        rest = parts.pop()
        for part in parts:
            number += 1
            yield number, _trim(part, number, path)
        if len(rest) > MAX_LINE_BYTES:
            raise DataError(
                f"{path}:{number + 1}: line longer than {MAX_LINE_BYTES} bytes; expected one "
                "record per line"
            )
    if rest:
        yield number + 1, _trim(rest, number + 1, path)


def _trim(line: bytes, number: int, path: Path) -> bytes:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{path}:{number}: line longer than {MAX_LINE_BYTES} bytes")
    return line.removeprefix(_UTF8_BOM).removesuffix(b"\r") if number == 1 else line.rstrip(b"\r")


def read_text_file(path: Path | str) -> str:
    """A whole UTF-8 file (.gz unpacked), line ends as `\\n`, without a byte-order mark.

    Raises:
        DataError: missing, empty, too large, cut gzip, NUL bytes, not UTF-8.
    """
    path = Path(path)
    raw = b"".join(_chunks(path)).removeprefix(_UTF8_BOM)
    if not raw.strip():
        raise DataError(f"{path}: empty; expected text")
    nul = raw.find(b"\0")
    if nul >= 0:
        line = raw.count(b"\n", 0, nul) + 1
        raise DataError(f"{path}:{line}: NUL byte at offset {nul}; this is no text file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 at byte {error.start} "
            f"(0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None
    return text.replace("\r\n", "\n")


# ---------------------------------------------------------------- records


class _Problems:
    """The first five problems of a file, and how many there are."""

    def __init__(self, path: Path):
        self.path = path
        self.shown: list[str] = []
        self.count = 0

    def add(self, line: int, field: str, text: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN_ERRORS:
            where = f"{self.path}:{line}" + (f":{field}" if field else "")
            self.shown.append(f"{where}: {shorten(text, 140)}")

    def close(self, rows: int) -> None:
        if self.count:
            more = self.count - len(self.shown)
            tail = f"\n… and {more} more" if more else ""
            raise DataError("\n".join(self.shown) + tail)
        if not rows:
            raise DataError(f"{self.path}: empty; expected at least one record")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {shorten(text, 40)} is too large")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number; leave the field out or write null")


def _decode(raw: bytes) -> Any:
    """One strict JSON value, or ValueError with the reason."""
    if b"\0" in raw:
        raise ValueError("NUL byte; the file is damaged or not UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=storage.reject_duplicate_keys,
            parse_constant=_constant,
            parse_float=_number,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if "\\u" in text:
        _refuse_broken_text(value)
    return value


def _refuse_broken_text(value: Any) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("NUL character in a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("lone surrogate (half a character) in a string") from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            _refuse_broken_text(key)
            _refuse_broken_text(inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_broken_text(inner)


def _fits(value: Any, kind: Any) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    for one in kinds:
        if one is None or one is type(None):
            fits = value is None
        elif one is float:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        elif one is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, one)
        if fits:
            return True
    return False


def _kind_name(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("null" if k in (None, type(None)) else k.__name__ for k in kinds)


def check_record(
    record: Any,
    line: int,
    required: dict[str, Any],
    optional: dict[str, Any],
    add: Any,
) -> bool:
    """Whether one record has the required fields of the required types; `add` gets the faults."""
    if not isinstance(record, dict):
        add(line, "", f"found {type(record).__name__}, expected an object")
        return False
    good = True
    for field, kind in {**required, **optional}.items():
        if field not in record:
            if field in required:
                add(line, field, f"missing; expected {_kind_name(kind)}")
                good = False
        elif not _fits(record[field], kind):
            found = json.dumps(record[field], ensure_ascii=False)
            kind_found = type(record[field]).__name__
            add(
                line,
                field,
                f"found {kind_found} {shorten(found, 60)}, expected {_kind_name(kind)}",
            )
            good = False
    return good


def read_jsonl(
    path: Path | str,
    required: dict[str, Any] | None = None,
    *,
    optional: dict[str, Any] | None = None,
    n: int | None = None,
) -> list[dict[str, Any]]:
    """The records of a JSON-lines file (.gz unpacked), each checked.

    Args:
        path: one JSON object per line; blank lines are skipped, a BOM and CRLF are accepted.
        required: field → type or tuple of types (`int` takes no bool, `float` takes an int,
            `None` in a tuple allows null).
        optional: the same for fields that may be absent.
        n: read at most this many records.

    Raises:
        DataError: up to five lines `file:line:field: found …, expected …` and the count of the
            rest; or the file is missing, empty, cut, or over the size bounds.
    """
    path = Path(path)
    problems = _Problems(path)
    records: list[dict[str, Any]] = []
    for number, raw in _lines(path):
        if not raw.strip():
            continue
        try:
            record = _decode(raw)
        except ValueError as error:
            problems.add(number, "", str(error))
            continue
        if check_record(record, number, required or {}, optional or {}, problems.add):
            records.append(record)
            if n is not None and len(records) == n:
                break
    problems.close(len(records))
    return records


def read_json_records(path: Path | str, required: dict[str, Any] | None = None) -> list[Any]:
    """The items of a .json file (.gz unpacked) that holds one list (line = item number)."""
    path = Path(path)
    try:
        value = _decode(b"".join(_chunks(path)).removeprefix(_UTF8_BOM))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: {error}") from None
    if not isinstance(value, list):
        raise DataError(f"{path}: found {type(value).__name__}, expected a list of records")
    problems = _Problems(path)
    for number, record in enumerate(value, 1):
        if required:
            check_record(record, number, required, {}, problems.add)
    problems.close(len(value))
    return value


def read_csv_records(path: Path | str, required: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line (.gz unpacked), all values as text."""
    path = Path(path)
    reader = csv.DictReader(io.StringIO(read_text_file(path), newline=""), strict=True)
    problems = _Problems(path)
    rows: list[dict[str, str]] = []
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise DataError(f"{path}:1: a column name occurs twice: {', '.join(names)}")
        missing = [name for name in required if name not in names]
        if missing:
            raise DataError(
                f"{path}:1:{missing[0]}: missing column; found {', '.join(names) or 'none'}"
            )
        for row in reader:
            surplus = row.get(None)  # type: ignore[call-overload]
            short = next((name for name in names if row.get(name) is None), None)
            if surplus is not None:
                problems.add(reader.line_num, "", f"more than the {len(names)} columns of line 1")
            elif short is not None:
                problems.add(reader.line_num, short, "missing; the row is too short")
            else:
                rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from None
    problems.close(len(rows))
    return rows


# ---------------------------------------------------------------- texts


def _kind_of(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    ending = name.rpartition(".")[2] if "." in name else ""
    if ending in ("txt", "md", "text", "py", "rst"):
        return "txt"
    if ending in ("jsonl", "ndjson"):
        return "jsonl"
    if ending in ("json", "csv"):
        return ending
    raise DataError(f"{path}: ending {ending!r}; expected .txt, .jsonl, .json or .csv (or .gz)")


def read_texts(path: Path | str, *, field: str = "text", n: int | None = None) -> list[str]:
    """The texts of one file: passages of a .txt, field `field` of .jsonl, .json or .csv.

    A plain text is split at blank lines, and neighbouring paragraphs are joined to passages of at
    least 1000 characters, so that a book and a list of verses both give usable pieces. A .json
    file holds a list of strings or of objects.
    """
    path = Path(path)
    kind = _kind_of(path)
    if kind == "txt":
        texts = _passages(read_text_file(path))
    elif kind == "jsonl":
        texts = [record[field] for record in read_jsonl(path, {field: str}, n=n)]
    elif kind == "csv":
        texts = [row[field] for row in read_csv_records(path, [field])]
    else:
        items = read_json_records(path)
        if not all(isinstance(item, str) for item in items):
            items = [item[field] for item in read_json_records(path, {field: str})]
        texts = items
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{path}: no text in it; every record is blank")
    return texts[:n]


def _passages(text: str) -> list[str]:
    passages, current = [], ""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if not paragraph.strip():
            continue
        current = f"{current}\n\n{paragraph}" if current else paragraph
        if len(current) >= PASSAGE_CHARACTERS:
            passages.append(current)
            current = ""
    return [*passages, current] if current else passages


def load_texts(
    source: str | Path,
    *,
    n: int | None = None,
    split: str = "train",
    seed: int = 0,
    field: str = "text",
) -> list[str]:
    """Texts of `source`: a built-in corpus, a file, a folder with split files, or a hub data set.

    Args:
        source: `microworld:doc|world|sum|text`, `stdlib` (docstrings), `stdlib:sources`, a
            path (also below $FIVEFOLD_DATA), or
            a hub id `owner/name` or `owner/name:configuration`.
        n: how many (default: 256 generated ones, or all of a file, or 1000 of a hub set).
        split: "train", "test" or "validation". A single file gives its last tenth as test.
        seed: which stretch of a generated corpus; different seeds share no sample.
        field: the field with the text, for records.

    Raises:
        DataError: nothing there, bad records (file:line:field), hub not reachable.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    text = os.fspath(source)
    if not text.strip():
        raise DataError("--data is empty; give microworld:doc, stdlib, a path or a hub id")
    if n is not None and n < 1:
        raise DataError(f"n={n} texts asked for; expected at least 1")
    if text.startswith("microworld"):
        return _microworld(text, n or 256, split, seed)
    if text in ("stdlib", "stdlib:sources"):
        return _stdlib(text, n, split)
    path = _locate(text)
    if path is None:
        return _hub_texts(text, n or 1000, split, field)
    if path.is_dir():
        return read_texts(_split_file(path, split), field=field, n=n)
    texts = read_texts(path, field=field)
    if len(texts) > 1:
        cut = len(texts) - max(1, round(TEST_SHARE * len(texts)))
        texts = texts[:cut] if split == "train" else texts[cut:]
    return texts[:n]


def _locate(text: str) -> Path | None:
    path = Path(text).expanduser()
    if path.exists():
        return path
    shared = os.environ.get("FIVEFOLD_DATA")
    if shared and (Path(shared) / text).exists():
        return Path(shared) / text
    looks_local = text.startswith((".", "/", "~")) or "." in text.rpartition("/")[2]
    if looks_local or "/" not in text:
        raise DataError(
            f"--data {text}: no such file; give a path (also below $FIVEFOLD_DATA), a hub id "
            f"owner/name, or a built-in: microworld:{'|'.join(MICROWORLD_KINDS)}, stdlib"
        )
    return None


def _split_file(folder: Path, split: str) -> Path:
    endings = ("txt", "jsonl", "json", "csv")
    for stem in SPLITS[split]:
        for ending in endings:
            for suffix in ("", ".gz"):
                candidate = folder / f"{stem}.{ending}{suffix}"
                if candidate.is_file():
                    return candidate
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise DataError(
        f"{folder}: no file for split {split!r}; expected {SPLITS[split][0]}.txt, .jsonl, .json or "
        f".csv (or .gz), found {found}"
    )


def _microworld(source: str, n: int, split: str, seed: int) -> list[str]:
    from workbench.microworld import World

    kind = source.partition(":")[2] or "doc"
    if kind not in MICROWORLD_KINDS:
        raise unknown_name("microworld text", kind, MICROWORLD_KINDS)
    split = "train" if split == "train" else "test"
    return list(World().texts(kind, n, split, start=seed * 1_000_000))


def _stdlib(source: str, n: int | None, split: str) -> list[str]:
    from workbench.microworld import stdlib_docstrings, stdlib_sources

    read = stdlib_sources if source.endswith("sources") else stdlib_docstrings
    texts = list(read("train" if split == "train" else "test"))
    if n is None or n >= len(texts):
        return texts
    return [texts[i * len(texts) // n] for i in range(n)]  # from all over the library


def _hub_texts(source: str, n: int, split: str, field: str) -> list[str]:
    import datasets

    from workbench.models import hub_error

    name, _, configuration = source.partition(":")
    try:
        stream = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        rows = list(stream.take(n))
    except Exception as error:
        raise hub_error("data set", source, error) from error
    texts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(field), str):
            raise DataError(
                f"{source}:{number}:{field}: no text there; fields are {', '.join(row)}; name the "
                "one with the text"
            )
        texts.append(row[field])
    if not texts:
        raise DataError(f"{source}: split {split!r} is empty")
    return texts


# ---------------------------------------------------------------- blocks


def pack_blocks(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    length: int,
    n: int | None = None,
    *,
    whole: bool = False,
) -> Int64[Tensor, "n length"]:
    """Texts framed as `<s> text </s>`, joined and cut into blocks; the remainder is dropped.

    With `whole=True` no text is cut: each row holds as many whole texts as fit, the rest of the
    row is the pad token, and a text longer than a row is cut at its end.

    Raises:
        DataError: fewer than `n` blocks (or than one) come out; says how many tokens there are.
    """
    import torch

    if length < 2:
        raise DataError(f"length={length}: a block needs at least 2 tokens to predict one")
    first = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    last = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    wanted = None if n is None else n * length
    rows: list[list[int]] = []
    stream: list[int] = []
    total = 0
    for text in texts:
        ids = [*first, *tokenizer.encode(text, add_special_tokens=False), *last]
        total += len(ids)
        if whole:
            if rows and len(rows[-1]) + len(ids) <= length:
                rows[-1].extend(ids)
            elif n is not None and len(rows) == n:
                break
            else:
                rows.append(ids[:length])
        else:
            stream.extend(ids)
            if wanted is not None and len(stream) >= wanted:
                break
    if whole:
        pad = int(tokenizer.pad_token_id or 0)
        rows = [row + [pad] * (length - len(row)) for row in rows]
    else:
        rows = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    if not rows or (n is not None and len(rows) < n):
        need = f"{n} blocks" if n is not None else "one block"
        raise DataError(
            f"{len(texts)} texts give {total} tokens, too few for {need} of {length}; give more "
            "text, or ask for fewer or shorter blocks"
        )
    return torch.tensor(rows[:n], dtype=torch.long)
