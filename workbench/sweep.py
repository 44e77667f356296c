"""Lists of experiments: make them (`grid`), run them serially, in processes, or on Ray.

    experiments = grid(EXPERIMENT, rank=[64, 128], factor_bits=[4, 16])
    results = run_all(main, experiments, executor="process", workers=2)

A sweep needs no state of its own: each experiment finds its run folder by its hash, so running the
sweep again skips what is done and resumes what is not, in whatever executor. A failed or crashed
experiment does not stop the others, and every executor gives the same list in the same order.
The same sweep may be started several times at once, also on several machines with one run folder:
what another process is working on is left to it, and its result is read when it is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from workbench.errors import ConfigError, Interrupted, InUse, shorten, unknown_name

EXECUTORS = ("serial", "process", "ray")
FAILED = "failed"
"""Key of a result that stands for an experiment that did not finish; its value says why."""

BUSY = "busy"
"""Key of a result that stands for an experiment another process is working on."""

WAIT_SECONDS = 0.2, 10.0  # the first wait for such an experiment, and the longest

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def grid(experiment: Any, **choices: Sequence[Any]) -> list[Any]:
    """Every combination of the given field values, as experiments; the first field is slowest.

    A field of a nested dataclass is written `optim__lr=[1e-3, 1e-2]`.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class E:
    ...     a: int = 0
    ...     b: int = 0
    >>> [(e.a, e.b) for e in grid(E(), a=[1, 2], b=[3, 4])]
    [(1, 3), (1, 4), (2, 3), (2, 4)]
    """
    for name, values in choices.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"grid: {name}={values!r}; expected a list of at least one value")
    result = []
    for combination in itertools.product(*choices.values()):
        one = experiment
        for name, value in zip(choices, combination, strict=True):
            one = _replace(one, name.split("__"), value)
        result.append(one)
    return result


def _replace(experiment: Any, path: list[str], value: Any) -> Any:
    names = [f.name for f in dataclasses.fields(experiment)]
    if path[0] not in names:
        raise unknown_name("field", path[0], names)
    if len(path) > 1:
        value = _replace(getattr(experiment, path[0]), path[1:], value)
    return dataclasses.replace(experiment, **{path[0]: value})


def run_all(
    main: Callable[[Any], dict[str, Any]],
    experiments: Sequence[Any],
    *,
    executor: Literal["serial", "process", "ray"] = "serial",
    workers: int = 2,
) -> list[dict[str, Any]]:
    """`main` of every experiment, in the order given; a failure is {"failed": "why"}.

    serial: here, one after the other. process: `workers` spawned processes of one thread each; a
    worker that dies (memory, signal) costs only its own experiment. ray: the same units on a Ray
    cluster or local Ray. Ctrl-C and SIGTERM stop the sweep; the same command continues it.
    """
    if executor not in EXECUTORS:
        raise unknown_name("executor", executor, EXECUTORS)
    if workers < 1:
        raise ConfigError(f"workers={workers}: expected at least 1")
    experiments = list(experiments)
    results = _run_once(main, experiments, executor, workers)
    wait, longest = WAIT_SECONDS
    told = False
    while busy := [i for i, result in enumerate(results) if BUSY in result]:
        if not told:
            told = True
            sys.stderr.write(f"waiting for {len(busy)} of them: {results[busy[0]][BUSY]}\n")
        time.sleep(wait)
        wait = min(longest, 2 * wait)
        again = _run_once(main, [experiments[i] for i in busy], executor, workers)
        for i, result in zip(busy, again, strict=True):
            results[i] = result
    return results


def _run_once(
    main: Callable[[Any], dict[str, Any]], experiments: list[Any], executor: str, workers: int
) -> list[dict[str, Any]]:
    if executor == "serial" or not experiments:
        return [guarded(main, experiment) for experiment in experiments]
    single = [_one_thread(experiment) for experiment in experiments]
    if executor == "ray":
        from workbench.integrations.ray import run_on_ray

        return run_on_ray(main, single, workers)
    return _run_in_processes(main, single, min(workers, len(single)))


def guarded(main: Callable[[Any], dict[str, Any]], experiment: Any) -> dict[str, Any]:
    """`main(experiment)`, or {"failed": "ErrorClass: message"}; interruption is passed on."""
    try:
        return main(experiment)
    except InUse as error:
        return {BUSY: str(error)}
    except Exception as error:
        return {FAILED: shorten(f"{type(error).__name__}: {error}", 500)}


def _one_thread(experiment: Any) -> Any:
    """The experiment with `run.threads=1` if it left the number open; its hash is unchanged."""
    options = getattr(experiment, "run", None)
    if dataclasses.is_dataclass(options) and getattr(options, "threads", 1) == 0:
        return dataclasses.replace(experiment, run=dataclasses.replace(options, threads=1))
    return experiment


def single_thread_environment() -> dict[str, str]:
    """Environment of a worker that shares the machine with others."""
    return {**dict.fromkeys(_THREAD_VARIABLES, "1"), "TOKENIZERS_PARALLELISM": "false"}


def _prepare_worker(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone.

    A sweep killed with SIGKILL cannot tell its workers; left alone they would go on holding the
    locks of their runs, and the same command would find them in use.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Worker:
    """One process that is replaced when it dies."""

    def __init__(self, main: Callable[[Any], dict[str, Any]]):
        self.main = main
        self.pool: ProcessPoolExecutor | None = None

    def run(self, experiment: Any) -> dict[str, Any]:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(
                max_workers=1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_prepare_worker,
                initargs=(single_thread_environment(),),
            )
        try:
            return self.pool.submit(_unit, self.main, experiment).result()
        except BrokenProcessPool:
            self.close()
            return {FAILED: "the worker process died (out of memory, or killed by a signal)"}

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None


def _unit(main: Callable[[Any], dict[str, Any]], experiment: Any) -> dict[str, Any]:
    """What a worker process runs; an interruption is reported as a value, not as a dead worker."""
    try:
        return guarded(main, experiment)
    except Interrupted as stopped:
        return {"interrupted": stopped.signal_number, "message": str(stopped)}
    except KeyboardInterrupt:
        return {"interrupted": int(signal.SIGINT), "message": "interrupted"}


def _run_in_processes(
    main: Callable[[Any], dict[str, Any]], experiments: list[Any], workers: int
) -> list[dict[str, Any]]:
    free = [_Worker(main) for _ in range(workers)]
    everyone = list(free)

    def work(experiment: Any) -> dict[str, Any]:
        worker = free.pop()  # as many workers as threads: one is always free
        try:
            return worker.run(experiment)
        finally:
            free.append(worker)

    threads = ThreadPoolExecutor(max_workers=workers)
    try:
        results = []
        for result in threads.map(work, experiments):
            raise_if_interrupted(result)
            results.append(result)
        return results
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        for worker in everyone:
            worker.close()


def raise_if_interrupted(result: dict[str, Any]) -> None:
    """Raises `Interrupted` if a worker was stopped by a signal."""
    if "interrupted" in result and "message" in result:
        raise Interrupted(int(result["interrupted"]), f"{result['message']}; sweep stopped")
