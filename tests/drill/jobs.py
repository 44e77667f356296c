"""The methods' tiny jobs in folders of their own, run by the warm process."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.drill.drill_job import fingerprint
from tests.drill.warm import Warm
from tests.test_scripts import TINY

SLICES = {
    "mad.train", "mad.compare", "sdm.reexpress", "lplr_q.run", "early_exit.train",
    "sycomode.consolidate",
}  # fmt: skip
JOBS = {config: module for config, module in TINY.items() if module in SLICES}


def fingerprints(folder: Path) -> dict[str, str]:
    runs = sorted(p.parent for p in folder.rglob("results.json"))
    assert runs
    return {str(r.relative_to(folder)): fingerprint(r) for r in runs}


@dataclass(frozen=True)
class Job:
    """A method's tiny job in a folder of its own, run by the warm process."""

    warm: Warm
    config: Path
    folder: Path

    def run(self, *more: str, **fault: Any) -> dict[str, Any]:
        arguments = ["--config", str(self.config), "--root", str(self.folder), "--threads", "1"]
        arguments += more
        module = JOBS[self.config]
        return self.warm.run(module, arguments, self.folder.with_name("cwd"), **fault)

    def fingerprints(self) -> dict[str, str]:
        return fingerprints(self.folder)


STATUS = {"term": 128 + signal.SIGTERM, "int": 128 + signal.SIGINT, "int2": 128 + signal.SIGINT}
LAST_WORDS = re.compile(r"^interrupted: .*[;,] run the same command to continue$", re.MULTILINE)


def stop(job: Job, fault: str, within: str, at: int) -> str:
    """Send the signal there: the job ends soon, says so in one line, with the right status."""
    done = job.run(fault=fault, within=within, at=at)
    where = f"{fault} at {within!r} {at} ({done.get('label')}): {done['stderr'][-2000:]}"
    assert "struck" in done, f"never came to {where}"
    assert done["stopping_seconds"] <= 5, where
    assert "Traceback" not in done["stderr"], where
    begun = [label for label in done["later"] if label.startswith(("step", "unit", "progress"))]
    assert len(begun) <= 1, f"went on with {begun} after {where}"
    if done["status"] == 0:  # the results were being written: then they are whole
        assert done["label"] in ("finish", "set-up"), where
        assert job.fingerprints(), where
        return "finished"
    assert done["status"] == STATUS[fault], where
    assert len(LAST_WORDS.findall(done["stderr"])) == 1, where
    if fault != "int2" and done["label"].startswith("step"):
        assert re.search(r"^interrupted: saved step \d+; ", done["stderr"], re.MULTILINE), where
    return done["label"]
