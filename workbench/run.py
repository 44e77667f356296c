"""One run = one folder that records everything and from which the run continues after any crash.

    runs/<package>/<script>-<8 hex>/      the digits are the SHA-256 of the settings
        config.yaml environment.json log.txt metrics.jsonl
        checkpoints/<phase>/step_00000200/    last two of each phase, and `best` where kept
        units/<name>/                         finished parts of longer work (`Run.once`)
        figures/ tables/ results.json report.md

The same experiment finds its own folder again: a finished one returns at once, an interrupted one
continues to the same result. Every write is whole or absent (`workbench.storage`).
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from workbench import seeding, storage
from workbench.checkpoint import Checkpoints, phase_name
from workbench.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    Interrupted,
    InUse,
)
from workbench.record import (
    RunOptions,
    changed_fields,
    clean_tree,
    command_line,
    describe_environment,
    files_in,
    finite_or_null,
    plain_number,
    settings_key,
    settings_of,
    to_plain,
)

if TYPE_CHECKING:
    import torch

    from workbench.device import Device

__all__ = ["Run", "RunOptions", "finite_or_null", "settings_key", "settings_of", "to_plain"]

Item = TypeVar("Item")
LOG_BUFFER = 64
_OPEN: ContextVar[int] = ContextVar("runs within one another", default=0)
REPORT_ROWS = 120  # of a table in report.md; the CSV has all
SPARE_BYTES = 32 * 2**20  # demanded free before work begins


class Run:
    """A recorded, locked, resumable run; use it as `with Run.open("mad.train", experiment) as run`.

    `finished` tells that the result is already there (`results`); a script then returns it.
    """

    def __init__(self, name: str, experiment: Any):
        package, _, script = name.partition(".")
        self.name, self.package, self.script = name, package, script
        self.options: RunOptions = getattr(experiment, "run", RunOptions())
        self.settings = settings_of(experiment)
        self.key = settings_key(name, self.settings)
        folder = self.options.name or f"{script}-{self.key[:8]}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", folder):
            raise ConfigError(
                f"--name {folder[:120]!r}: expected letters, digits, '.', '_' and '-', at most 100"
            )
        self.directory = Path(self.options.root) / package / folder
        self.streams = seeding.Streams(int(self.settings.get("seed", 0) or 0))
        self.finished = False
        self.results: dict[str, Any] = {}
        self.phase = "train"
        self._checkpoints = Checkpoints(
            self.directory / "checkpoints",
            self.key,
            note=self.note,
            allow_divergence=self.options.allow_divergence,
        )
        self._record: dict[str, Any] = {}
        self._device: Device | None = None
        self._environment: dict[str, Any] = {}
        self._signal = 0
        self._outer: Run | None = None
        self._buffer: list[str] = []
        self._metrics_bytes = 0
        self._logged: Counter[tuple[str, int, tuple[str, ...]]] = Counter()
        self._figures: list[dict[str, str]] = []
        self._tables: list[dict[str, str]] = []
        self._seconds_before = 0.0
        self._begin = time.monotonic()
        self._exit = contextlib.ExitStack()
        self._tracker: Any = None

    @classmethod
    def open(cls, name: str, experiment: Any) -> Run:
        """The run of `experiment` by the script `package.script`; enter it with `with`."""
        return cls(name, experiment)

    # ------------------------------------------------------------ life

    def __enter__(self) -> Run:
        try:
            self._prepare_directory()
            if not self.finished:
                self._begin_recording()
        except BaseException as error:
            self._exit.close()
            if _is_disk_full(error):
                raise CheckpointError(self._disk_message(error)) from None
            raise
        self._exit.callback(_OPEN.reset, _OPEN.set(_OPEN.get() + 1))
        if self.finished and self._outermost:
            since = "".join(f"; {path} has changed since" for path in self._changed_inputs())
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(
                    f"finished before: {self._report} (--fresh computes again){since}\n"
                )
        return self

    def _changed_inputs(self) -> list[str]:
        """Model folders whose files are not those that this finished run has read."""
        with contextlib.suppress(DataError, OSError, AttributeError):
            known = storage.read_json(self.directory / "environment.json").get("inputs", {})
            return [path for path, files in known.items() if files_in(path) not in ({}, files)]
        return []

    @property
    def _report(self) -> Path:
        return self.directory / "report.md"

    @property
    def _outermost(self) -> bool:
        """No run of a run, nor one of a sweep's workers: its user reads the console."""
        return _OPEN.get() == 1 and multiprocessing.parent_process() is None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if not self.finished and kind is not None and not issubclass(kind, Interrupted):
                with contextlib.suppress(OSError):
                    self.note(f"stopped by {kind.__name__}: {str(error)[:500]}", console=False)
            if self._tracker is not None:
                self._tracker.close()
            with contextlib.suppress(OSError, CheckpointError):
                self._flush()
        finally:
            self._exit.close()
        if _is_disk_full(error):
            raise CheckpointError(self._disk_message(error)) from None

    def _disk_message(self, error: BaseException) -> str:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.directory).free
            return (
                f"cannot write {getattr(error, 'filename', None) or self.directory}: {error} "
                f"({free} bytes free); what was saved before is intact, free some space and run "
                "the same command to continue"
            )
        return f"cannot write {self.directory}: {error}"

    def _prepare_directory(self) -> None:
        parent = self.directory.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._lock()
            if self.options.fresh and self.directory.exists():
                self._move_aside()
            self.directory.mkdir(exist_ok=True)
            probe = self.directory / f".tmp-{os.getpid()}-probe"
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
        except OSError as error:
            if _is_disk_full(error):
                raise
            raise ConfigError(
                f"cannot write to {self.directory}: {error.strerror or error}; "
                "choose another folder with --root"
            ) from None
        storage.sweep_litter(self.directory)
        self._compare_settings()
        results = self.directory / "results.json"
        if results.is_file():
            try:
                self._record = storage.read_json(results)
                self.results = self._record["values"]
                self.finished = True
                return
            except (DataError, KeyError, TypeError) as error:
                results.rename(results.with_name(f"results.damaged-{int(time.time())}.json"))
                sys.stderr.write(f"{results}: damaged ({error}); put aside, computing again\n")
        free = shutil.disk_usage(self.directory).free
        if free < SPARE_BYTES:
            raise ConfigError(
                f"{self.directory}: {free} bytes free, at least {SPARE_BYTES} needed; "
                "free some space or choose another disk with --root"
            )

    def _lock(self) -> None:
        import filelock

        folder = self.directory.parent / ".locks"
        folder.mkdir(exist_ok=True)
        path = folder / f"{self.directory.name}.lock"
        owner = folder / f"{self.directory.name}.owner"
        try:
            lock: Any = filelock.FileLock(path, timeout=0)
            lock.acquire()
        except (NotImplementedError, OSError) as error:
            if isinstance(error, filelock.Timeout):
                raise InUse(self._lock_message(owner)) from None
            # A file system without locks (some NFS): the file's existence is the lock.
            lock = filelock.SoftFileLock(path.with_suffix(".softlock"), timeout=0)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise InUse(
                    self._lock_message(owner)
                    + f"; if that process is gone, delete {path.with_suffix('.softlock')}"
                ) from None
        self._exit.callback(lock.release)
        owner.write_text(
            f"process {os.getpid()} on {socket.gethostname()} since "
            f"{datetime.datetime.now().isoformat(timespec='seconds')}",
            encoding="utf-8",
        )

    def _lock_message(self, owner: Path) -> str:
        who = "another process"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            who = owner.read_text(encoding="utf-8")
        return (
            f"{self.directory} is in use by {who}; wait for it, stop it, "
            "or choose another folder with --name"
        )

    def _move_aside(self) -> None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        target = self.directory.with_name(f"{self.directory.name}.old-{stamp}")
        count = 0
        while target.exists():
            count += 1
            target = target.with_name(f"{self.directory.name}.old-{stamp}-{count}")
        self.directory.rename(target)

    def _compare_settings(self) -> None:
        path = self.directory / "config.yaml"
        if path.is_file():
            try:
                old = yaml.safe_load(path.read_text(encoding="utf-8"))
                old.pop("run", None)
            except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
                raise CheckpointError(
                    f"{path}: damaged; use --fresh to put this run aside and begin anew"
                ) from None
            changed = changed_fields(old, self.settings)
            if changed:
                raise ConfigError(
                    f"{self.directory} holds a run with other settings:\n  "
                    + "\n  ".join(changed[:12])
                    + "\nchoose another --name, or --fresh to put the old run aside"
                )
        else:
            text = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
            storage.write_text(path, text)

    def _begin_recording(self) -> None:
        checkpoint = self._checkpoints.newest()
        self._restore_metrics(checkpoint["metrics_bytes"] if checkpoint else 0)
        if checkpoint:
            self._seconds_before = float(checkpoint["seconds"])
        self._install_signal_handlers()
        self._environment = describe_environment()
        storage.write_json(self.directory / "environment.json", self._environment)
        self.note(f"{self._environment['command']}   [{self.directory}]", console=False)
        if self.options.wandb:
            from workbench.integrations.wandb import start_tracker

            self._tracker = start_tracker(
                project=self.options.wandb_project or self.package,
                name=self.directory.name,
                config=self.settings,
                directory=self.directory,
            )

    # ------------------------------------------------------------ signals

    def _install_signal_handlers(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            old = signal.signal(number, self._on_signal)
            self._exit.callback(signal.signal, number, old)
            outer = getattr(old, "__self__", None)
            if isinstance(outer, Run):  # a run inside a run: told to stop, both stop
                self._outer, self._signal = outer, self._signal or outer._signal

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal:
            raise Interrupted(number, "stopped at once; run the same command to continue")
        self._signal = number
        outer = self._outer
        while outer is not None:
            outer._signal, outer = number, outer._outer
        os.write(2, b"\nfinishing this step, then saving (once more to stop at once)\n")

    def check_interrupt(self) -> None:
        """Raise `Interrupted` when SIGTERM or Ctrl-C arrived; call it in any long loop."""
        if self._signal:
            raise Interrupted(
                self._signal, "stopped; finished parts are saved, run the same command to continue"
            )

    def progress(
        self, items: Iterable[Item], label: str = "", total: int | None = None
    ) -> Iterator[Item]:
        """Iterate with a progress bar and an interrupt check after each item."""
        from tqdm import tqdm

        for item in tqdm(items, desc=label, total=total, leave=False, disable=None):
            yield item
            self.check_interrupt()

    # ------------------------------------------------------------ device and log

    @property
    def device(self) -> Device:
        """Device, dtype and threads, chosen at the first use and written to the log."""
        if self._device is None:
            from workbench.device import choose

            options = self.options
            self._device = choose(options.device, options.dtype, options.threads)
            self.note(f"computing on {self._device.describe()}")
            if not self.finished:
                self._environment["device"] = self._device.describe()
                storage.write_json(self.directory / "environment.json", self._environment)
        return self._device

    @property
    def seconds(self) -> float:
        """Seconds spent in this run, earlier sessions included up to their last checkpoint."""
        return self._seconds_before + time.monotonic() - self._begin

    def note(self, text: str, console: bool = True) -> None:
        """Write a line to log.txt and, by default, to the console."""
        if console:
            from tqdm import tqdm

            with contextlib.suppress(OSError, ValueError):
                tqdm.write(text, file=sys.stderr)
        with open(self.directory / "log.txt", "a", encoding="utf-8", errors="replace") as handle:
            handle.write(f"{datetime.datetime.now().isoformat(timespec='seconds')} {text}\n")

    # ------------------------------------------------------------ inputs

    def require_same(self, what: str, digest: str) -> None:
        """Refuse to continue with another input under the name of the one the run began with.

        Finished units belong to the input that they were made from; the settings only name it.

        Raises:
            ConfigError: `digest` of `what` differs from the one kept in units/input-<what>.
        """
        known = self.once(f"input-{what}", lambda: {"sha256": digest})["sha256"]
        if known != digest:
            raise ConfigError(
                f"{self.directory}: {what} has changed since this run began (sha256 {digest[:12]}, "
                f"then {known[:12]}); use --fresh to begin anew, or bring the old one back"
            )

    def load_model(self, spec: str | Path, what: str = "model", **options: Any) -> Any:
        """Model and tokenizer of `spec` on this run's device, the weights those it began with.

        `options` go to `workbench.models.load_model`; the dtype is the run's unless given.
        """
        from workbench.models import load_model, weights_digest

        place = {"device": self.device.device, "dtype": self.device.dtype, **options}
        files = files_in(spec)
        if files and not self.finished:
            self._environment.setdefault("inputs", {})[str(spec)] = files
            storage.write_json(self.directory / "environment.json", self._environment)
        model, tokenizer = load_model(spec, **place)
        self.require_same(what, weights_digest(model))
        return model, tokenizer

    # ------------------------------------------------------------ metrics

    def every(self, step: int, period: int) -> bool:
        """True at each multiple of `period` (never when it is 0)."""
        return period > 0 and step % period == 0

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line of scalars to metrics.jsonl (tensors stay on the device until flushed).

        On resume a line of the same phase, step and names that survived is not written twice.
        """
        identity = (self.phase, int(step), tuple(sorted(values)))
        if self._logged[identity]:
            return
        self._logged[identity] += 1
        plain = finite_or_null(values)
        line = {"step": int(step), "phase": self.phase, "seconds": round(self.seconds, 3), **plain}
        self._buffer.append(json.dumps(line, allow_nan=False, ensure_ascii=False))
        if self._tracker is not None:
            self._tracker.log(int(step), {k: v for k, v in plain.items() if k != "non_finite"})
        if len(self._buffer) >= LOG_BUFFER:
            self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        data = ("\n".join(self._buffer) + "\n").encode()
        try:
            with open(self.directory / "metrics.jsonl", "ab") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.directory / 'metrics.jsonl'}: {error.strerror}; "
                "free some space and run the same command to continue"
            ) from None
        self._metrics_bytes += len(data)
        self._buffer.clear()

    def _restore_metrics(self, size: int) -> None:
        """Cut metrics.jsonl back to what the newest checkpoint had seen."""
        path = self.directory / "metrics.jsonl"
        if not path.is_file():
            size = 0
            path.touch()
        elif path.stat().st_size < size:
            size = path.stat().st_size
        with open(path, "r+b") as handle:
            data = handle.read(size)
            size = data.rfind(b"\n") + 1
            handle.truncate(size)
        self._metrics_bytes = size
        for raw in data[:size].splitlines():
            try:
                line = storage.parse_json(raw.decode("utf-8"))
                names = set(line) - {"step", "phase", "seconds", "non_finite"}
                self._logged[(line["phase"], line["step"], tuple(sorted(names)))] += 1
            except (ValueError, KeyError, TypeError):
                continue  # an altered line is kept as it is; it hides no other

    def require_finite(self, step: int, batch: Mapping[str, Any] | None = None, **values: Any):
        """Raise `DivergedError` before the update when a loss or gradient norm is not finite.

        The batch is saved as `diverged_step_<n>` for inspection; the last checkpoint is untouched.
        """
        numbers = {k: float(plain_number(v)) for k, v in values.items()}
        bad = {k: v for k, v in numbers.items() if not math.isfinite(v)}
        if not bad or self.options.allow_divergence:
            return
        folder = self.directory / f"diverged_step_{step:08d}"
        storage.save_tree(folder, {"step": step, "values": bad, "batch": dict(batch or {})})
        raise DivergedError(
            f"{', '.join(f'{k} = {v}' for k, v in bad.items())} at step {step}; the batch is in "
            f"{folder}; lower the learning rate, or pass --allow-divergence to go on"
        )

    # ------------------------------------------------------------ checkpoints

    def steps(
        self,
        total: int,
        state: Mapping[str, Any],
        *,
        save_every: int = 100,
        phase: str = "train",
        label: str | None = None,
    ) -> Iterator[int]:
        """Yield 1..total, beginning after the last checkpoint of this phase.

        `state` maps names to objects with `state_dict` and `load_state_dict`: everything that must
        survive a crash. It is saved at step 0, every `save_every` steps, at the end, and on SIGTERM
        or Ctrl-C after the step that was under way. A run may have several phases, one after the
        other; each needs its own name.
        """
        from tqdm import tqdm

        self.phase = phase
        start = self._checkpoints.resume(phase, state)
        if start is None:
            seeding.set_global(self.streams.integer(f"global/{phase}"))
            self.save(0, state)
            start = 0
        elif start:
            self.note(f"{phase}: continuing after step {start} of {total}", console=start < total)
        if start >= total:
            return
        bar = tqdm(total=total, initial=start, desc=label or phase, leave=False, disable=None)
        with bar:
            for step in range(start + 1, total + 1):
                self.phase = phase
                yield step
                bar.update()
                if step == total or self.every(step, save_every) or self._signal:
                    self.save(step, state)
                if self._signal:
                    raise Interrupted(
                        self._signal, f"saved step {step}; run the same command to continue"
                    )
        self.check_interrupt()

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint of the current phase; older ones but the last two are removed."""
        self._flush()
        return self._checkpoints.save(self.phase, step, state, self._progress_so_far())

    def keep_best(
        self, step: int, state: Mapping[str, Any], score: float, *, higher: bool = True
    ) -> bool:
        """Write `checkpoints/<phase>/best` when `score` beats the one kept there; True if so."""
        facts = self._progress_so_far()
        return self._checkpoints.keep_best(self.phase, step, state, facts, score, higher=higher)

    def load_best(self, state: Mapping[str, Any], phase: str | None = None) -> int:
        """Put the state that `keep_best` kept back into the objects; its step."""
        return self._checkpoints.load_best(phase or self.phase, state)

    def _progress_so_far(self) -> dict[str, Any]:
        return {"metrics_bytes": self._metrics_bytes, "seconds": round(self.seconds, 3)}

    # ------------------------------------------------------------ finished parts and artefacts

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The tree that `compute()` returns, computed once and then read from `units/<name>`.

        A damaged unit is reported and computed again. Tensors come back on the CPU.
        """
        path = self.directory / "units" / phase_name(name)
        if path.is_dir():
            try:
                header = storage.read_header(path)
                if header.get("unit") == name and header.get("run") == self.key:
                    return storage.load_tree(path)
                raise CheckpointError(f"{path}: belongs to another run or unit")
            except CheckpointError as error:
                self.note(f"unit computed again: {error}")
        self.check_interrupt()
        tree = compute()
        try:
            storage.save_tree(path, tree, {"unit": name, "run": self.key})
        except OSError as error:
            free = shutil.disk_usage(self.directory).free
            raise CheckpointError(
                f"cannot write {path}: {error} ({free} bytes free); free some space and run the "
                "same command to continue"
            ) from None
        self.check_interrupt()
        return storage.load_tree(path)

    def path(self, name: str) -> Path:
        """A path inside the run's folder; names that would leave it are refused."""
        target = (self.directory / name).resolve()
        if not target.is_relative_to(self.directory.resolve()):
            raise ConfigError(f"{name!r} would lie outside of {self.directory}")
        target.parent.mkdir(parents=True, exist_ok=True)
        return self.directory / name

    def save_tensors(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write an artefact as safetensors into the run's folder."""
        return storage.write_safetensors(self.path(name), tensors, metadata)

    def save_json(self, name: str, value: Any) -> Path:
        """Write an artefact as strict JSON into the run's folder."""
        return storage.write_json(self.path(name), clean_tree(value))

    def save_text(self, name: str, text: str) -> Path:
        """Write text into the run's folder."""
        return storage.write_text(self.path(name), text)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], caption: str = "") -> Path:
        """Write `tables/<name>.csv` and list it for the report."""
        from workbench.tables import write_csv

        path = self.path(f"tables/{name}.csv")
        write_csv(path, rows)
        self._tables.append({"name": name, "caption": caption})
        return path

    def figure(
        self, name: str, figure: Any, rows: Sequence[Mapping[str, Any]], caption: str, alt: str
    ) -> Path:
        """Write `figures/<name>.svg`, `.png` (200 dpi) and the `.csv` behind it; list it."""
        from matplotlib import rc_context

        from workbench.tables import write_csv

        self.check_interrupt()
        svg = self.path(f"figures/{name}.svg")
        facts = {"Title": caption, "Description": alt, "Date": None, "Creator": "fivefold"}
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            storage.atomic_write(
                svg,
                lambda p: figure.savefig(p, format="svg", bbox_inches="tight", metadata=facts),
            )
        storage.atomic_write(
            svg.with_suffix(".png"),
            lambda p: figure.savefig(p, format="png", dpi=200, bbox_inches="tight"),
        )
        write_csv(svg.with_suffix(".csv"), rows)
        self._figures.append({"name": name, "caption": caption, "alt": alt})
        return svg

    def finish(
        self,
        values: Mapping[str, Any],
        *,
        title: str = "",
        question: str = "",
        summary: str = "",
        headline: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write report.md and then results.json, whose presence means "done"; return the values.

        `headline` names, in words, the two or three numbers that stand on the report's card.
        """
        from workbench.tables import read_csv, to_markdown

        self.check_interrupt()
        self._flush()
        self._record = {
            "title": title or self.name,
            "question": question,
            "summary": summary,
            "headline": clean_tree(dict(headline or {})),
            "values": clean_tree(values),
            "figures": self._figures,
            "tables": self._tables,
            "command": command_line(),
            "package": self.package,
            "script": self.script,
            "seconds": round(self.seconds, 2),
        }
        parts = [f"# {self._record['title']}\n"]
        parts += [f"{text}\n" for text in (question, summary) if text]
        parts.append(f"```bash\n{self._record['command']}\n```\n")
        for table in self._tables:
            rows = read_csv(self.directory / "tables" / f"{table['name']}.csv")
            parts.append(f"{table['caption']}\n\n{to_markdown(rows[:REPORT_ROWS])}\n")
            if len(rows) > REPORT_ROWS:
                parts.append(f"{len(rows) - REPORT_ROWS} more rows: tables/{table['name']}.csv\n")
        for drawn in self._figures:
            parts.append(f"![{drawn['alt']}](figures/{drawn['name']}.png)\n\n{drawn['caption']}\n")
        storage.write_text(self._report, "\n".join(parts))
        storage.write_json(self.directory / "results.json", self._record)
        self.results = self._record["values"]
        self.finished = True
        if self._outermost:
            with contextlib.suppress(OSError):
                self.note(f"report: {self._report}")
        return self.results


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _is_disk_full(error: BaseException | None) -> bool:
    """True for a full disk or quota, also where a native writer reports it as text."""
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    words = ("No space left on device", "File too large", "Disk quota exceeded")
    return type(error).__name__ == "SafetensorError" and any(w in str(error) for w in words)
