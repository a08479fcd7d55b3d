"""What two processes do that train one model: the cases of three files, run by one ``torchrun``.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.integrations.two_processes FILE
[PART OF A NAME ...]`` writes what each case found, or the error that it met. Every process computes
what one process with the whole batch would have, and compares.
"""

import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.integrations import ddp, frameworks, sharded  # which fill the table
from tests.integrations.scenarios import CASES, Case

FILES = (ddp, sharded, frameworks)


def run(cases: dict[str, Case]) -> Iterator[tuple[str, Any]]:
    for name, row in cases.items():
        torch.manual_seed(0)
        try:
            yield name, row.run()
        except Exception as problem:  # what it met is the result
            yield name, {"raised": type(problem).__name__, "message": str(problem)}
        dist.barrier()


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    chosen = {k: v for k, v in CASES.items() if not names or any(n in k for n in names)}
    found = dict(run(chosen))
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(everybody), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
