"""Run the tutorials from top to bottom, with warnings as errors.

The files stay as they are, unless asked to keep the outputs with ``--write``.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).parent
# Runs in the kernel before a notebook's first cell. Deprecations between other libraries, which
# Python does not show to users either, are none of the tutorial's.
STRICT = (
    "import warnings; warnings.simplefilter('error'); "
    "[warnings.filterwarnings('ignore', category=c, module='(?!__main__|captum_priors)') "
    "for c in (DeprecationWarning, PendingDeprecationWarning)]"
)
SECONDS = 600


def run(path: Path, *, write: bool) -> str:
    """Execute one notebook in a kernel of its own, and return what went wrong."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=[f"--InteractiveShellApp.exec_lines={STRICT}", "--log-level=ERROR"],
    )
    start = time.monotonic()
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return str(error)
    print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)
    if write:
        # What depends on the machine rather than on the tutorial.
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, path)
    return ""


def main() -> int:
    """Run the notebooks asked for; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description="Run the tutorials, with warnings as errors.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    options = parser.parse_args()
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # whatever the shell has
    paths = [p.resolve() for p in options.notebooks] or sorted(HERE.glob("*.ipynb"))
    with ThreadPoolExecutor(options.jobs) as pool:
        errors = list(pool.map(lambda p: run(p, write=options.write), paths))
    failed = [(path, error) for path, error in zip(paths, errors, strict=True) if error]
    for path, error in failed:
        print(f"\n{path.name} failed:\n{error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
