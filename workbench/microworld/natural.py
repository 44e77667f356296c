"""Real text that lies on every machine: the docstrings of the running Python standard library.

The text depends on the Python version; nothing here is random. One docstring in twenty is held out
by the MD5 of its text, so that the same docstring never falls on both sides.
"""

from __future__ import annotations

import inspect
import re
import sysconfig
from bisect import bisect_right
from functools import lru_cache
from hashlib import md5
from itertools import accumulate
from pathlib import Path

from workbench.errors import DataError
from workbench.microworld.prng import Stream

HELD_OUT_OF = 20  # one docstring of so many is held out
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}
SKIPPED_FOLDERS |= {"__pycache__", "turtledemo", "ensurepip", "idle_test", "pydoc_data"}
SHORTEST_DOCSTRING = 60  # characters
# a lexer's view of Python: comments and strings, so that quotes inside them open nothing
_LITERAL = re.compile(
    r"#[^\n]*"
    r'|(?<!\w)[rRbBuUfF]{0,2}(?:"""(?P<double>(?:[^\\]|\\.)*?)"""'
    r"|'''(?P<single>(?:[^\\]|\\.)*?)''')"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*'",
    re.DOTALL,
)


def _source_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (
        path
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1])
    )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def docstrings_of(source: str) -> list[str]:
    """The docstrings of a Python source: triple-quoted strings that begin a line.

    >>> docstrings_of('x = 1\\ndef f():\\n    \"\"\"Add one.\"\"\"\\n')
    ['Add one.']
    """
    found = []
    for match in _LITERAL.finditer(source):
        body = match["double"] if match["double"] is not None else match["single"]
        if body is None:
            continue
        line_start = source.rfind("\n", 0, match.start()) + 1
        if source[line_start : match.start()].strip() == "":
            found.append(inspect.cleandoc(body))
    return found


@lru_cache(maxsize=2)
def stdlib_docstrings(split: str = "train") -> tuple[str, ...]:
    """All docstrings of at least sixty characters of one side of the split, in path order.

    Raises:
        DataError: this Python has no library sources (a zipped or stripped installation).
    """
    kept: dict[str, None] = {}
    for path in _source_files():
        try:
            source = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a few sources are deliberately in other encodings
            continue
        for text in docstrings_of(source):
            if len(text) >= SHORTEST_DOCSTRING and "\x00" not in text:
                digest = int.from_bytes(md5(text.encode("utf-8")).digest()[:4], "little")
                if (digest % HELD_OUT_OF == 0) == (split == "test"):
                    kept[text] = None
    if not kept:
        raise DataError(
            f"no docstrings found below {sysconfig.get_paths()['stdlib']}: this Python carries no "
            "library sources; name a text file with --data instead"
        )
    return tuple(kept)


@lru_cache(maxsize=2)
def stdlib_sources(split: str = "train") -> tuple[str, ...]:
    """The source files themselves, one file in twenty (by the MD5 of its text) held out."""
    kept = []
    for path in _source_files():
        try:
            source = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        digest = int.from_bytes(md5(source.encode("utf-8")).digest()[:4], "little")
        if source.strip() and (digest % HELD_OUT_OF == 0) == (split == "test"):
            kept.append(source)
    return tuple(kept)


@lru_cache(maxsize=2)
def _cumulative_lengths(split: str) -> tuple[int, ...]:
    return tuple(accumulate(len(text) for text in stdlib_docstrings(split)))


def docstring_slice(stream: Stream, split: str, characters: int) -> str:
    """A docstring, or a piece of one that begins at a line and has at most so many characters."""
    lengths = _cumulative_lengths(split)
    place = stream.below(lengths[-1])
    index = bisect_right(lengths, place)
    text = stdlib_docstrings(split)[index]
    if len(text) <= characters:
        return text
    offset = place - (lengths[index - 1] if index else 0)
    start = text.rfind("\n", 0, min(offset, len(text) - characters // 2)) + 1
    piece = text[start : start + characters]
    if start + characters < len(text):  # end at a whole word where there is one
        cut = max(piece.rfind(" "), piece.rfind("\n"))
        piece = piece[:cut] if cut > characters // 2 else piece
    return piece
