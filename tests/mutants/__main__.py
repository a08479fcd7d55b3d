"""Show that the tests see wrong numbers: make one small mistake at a time and run its test.

``python -m tests.mutants [-j JOBS] [PART OF A NAME, FILE OR TEST ...]`` reads ``mutants.txt``: the
text of a mutant stands exactly once in its file, and its test passes, but fails with the mistake.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import captum.attr  # noqa: F401  # once for all, because each mutant has a fork of its own
import pytest

ROOT = Path(__file__).parents[2]
PASSED, FAILED = 0, 1  # pytest's exit codes; others mean that no test ran
TOO_LONG = 600  # seconds


@dataclass(frozen=True)
class Mutant:
    """One mistake in one file, and the test that sees it."""

    name: str
    file: str
    test: str
    text: str
    replacement: str

    def occurrences(self) -> int:
        """How often its text stands in its file."""
        path = ROOT / self.file
        return path.read_text(encoding="utf-8").count(self.text) if path.exists() else 0


def mutants() -> list[Mutant]:
    """Read the table: blocks of five lines, under headings that begin with #."""
    table = Path(__file__).with_name("mutants.txt").read_text(encoding="utf-8")
    found = []
    for block in re.split(r"\n\n+", re.sub(r"(?m)^#.*\n", "", table).strip()):
        name, file, test, text, replacement = block.split("\n")
        if not (text.startswith("  - ") and replacement.startswith("  + ")):
            raise ValueError(f"expected '  - text' and '  + text', found\n{block}")
        found.append(Mutant(name, file, test, text[4:], replacement[4:]))
    return found


class Failures:
    """A plugin of pytest that notes what fails."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the report of a test."""
        if report.failed:
            self.names.append(report.nodeid)


def run(tests: list[str], mutant: Mutant | None = None) -> tuple[int, list[str]]:
    """Run tests on a copy, with a mistake or without, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("captum_priors", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant is not None:
            source = (copy / mutant.file).read_text(encoding="utf-8")
            (copy / mutant.file).write_text(
                source.replace(mutant.text, mutant.replacement), encoding="utf-8"
            )
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = folder
        sys.path[:] = [folder, *(p for p in sys.path if Path(p).resolve() != ROOT)]
        for name in [n for n in sys.modules if n.partition(".")[0] in ("captum_priors", "tests")]:
            del sys.modules[name]
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(TOO_LONG if mutant is not None else 0)
        failures = Failures()
        options = ["-x", "-q", "-p", "no:cacheprovider", *tests]
        return int(pytest.main(options, [failures])), failures.names


def main() -> None:
    """Print which test kills each mutant, and fail unless all are killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("-j", "--jobs", type=int, default=1)
    parser.add_argument("parts", nargs="*")
    options = parser.parse_args()
    parts = options.parts or [""]
    chosen = [m for m in mutants() if any(p in f"{m.name} {m.file} {m.test}" for p in parts)]
    lost = [m for m in chosen if m.occurrences() != 1 or m.text == m.replacement]
    for m in lost:
        print(f"{m.name}: its text stands {m.occurrences()} times in {m.file}\n  {m.text}")
    if lost or not chosen:
        sys.exit("mend the table" if lost else "no mutant has this in its name, file or test")
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        if pool.apply(run, [sorted({m.test for m in chosen})]) != (PASSED, []):
            sys.exit("these tests fail without any mistake")
        running = [(m, pool.apply_async(run, [[m.test], m])) for m in chosen]
        wrong = 0
        for m, result in running:
            code, failed = result.get()
            wrong += code != FAILED
            word = {PASSED: "SURVIVES", FAILED: "killed"}.get(code, "NOT RUN")
            print(f"{word:8}  {m.name} ({m.file})\n          {(failed or [m.test])[0]}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} mutants killed")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
