"""A process that has imported everything and forks once per trial: a trial costs no import.

python -m tests.drill.warm     one JSON request per line on stdin, one JSON reply per line on stdout

In the fork, file events ("open for writing", rename, remove, mkdir, rmdir, fsync), steps, units,
progress items and parts of the report are counted; at the k-th one the trial's fault strikes.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
REPORT = ("figure", "table", "finish", "save_tensors", "save_json", "save_text")
KILLED, CRASHED = 77, 70
SIGNALS = {"term": [signal.SIGTERM], "int": [signal.SIGINT], "int2": [signal.SIGINT] * 2}
HEAVY = (
    "torch", "numpy", "safetensors.torch", "matplotlib.backends.backend_agg", "tyro",
    "matplotlib.backends.backend_svg", "sklearn.metrics", "transformers.generation.utils",
    "transformers.models.mistral.modeling_mistral",
)  # fmt: skip


# ---------------------------------------------------------------- in the fork


class Trial:
    """Counts events under labels that tell what the run is doing.

    The fault strikes at the `strike_at`-th event (0: never) whose label begins with `within`.
    """

    def __init__(self, fault: str, strike_at: int, within: str, tell: Any):
        self.fault, self.strike_at, self.within, self.tell = fault, strike_at, within, tell
        self.labels: list[str] = []
        self.count = 0
        self.label, self.active = "set-up", True
        self.network: list[str] = []
        self.later: list[str] = []  # what was begun after a signal had come

    def event(self, path: str = "") -> None:
        """One more; perhaps the last."""
        if not self.active:
            return
        self.labels.append(self.label)
        self.count += self.label.startswith(self.within)
        if self.count != self.strike_at or not self.label.startswith(self.within):
            return
        if self.fault == "kill":
            os._exit(KILLED)
        if self.fault == "full":
            self.active = False
            raise OSError(errno.ENOSPC, "No space left on device", path)
        self.tell({"struck": time.monotonic(), "label": self.label})
        for number in SIGNALS[self.fault]:
            os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def doing(self, label: str) -> Iterator[None]:
        """Events inside are counted under `label`; one is at the start."""
        before, self.label = self.label, label
        if 0 < self.strike_at <= self.count:
            self.later.append(label)
        try:
            self.event()
            yield
        finally:
            self.label = before

    def install(self) -> None:
        """Hooks on files, sockets and `Run`."""
        import safetensors.torch as native

        from workbench.run import Run

        real_save = native.save_file

        def fsync(descriptor: int) -> None:  # a killed process loses nothing that the kernel has
            self.event()

        def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
            self.event(str(filename))
            real_save(tensors, filename, metadata=metadata)
            due = self.count + 1 == self.strike_at and self.label.startswith(self.within)
            if self.active and self.fault == "kill" and due:
                os.truncate(filename, os.path.getsize(filename) // 2)
            self.event(str(filename))

        os.fsync, native.save_file = fsync, save_file

        def hook(name: str, arguments: tuple[Any, ...]) -> None:
            if name in EVENTS or (
                name == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
            ):
                self.event(str(arguments[0]))
            elif name in NETWORK:
                self.network.append(f"{name} {arguments[1:]}"[:200])

        sys.addaudithook(hook)
        self._wrap_run(Run)

    def _wrap_run(self, run: Any) -> None:
        real_steps, real_once, real_progress = run.steps, run.once, run.progress

        def steps(this: Any, *arguments: Any, **options: Any) -> Any:
            label = f"step {options.get('phase', 'train')}"
            for step in real_steps(this, *arguments, **options):
                with self.doing(label):
                    yield step

        def once(this: Any, name: str, compute: Any) -> Any:
            def computed() -> Any:
                with self.doing(f"unit {name}"):
                    return compute()

            return real_once(this, name, computed)

        def progress(this: Any, items: Any, label: str = "", total: Any = None) -> Any:
            for item in real_progress(this, items, label, total):
                with self.doing(f"progress {label}"):
                    yield item

        run.steps, run.once, run.progress = steps, once, progress
        for name in ("save", *REPORT):
            setattr(run, name, self._labelled(getattr(run, name), name))

    def _labelled(self, function: Any, name: str) -> Any:
        label = name if name in ("save", "finish") else "report"

        def called(*arguments: Any, **options: Any) -> Any:
            with self.doing(label):
                return function(*arguments, **options)

        return called


def run_trial(request: dict[str, Any], descriptor: int) -> int:
    """The script as `python -m` would run it, with the fault; its exit status."""

    def tell(fact: dict[str, Any]) -> None:
        os.write(descriptor, (json.dumps(fact) + "\n").encode())

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.chdir(request["cwd"])
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    from workbench import record
    from workbench.cli import cli

    record._git = lambda *arguments: None
    module = importlib.import_module(request["module"])
    sys.argv = [str(module.__file__), *request["arguments"]]
    trial = Trial(request["fault"], request["at"], request["within"], tell)
    trial.install()
    for name, arguments in request["prepare"]:
        place, _, function = name.partition(":")
        getattr(importlib.import_module(place), function)(*arguments)
    status = CRASHED
    try:
        cli(module.main, module.EXPERIMENT, sweep=getattr(module, "SWEEP", None))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0
    trial.active = False
    sys.stderr.flush()
    tell(
        {
            "labels": trial.labels,
            "network": trial.network,
            "later": trial.later,
            "modules": sorted(sys.modules),
        }
    )
    return status


def serve() -> None:
    """Answer requests until stdin ends."""
    for name in HEAVY:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = CRASHED
            try:
                os.close(reader)
                status = run_trial(request, writer)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        os.close(writer)
        facts = _wait(child, reader, request)
        _import_for_the_next(facts.pop("modules", []))
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


def _wait(child: int, reader: int, request: dict[str, Any]) -> dict[str, Any]:
    begin, text = time.monotonic(), b""
    after, limit = request["after"], request["limit"]
    while True:
        spent = time.monotonic() - begin
        if spent >= min(after, limit):
            os.kill(child, signal.SIGKILL)
            break
        if select.select([reader], [], [], min(after, limit) - spent)[0]:
            part = os.read(reader, 1 << 16)
            text += part
            if not part:
                break
    _, status = os.waitpid(child, 0)
    end = time.monotonic()
    os.close(reader)
    facts: dict[str, Any] = {"seconds": end - begin, "labels": [], "network": []}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # cut by a kill
            facts |= json.loads(line)
    facts["timed_out"] = end - begin >= limit
    facts["stopping_seconds"] = end - facts.get("struck", end)
    facts["status"] = os.waitstatus_to_exitcode(status)
    return facts


def _import_for_the_next(names: list[str]) -> None:
    for name in names:
        if name not in sys.modules and not name.startswith(("__", "tests.")):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


# ---------------------------------------------------------------- the tests' side


class Warm:
    """The process above, asked from a test."""

    def __init__(self, environment: dict[str, str], cwd: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.drill.warm"], env=environment, cwd=cwd,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip

    def run(
        self,
        module: str,
        arguments: list[str],
        cwd: Path,
        *,
        fault: str = "none",
        at: int = 0,
        within: str = "",
        after: float = 1e9,
        prepare: tuple[tuple[str, list[Any]], ...] = (),
        limit: float = 120.0,
    ) -> dict[str, Any]:
        """One trial; the reply holds status, stderr, labels, network, struck, stopping_seconds."""
        cwd.mkdir(parents=True, exist_ok=True)
        request = {
            "module": module, "arguments": arguments, "cwd": str(cwd), "fault": fault, "at": at,
            "within": within, "after": after, "prepare": prepare, "limit": limit,
            "stderr": str(cwd / "trial-stderr.txt"),
        }  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        facts = json.loads(self.process.stdout.readline())
        file = cwd / "trial-stderr.txt"
        facts["stderr"] = file.read_text(encoding="utf-8", errors="replace")
        file.unlink()
        assert facts["status"] != CRASHED, facts["stderr"]
        assert not facts["timed_out"], facts["stderr"]
        return facts

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


if __name__ == "__main__":
    serve()
