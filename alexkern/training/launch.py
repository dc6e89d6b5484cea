"""Start the processes of a run on this machine, by torchrun."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from alexkern.training.errors import UsageError


def launch(columns: int, max_restarts: int, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by torchrun, which runs the same program once for each column.

    Args:
        columns: Processes to start: on a GPU each, or on the CPU if there is none.
        max_restarts: How often all are started again after one of them has ended early.
        arguments: The program's command line, as it was given.

    Raises:
        UsageError: There are too few GPUs; or restarts would not know the run's folder.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < columns:
        raise UsageError(
            f"--columns {columns} needs {columns} GPUs, and this machine has {gpus}: leave "
            "--columns out, and one process computes all columns"
        )
    named = any(argument.split("=")[0] == "--output" for argument in arguments)
    if max_restarts and not named:
        raise UsageError(
            f"--max-restarts {max_restarts} needs --output, the folder in which a run that is "
            "started again finds its checkpoints"
        )
    # torchrun's own choice is 1, with a warning
    os.environ.setdefault("OMP_NUM_THREADS", str(max(_cores() // columns, 1)))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={columns}", f"--max-restarts={max_restarts}"),
        *(str(Path(sys.argv[0]).absolute()), *arguments),
    ]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
