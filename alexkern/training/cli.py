"""The command line of ``train_alexnet.py``."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from alexkern.training.errors import DivergedError, UsageError
from alexkern.training.options import KERNELS, Options, resolve

PROGRAM = "train_alexnet.py"

# One epoch of the digits: some two minutes in Triton's interpreter on two cores, and enough for
# an error well below 50 %.
INTERPRETED_STEPS = 44


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: The command line, of this process if None.

    Returns:
        Exit code: 0, or 1 if the loss diverged, 2 if the user asked for what cannot be done (one
        line on stderr says which), 130 if interrupted.
    """
    parsed = _parser().parse_args(arguments)
    # OpenMP's threads spin while they wait for each other, which on a machine that does anything
    # else makes small networks ten times slower. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Imported late: --help need not wait for torch, and run() decides how triton is imported.
    from alexkern.data import DataError

    try:
        return run(parsed)
    except (UsageError, DataError) as error:
        return _complain(error, 2)
    except DivergedError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted; --resume continues from the last checkpoint", 130)


def run(parsed: argparse.Namespace) -> int:
    """Do what the command line says; raises what :func:`main` turns into exit codes."""
    import torch

    from alexkern.training import checkpoint

    begin = time.perf_counter()
    resumed = _resumed_file(parsed)
    state = checkpoint.load(resumed) if resumed else None
    given = {
        field.name: value
        for field in fields(Options)
        if (value := getattr(parsed, field.name)) is not None
    }
    options = resolve(given, state["options"] if state else {})
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    interpreted = options.kernels == "triton" and device.type == "cpu"
    if interpreted:
        # Triton reads it when first imported, which torch leaves to the first kernel.
        os.environ["TRITON_INTERPRET"] = "1"

    from alexkern.data import load_dataset
    from alexkern.models import get_preset
    from alexkern.training.loop import Trainer

    dataset = load_dataset(options.data, get_preset(options.preset).stored_size, options.seed)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    trainer = Trainer(options, dataset, device)
    if state:
        trainer.load_state_dict(state)
        print(f"resumed {resumed} at step {trainer.step}")
    _describe(options, dataset, trainer.model, device)
    if parsed.evaluate:
        evaluation = trainer.evaluate()
    else:
        last_step = _last_step(parsed, interpreted, trainer.step, trainer.total_steps)
        output = _output_folder(parsed, options, resumed)
        print(f"writing to {output}", flush=True)
        evaluation = trainer.train(last_step, output)
    seconds = time.perf_counter() - begin
    print(f"done: {evaluation}, {seconds:.1f} s, {trainer.images_per_second:.0f} images/s")
    return 0


def _resumed_file(parsed: argparse.Namespace) -> Path | None:
    """The checkpoint to resume: --resume FILE, or the one in --output if no file is named."""
    if parsed.resume is None:
        if parsed.evaluate:
            raise UsageError("--evaluate needs a trained network: add --resume CHECKPOINT")
        return None
    if parsed.resume:
        return Path(parsed.resume)
    if parsed.output is None:
        raise UsageError("--resume without a file needs --output, the folder of the run")
    return Path(parsed.output) / "checkpoint.pt"


def _output_folder(parsed: argparse.Namespace, options: Options, resumed: Path | None) -> Path:
    """Make the run's folder: --output, or the resumed checkpoint's, or a new one in runs/."""
    if parsed.output is not None:
        output = Path(parsed.output)
    elif resumed:
        output = resumed.parent
    else:
        name = Path(options.data).resolve().name
        output = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.preset}-{name}"
    if not resumed and (output / "checkpoint.pt").exists():
        raise UsageError(f"{output} holds a run: add --resume, or choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to --output {output}: {error.strerror}") from error
    return output


def _last_step(parsed: argparse.Namespace, interpreted: bool, step: int, total_steps: int) -> int:
    """Where the run ends: --steps, or the schedule's end, or sooner in the interpreter."""
    if parsed.steps is not None:
        return int(parsed.steps)
    if interpreted and parsed.epochs is None and total_steps - step > INTERPRETED_STEPS:
        last_step = step + INTERPRETED_STEPS
        print(
            f"no GPU: Triton's interpreter runs the kernels, some hundred times slower, so this "
            f"run ends after {last_step} of {total_steps} steps (choose with --steps or --epochs)"
        )
        return last_step
    return total_steps


def _describe(options: Options, dataset: Any, model: Any, device: Any) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"preset {options.preset}, {parameters:,} parameters; {options.kernels} kernels on "
        f"{device}; {options.data}: {len(dataset.train.labels):,} training and "
        f"{len(dataset.val.labels):,} held-out images of {len(dataset.class_names)} classes"
    )


def _complain(error: object, code: int) -> int:
    print(f"{PROGRAM}: error: {error}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    """The options' defaults are None here: a checkpoint or the preset may fill them in."""
    parser = _Parser(
        prog=PROGRAM,
        description="Train AlexNet as the paper did.",
        epilog="An option that is left out keeps its value when a run is resumed.",
    )
    parser.add_argument(
        "--data",
        metavar="{digits,cifar10,synthetic,PATH}",
        help="what to learn; PATH is a folder with train/ and val/, each with one folder of "
        "images per class (default: digits)",
    )
    parser.add_argument(
        "--preset", help="network (default: mini for digits and cifar10, otherwise paper)"
    )
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        help="triton: this project's; torch: plain PyTorch; compile: torch.compile; auto: the "
        "fastest known, plain PyTorch on a CPU (default)",
    )
    parser.add_argument("--epochs", type=_integer(1), metavar="N", help="default: the preset's")
    parser.add_argument(
        "-b", "--batch-size", type=_integer(1), metavar="N", help="default: the preset's"
    )
    parser.add_argument(
        "--lr",
        type=_number,
        help="initial learning rate, divided by 10 at 28 %%, 57 %% and 88 %% of the epochs "
        "(default: the preset's)",
    )
    parser.add_argument("--momentum", type=_number, help="default: 0.9")
    parser.add_argument("--weight-decay", type=_number, help="default: 0.0005")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), help="autocast (default: off)")
    parser.add_argument(
        "-j",
        "--workers",
        type=_integer(0),
        metavar="N",
        help="processes that prepare batches (default: 0 for the small sets, else one per core)",
    )
    parser.add_argument("--seed", type=_integer(0), help="of all random numbers (default: 0)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for metrics.csv and checkpoint.pt (default: runs/<time>-<preset>-<data>)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue from a checkpoint; without PATH, from the one in --output",
    )
    parser.add_argument(
        "-e", "--evaluate", action="store_true", help="only evaluate the --resume checkpoint"
    )
    parser.add_argument(
        "--steps", type=_integer(1), metavar="N", help="end after N steps in all, schedule as is"
    )
    parser.add_argument(
        "--print-freq",
        type=_integer(1),
        metavar="N",
        help="steps between two lines of progress and rows of metrics.csv (default: 10)",
    )
    return parser


def _integer(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")
        return int(text)

    return parse


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value
