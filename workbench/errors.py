"""The errors a user can mend, each with what was found, where, what was expected, what to do.

`workbench.cli` prints them without a traceback and ends with the exit status they carry:
2 for bad input, 3 for a gate that was asked for and not met.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A flag, a YAML key or a combination of settings that cannot work."""


class InUse(ConfigError):
    """A run that another process is working on; a sweep comes back to it later."""


class DataError(ValueError):
    """An input file or array that is damaged, empty or of the wrong shape."""


class CheckpointError(RuntimeError):
    """A saved state that is incomplete, altered or of another run."""


class DivergedError(RuntimeError):
    """A loss or gradient that is not finite; the last checkpoint is from before it."""


class MissingExtra(ImportError):
    """An optional package that is not installed (or is, and does not import)."""


class GateFailed(RuntimeError):
    """The run finished, but a quality gate asked for on the command line was not met."""


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C arrived; the state was saved. Derives from BaseException like
    KeyboardInterrupt, so that no `except Exception` on the way can swallow it.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


USER_ERRORS = (ConfigError, DataError, CheckpointError, DivergedError, MissingExtra)


def unknown_name(kind: str, given: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is in no registry, with the three nearest names.

    >>> str(unknown_name("layer", "atention", ["attention", "mlp"]))
    "unknown layer 'atention'; nearest: attention; known: attention, mlp"
    """
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    nearest = f"; nearest: {', '.join(near)}" if near else ""
    listing = ", ".join(names)
    if len(listing) > 600:
        listing = listing[:600] + ", …"
    return ConfigError(f"unknown {kind} {given!r}{nearest}; known: {listing}")


def require_least(settings: object, least: float, *names: str) -> None:
    """Nothing when each of these fields is None or at least ``least``.

    Raises:
        ConfigError: the first that is less.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name}={value}: expected at least {least}")


def shorten(text: str, limit: int = 1000) -> str:
    """`text` cut in the middle to at most `limit` characters (messages stay on one screen)."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return text[:half] + " ... " + text[-half:]
