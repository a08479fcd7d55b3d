"""Run every benchmark of this folder, one after the other, and put their figures into one table.

    python benchmarks/run_all.py --data-dir DIR

``DIR`` has a folder for each data set that a script takes as ``--data NAME=...`` (``DIR/mnist``,
``DIR/nhanes``). Scripts whose data are not there are skipped, and the summary says so; a script
that fails does not keep the others from running. Heavy scripts run at a reduced size unless
``--full`` is given. The table is ``summary.md`` in the output folder.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from _summary import write

HERE = Path(__file__).parent
# What fits the whole into half an hour on two cores.
REDUCED = {"stability_study": ["--quick"], "relu_differentiation": ["--quick"]}


def data_sets(script: Path) -> list[str]:
    """Names of the data sets that a script wants, from the command line in its docstring."""
    return re.findall(r"--data (\w+)=DIR", script.read_text(encoding="utf-8"))


def command(script: Path, data_dir: Path | None, options: list[str]) -> list[str] | None:
    """Return the command that runs a script, or None where its data are missing."""
    found = [sys.executable, str(script), *options]
    for name in data_sets(script):
        if data_dir is None or not (data_dir / name).is_dir():
            return None
        found += ["--data", f"{name}={data_dir / name}"]
    return found


def main() -> int:
    """Run all; the exit status is 1 where any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("bench-output"))
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="every script at its own size")
    size.add_argument("--quick", action="store_true", help="fewer settings and repeats everywhere")
    parser.add_argument("--only", nargs="*", default=None, help="names of scripts")
    options = parser.parse_args()
    passed_on = ["--output", str(options.output), *(["--quick"] if options.quick else [])]
    outcomes: dict[str, str] = {}
    scripts = [s for s in sorted(HERE.glob("[a-z]*.py")) if s != Path(__file__)]
    for script in scripts:
        if options.only is not None and script.stem not in options.only:
            continue
        reduced = [] if options.full or options.quick else REDUCED.get(script.stem, [])
        run = command(script, options.data_dir, [*passed_on, *reduced])
        if run is None:
            outcomes[script.stem] = "skipped: needs " + ", ".join(
                f"DIR/{name}" for name in data_sets(script)
            )
            continue
        print(f"\n{script.stem}", flush=True)
        start = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        status = subprocess.run(run, check=False, env=environment).returncode
        seconds = time.perf_counter() - start
        outcomes[script.stem] = f"{'done' if status == 0 else 'FAILED'}, {seconds:.0f} s"
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"\n{write(options.output)}")
    for name, outcome in outcomes.items():
        print(f"{name:24} {outcome}")
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
