"""Sweeps on Ray: the same unit function as the process pool, on one machine or a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.engines import need
from workbench.sweep import _unit, raise_if_interrupted, single_thread_environment


def run_on_ray(
    main: Callable[[Any], dict[str, Any]], experiments: list[Any], workers: int
) -> list[dict[str, Any]]:
    """`main` of every experiment as Ray tasks, results in the order given.

    Joins the cluster named by RAY_ADDRESS, else starts a local Ray with `workers` processors and
    stops it afterwards. A task whose worker dies is reported as failed, not retried here: the
    sweep's next call resumes it from its run folder.
    """
    ray = need("ray", feature="--executor ray")
    from workbench.sweep import FAILED

    started = not ray.is_initialized()
    if started:
        import os

        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": single_thread_environment()},
            **local,
        )
    try:
        task = ray.remote(num_cpus=1, max_retries=0)(_unit)
        pending = [task.remote(main, experiment) for experiment in experiments]
        results = []
        for reference in pending:
            try:
                result = ray.get(reference)
            except ray.exceptions.WorkerCrashedError:
                result = {FAILED: "the worker process died (out of memory, or killed by a signal)"}
            raise_if_interrupted(result)
            results.append(result)
        return results
    finally:
        if started:
            ray.shutdown()
