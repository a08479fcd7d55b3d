"""Run every benchmark of this folder, two at a time, and put their figures into one table.

    python benchmarks/run_all.py --data-dir DIR

``DIR`` has a folder for each data set that a script takes as ``--data NAME=...`` (``DIR/mnist``,
``nhanes``, ``pneumonia``, ``imdb_counterfactual``, ``atex_fashion``). Scripts whose data are not
there are skipped, unless their docstring has them in brackets, and the summary says so; a script
that fails does not keep the others from running. Heavy scripts run at a reduced size unless
``--full`` is given, under which the stability study runs at more than its own. ``--authors-code``
goes to the scripts that take it. The table is ``summary.md`` in the output folder. Times are of the
processor, and runs take turns within a script, so that a neighbour moves ratios little; ``--jobs
1`` for none.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _claims import table as claims_table
from _summary import write

HERE = Path(__file__).parent
# What fits the whole into half an hour on two cores.
REDUCED = {
    name: ["--quick"]
    for name in (
        *("atex_explainers", "decoy_mnist", "fused_attention", "recompute_memory"),
        *("relu_differentiation", "right_reasons", "stability_study"),
    )
} | {
    "batch_norm": ["--core"],
    "nhanes_references": ["--seeds", "20"],
    "nhanes_sparsity": ["--seeds", "10"],
    "pixel_prior": ["--seeds", "3"],
}
# With --full: what is more than a script's own size.
FULL = {
    "stability_study": [
        *("--images", "500", "--restarts", "3", "--maps", "500"),
        *("--maps-radii", "0.01", "0.02", "0.05", "0.1", "0.2"),
    ]
}
# Those that take longest go first, so that none of them is left to run alone.
FIRST = (
    *("batch_norm", "pixel_prior", "nhanes_sparsity", "nhanes_references", "training_step"),
    "stability_study",
    "choose_weight",
)


def data_sets(script: Path, *, optional: bool = False) -> list[str]:
    """Names of the data sets that a script wants, from the command line in its docstring."""
    written = r"\[--data (\w+)=DIR\]" if optional else r"(?<!\[)--data (\w+)=DIR"
    return re.findall(written, script.read_text(encoding="utf-8"))


def command(
    script: Path, data_dir: Path | None, options: list[str], authors_code: Path | None = None
) -> list[str] | None:
    """Return the command that runs a script, or None where its data are missing."""
    found = [sys.executable, str(script), *options]
    text = script.read_text(encoding="utf-8")
    if re.search(r"(args|options)\.jobs", text):
        found += ["--jobs", "1"]
    if authors_code is not None and "options.authors_code" in text:
        found += ["--authors-code", str(authors_code)]
    for optional in (False, True):
        for name in data_sets(script, optional=optional):
            if data_dir is not None and (data_dir / name).is_dir():
                found += ["--data", f"{name}={data_dir / name}"]
            elif not optional:
                return None
    return found


def main() -> int:
    """Run all; the exit status is 1 where any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--authors-code", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("bench-output"))
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="every script at its own size")
    size.add_argument("--quick", action="store_true", help="fewer settings and repeats everywhere")
    parser.add_argument("--jobs", type=int, default=2, help="scripts at a time")
    parser.add_argument("--only", nargs="*", default=None, help="names of scripts")
    options = parser.parse_args()
    passed_on = ["--output", str(options.output), *(["--quick"] if options.quick else [])]
    scripts = [s for s in sorted(HERE.glob("[a-z]*.py")) if s != Path(__file__)]
    scripts.sort(key=lambda script: script.stem not in FIRST)
    if options.only is not None:
        scripts = [script for script in scripts if script.stem in options.only]

    def outcome(script: Path) -> str:
        sizes: dict[str, list[str]] = {} if options.quick else FULL if options.full else REDUCED
        given = [*passed_on, *sizes.get(script.stem, [])]
        run = command(script, options.data_dir, given, options.authors_code)
        if run is None:
            return "skipped: needs " + ", ".join(f"DIR/{name}" for name in data_sets(script))
        start = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            run,
            check=False,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.perf_counter() - start
        found = f"{'done' if done.returncode == 0 else 'FAILED'}, {seconds:.0f} s"
        print(f"\n{script.stem}: {found}\n{done.stdout}", flush=True)
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = dict(zip((s.stem for s in scripts), pool.map(outcome, scripts), strict=True))
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"\n{write(options.output, claims_table(options.output))}")
    for name, found in outcomes.items():
        print(f"{name:24} {found}")
    return int(any(found.startswith("FAILED") for found in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
