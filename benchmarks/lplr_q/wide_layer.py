"""A decoder layer 4096 wide, matrix by matrix: seconds, peak memory and error on one CPU thread.

    python benchmarks/lplr_q/wide_layer.py --only q_proj          # about five minutes
    python benchmarks/lplr_q/wide_layer.py                        # the seven of a 7B model's layer
    python benchmarks/lplr_q/wide_layer.py --width 512 --inner 1376 --rank 32      # a quick look

Random weights and Hessians with decaying spectra, read from files as in a real run. Each matrix is
a process of its own, measured as in memory.py; a row is written as soon as it is there.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from memory import compress, status, write_case

from lplr_q import manifest
from workbench.tables import read_csv, write_csv

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def measure(folder: Path, rank: int) -> None:
    """Print peak bytes, CPU seconds and error of the case in the folder."""
    import time

    write_case(folder / "small", 64, 64)
    compress(folder / "small", "out", 8)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, begin = status("VmRSS"), time.process_time()
    compress(folder, "out", rank)
    (record,) = (folder / "out" / manifest.WORK).glob("*.json")
    unit = manifest.read_record(folder / "out", record.stem)
    assert unit is not None
    peak = status("VmHWM") - before
    print(peak, time.process_time() - begin, unit["error"], unit["bits_per_weight"])


def main() -> None:
    """Compress the matrices, each in a process of its own; a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments.folder, arguments.rank)
        return
    table = Path(__file__).with_suffix(".csv")
    rows = read_csv(table) if table.is_file() else []
    for name in arguments.only:
        outputs = arguments.inner if name in ("gate_proj", "up_proj") else arguments.width
        inputs = arguments.inner if name == "down_proj" else arguments.width
        with tempfile.TemporaryDirectory() as folder:
            write_case(Path(folder), outputs, inputs)
            done = subprocess.run(
                [sys.executable, __file__, "--folder", folder, "--rank", str(arguments.rank)],
                capture_output=True, text=True, check=True,
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        peak, seconds, error, bits = map(float, done.stdout.split())
        bound = 12 * outputs * inputs + 16 * inputs * inputs
        row = {
            "matrix": name,
            "outputs": outputs,
            "inputs": inputs,
            "rank": arguments.rank,
            "cpu_seconds": seconds,
            "peak_mb": peak / 2**20,
            "ratio_to_bound": peak / bound,
            "error": error,
            "bits_per_weight": bits,
        }
        rows = [r for r in rows if list(r.values())[:4] != list(row.values())[:4]] + [row]
        print("  ".join(f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in row.items()))
        write_csv(table, rows)


if __name__ == "__main__":
    main()
