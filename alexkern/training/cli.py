"""The command line of ``train_alexnet.py``."""

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from alexkern.training.errors import StoppedError, TrainingError, UsageError
from alexkern.training.options import CHOICES, Options, read_config, resolve

if TYPE_CHECKING:
    from alexkern.data import Dataset
    from alexkern.parallel import Mesh
    from alexkern.training.loop import Trainer
    from alexkern.training.processes import Process

PROGRAM = "train_alexnet.py"

# One epoch of the digits: some two minutes in Triton's interpreter on two cores, and enough for
# an error well below 50 %.
INTERPRETED_STEPS = 44

# A launcher passes on a signal that reached its processes as well.
_ECHO_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: The command line, of this process if None.

    Returns:
        Exit code: 0, also if a signal stopped the run and it was saved; 1 if it had to end early,
        2 if the user asked for what cannot be done (one line on stderr says why), 130 if
        interrupted before there was anything to save.
    """
    parsed = _parser().parse_args(arguments)
    parsed.arguments = sys.argv[1:] if arguments is None else arguments
    # OpenMP's threads spin while they wait for each other, which on a machine that does anything
    # else makes small networks ten times slower. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _explaining(parsed)
    except KeyboardInterrupt:  # also while torch is imported
        return _complain("interrupted before there was anything to save", 130)


def _explaining(parsed: argparse.Namespace) -> int:
    """Run; what a user can mend is one line and an exit code."""
    # Imported late: --help need not wait for torch, and run() decides how triton is imported.
    from alexkern.data import DataError

    try:
        return run(parsed)
    except (UsageError, DataError) as error:
        return _complain(error, 2)
    except TrainingError as error:
        return _complain(error, 1)
    except (RuntimeError, MemoryError) as error:
        if not (explained := _explained(error)):
            raise
        return _complain(f"{explained}; the last checkpoint is whole", 1)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        return _complain(f"cannot go on ({what}); the last checkpoint is whole", 1)


def run(parsed: argparse.Namespace) -> int:
    """Do what the command line says; raises what :func:`main` turns into exit codes."""
    import torch

    from alexkern.training.launch import launch
    from alexkern.training.processes import Peers, joined, naming_lost_peers

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # Triton reads it when first imported: here with the first kernel, or by torch.distributed.
        os.environ["TRITON_INTERPRET"] = "1"
    if parsed.columns == 1:
        _check_without_columns(parsed)
    elif "WORLD_SIZE" not in os.environ:
        if not parsed.resume:  # one complaint, before there are several processes
            resolve(_given(parsed), {})
            if parsed.output and not parsed.evaluate:
                _check_nothing_is_lost(parsed, Path(parsed.output), None)
        launch(parsed.columns, parsed.max_restarts, parsed.arguments)
    with joined(device) as process, naming_lost_peers(Peers()):
        return _run(parsed, process)


def _check_without_columns(parsed: argparse.Namespace) -> None:
    """Refuse what would change nothing."""
    if parsed.parallel == "hybrid":
        raise UsageError(
            "--parallel hybrid has the fully connected layers in columns: add --columns N"
        )
    if parsed.max_restarts:
        raise UsageError(
            f"--max-restarts {parsed.max_restarts} is for processes that --columns starts: add "
            "--columns N, or give it to torchrun"
        )


def _run(parsed: argparse.Namespace, process: "Process") -> int:
    """In one of the processes that have found each other."""
    from alexkern.parallel import make_mesh
    from alexkern.training.loop import Outlet, Silence, Trainer
    from alexkern.training.processes import Wishes, agreed_start
    from alexkern.training.signals import StopSignal

    if process.has_begun and not _is_empty(parsed.output):
        parsed.resume = "auto"
    with agreed_start() as facts:
        resumed, options, dataset = _prepared(parsed, process, facts)
    try:
        mesh = make_mesh(parsed.columns, parsed.parallel == "hybrid", process.device)
    except ValueError as error:
        raise UsageError(f"--columns {parsed.columns}: {error}") from error
    trainer = Trainer(options, dataset, process.device, mesh)
    if resumed:
        trainer.load_state_dict(resumed[1], training=not parsed.evaluate)
        _say(process, _resumption(*resumed, options))
    elif options.weights:
        _load_weights(trainer, options)
    _say(process, _description(options, dataset, mesh, process.device))
    if parsed.evaluate:
        _evaluate(parsed, trainer, process)
        return 0
    last_step = _last_step(parsed, process, options, trainer)
    stop = StopSignal(_ECHO_SECONDS if process.processes > 1 else 0.0)
    wishes, folder = Wishes(), None
    outlet: Outlet = Silence(stop.__bool__, wishes)
    with agreed_start():
        if process.rank == 0:
            folder = _output_folder(parsed, options, resumed)
            outlet = Outlet(folder, trainer.step, stop.__bool__, parsed.tensorboard, wishes)
            process.note_beginning()
    _say(process, f"writing to {folder}")
    with stop:
        done = trainer.train(last_step, outlet)
        if done and (parsed.ten_crop or parsed.predictions):
            done = _evaluate(parsed, trainer, process, outlet.stopping)
        wishes.drain()
    _say(
        process,
        trainer.summary()
        if done
        else f"stopped by {stop.received or 'another process'} after step {trainer.step}, and "
        f"saved: continue with --resume --output {folder}",
    )
    return 0


def _prepared(
    parsed: argparse.Namespace, process: "Process", facts: dict[str, str]
) -> "tuple[tuple[Path, dict[str, Any]] | None, Options, Dataset]":
    """What needs no other process; ``facts`` gets what all must have the same."""
    from alexkern.data import load_dataset
    from alexkern.files import seal_of
    from alexkern.models import get_preset
    from alexkern.runtime import dispatch

    resumed = _resumed(parsed, process)
    options = resolve(_given(parsed), resumed[1]["options"] if resumed else {})
    if parsed.evaluate and not resumed and not options.weights:
        raise UsageError(
            "--evaluate needs a trained network: add --resume CHECKPOINT or --weights FILE"
        )
    _set_switches(options)
    dataset = load_dataset(options.data, get_preset(options.preset).stored_size, options.seed)
    names = ("columns", "parallel", "steps", "evaluate", "ten_crop", "predictions")
    facts |= {f"--{name.replace('_', '-')}": str(getattr(parsed, name)) for name in names}
    # machines may differ in cores, by which --workers goes
    facts["the configuration"] = replace(options, workers=0).to_toml()
    if options.weights and not resumed:
        facts["the file of --weights"] = _digest(Path(options.weights))
    facts["--data"] = f"{dataset.name}, digest {dataset.digest}"
    facts["the checkpoint"] = f"{resumed[0].name}, digest {seal_of(resumed[0])}" if resumed else ""
    facts["the GPU"] = dispatch.gpu_name(process.device)
    facts["the table of kernels"] = dispatch.table_digest(process.device)
    return resumed, options, dataset


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read --weights {path}: {error.strerror}") from error


def _is_interpreted(options: Options, process: "Process") -> bool:
    return options.kernels == "triton" and process.device.type == "cpu"


def _given(parsed: argparse.Namespace) -> dict[str, Any]:
    """The options of the command line, and below them those of --config."""
    from_file = read_config(Path(parsed.config)) if parsed.config else {}
    flags = {field.name: getattr(parsed, field.name, None) for field in fields(Options)}
    return from_file | {name: value for name, value in flags.items() if value is not None}


def _load_weights(trainer: "Trainer", options: Options) -> None:
    try:
        trainer.load_weights(options.weights, options.new_head)
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise UsageError(f"--weights: {error}") from error


def _set_switches(options: Options) -> None:
    import torch

    torch.backends.cudnn.benchmark = not options.deterministic  # all batches have one shape
    if options.deterministic:
        # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _evaluate(
    parsed: argparse.Namespace,
    trainer: "Trainer",
    process: "Process",
    stopping: Callable[[], object] = lambda: False,
) -> bool:
    """Print errors of central crops or of ten, and write the predictions if that is asked for.

    Returns:
        False if it was asked to stop before.
    """
    try:
        evaluation, probabilities = trainer.evaluate(
            ten_crop=parsed.ten_crop, keep=bool(parsed.predictions), stopping=stopping
        )
    except StoppedError:
        return False
    _say(process, f"{'ten crops' if parsed.ten_crop else 'central crop'}: {evaluation}")
    if parsed.predictions and probabilities is not None:
        path = Path(parsed.predictions)
        trainer.predictions(probabilities, 10 if parsed.ten_crop else 1).save(path)
        _say(process, f"wrote {path}")
    return True


def _resumed(
    parsed: argparse.Namespace, process: "Process"
) -> "tuple[Path, dict[str, Any]] | None":
    """The checkpoint to go on from: a file, or the newest whole one of a run's folder."""
    from alexkern.training import checkpoint

    if parsed.resume is None:
        return None
    automatic = parsed.resume == "auto"
    if automatic and parsed.output is None:
        raise UsageError("--resume without a file needs --output, the folder of the run")
    path = Path(parsed.output if automatic else parsed.resume)
    if not automatic and not path.is_dir():
        return path, checkpoint.load(path)
    newest = checkpoint.load_newest(path, lambda text: print(f"warning: {text}", file=sys.stderr))
    if newest is None:
        if not automatic or parsed.evaluate:
            raise UsageError(f"no checkpoint in {path}")
        _say(process, f"no checkpoint in {path} yet: a new run")
    return newest


def _resumption(path: Path, state: dict[str, Any], options: Options) -> str:
    """What goes on, and what is no longer as it was."""
    now = asdict(options)
    changed = [
        f"{name} {before!r} -> {now[name]!r}"
        for name, before in state["options"].items()
        if name in now and before != now[name]
    ]
    return "\n".join(
        [f"resumed {path} at step {state['step']}", *(f"changed: {line}" for line in changed)]
    )


def _output_folder(
    parsed: argparse.Namespace, options: Options, resumed: "tuple[Path, dict[str, Any]] | None"
) -> Path:
    """Make the run's folder: --output, or the resumed checkpoint's, or a new one in runs/."""
    from alexkern.files import replacing  # which needs torch

    if parsed.output is not None:
        output = Path(parsed.output)
    elif resumed:
        output = resumed[0].parent
    else:
        name = Path(options.data).resolve().name
        output = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.preset}-{name}"
    _check_nothing_is_lost(parsed, output, resumed)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with replacing(output / "config.toml") as file:
            file.write(options.to_toml().encode())
    except OSError as error:
        raise UsageError(f"cannot write to --output {output}: {error.strerror}") from error
    return output


def _check_nothing_is_lost(
    parsed: argparse.Namespace, output: Path, resumed: "tuple[Path, dict[str, Any]] | None"
) -> None:
    """Refuse to write over another run, or over what came after the checkpoint."""
    from alexkern.training import checkpoint

    if parsed.resume == "auto":
        return
    if resumed is None or output.resolve() != resumed[0].parent.resolve():
        if not _is_empty(output):
            raise UsageError(f"{output} holds a run: add --resume, or choose another --output")
    elif Path(parsed.resume).is_file() and (later := checkpoint.newer(output, resumed[1]["step"])):
        raise UsageError(
            f"{later[0]} is newer than {resumed[0].name}: choose another --output, so that it stays"
        )


def _is_empty(output: str | Path | None) -> bool:
    """Whether a run's folder is known and has no checkpoints."""
    return output is not None and not any(Path(output).glob("*.pt"))


def _last_step(
    parsed: argparse.Namespace, process: "Process", options: Options, trainer: "Trainer"
) -> int:
    """Where the run ends: --steps, or the schedule's end, or sooner in the interpreter."""
    total = trainer.total_steps
    if parsed.steps is not None:
        return int(parsed.steps)
    interpreted = _is_interpreted(options, process)
    if interpreted and parsed.epochs is None and total - trainer.step > INTERPRETED_STEPS:
        last_step = trainer.step + INTERPRETED_STEPS
        _say(
            process,
            f"no GPU: Triton's interpreter runs the kernels, some hundred times slower, so this "
            f"run ends after {last_step} of {total} steps (choose with --steps or --epochs)",
        )
        return last_step
    return total


def _description(options: Options, dataset: "Dataset", mesh: "Mesh", device: Any) -> str:
    import torch

    from alexkern.models import AlexNet, get_preset

    with torch.device("meta"):
        network = AlexNet(get_preset(options.preset), len(dataset.class_names))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    lines = [
        f"preset {options.preset}, {parameters:,} parameters; {options.kernels} kernels on "
        f"{device}; {options.data}: {len(dataset.train.labels):,} training and "
        f"{len(dataset.val.labels):,} held-out images of {len(dataset.class_names)} classes"
    ]
    if mesh.processes > 1:
        cut = f"of {mesh.columns.count} columns" if mesh.columns.count > 1 else "of one process"
        lines.append(
            f"{mesh.processes} processes: {mesh.data.count} x a network {cut}"
            f"{', its fully connected layers alone' if mesh.hybrid else ''}"
        )
    if options.target:
        lines.append(f"to be reached: {options.target}")
    return "\n".join(lines)


def _say(process: "Process", text: str) -> None:
    if process.rank == 0:
        print(text, flush=True)


def _explained(error: BaseException) -> str:
    """What torch says about memory and workers, in a line with advice; empty for the rest."""
    import torch

    first, *others = (str(error).strip() or "MemoryError").split("\n")
    in_worker = "DataLoader worker" in first
    reason = others[-1] if others and in_worker else first  # below the worker's traceback
    # not all of torch's errors of this kind have a type of their own
    by_name = any(words in reason for words in ("allocate memory", "out of memory"))
    if by_name or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory ({reason}): a smaller --batch-size or --amp bf16 needs less"
    if in_worker:
        return (
            f"a process that makes batches has died ({reason}): where memory is short, fewer "
            "--workers or a larger /dev/shm help (docker run --shm-size)"
        )
    return ""


def _complain(error: object, code: int) -> int:
    # in one write, as other processes may complain at the same time
    sys.stderr.write(f"{PROGRAM}: error: {error}\n")
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    """The options' defaults are None here: a file, a checkpoint or the preset may fill them in."""
    parser = _Parser(
        prog=PROGRAM,
        description="Train AlexNet as the paper did.",
        epilog="An option that is left out keeps its value when a run is resumed.",
    )
    _add_run(parser.add_argument_group("the run"))
    _add_recipe(parser.add_argument_group("the recipe (defaults: the preset's)"))
    _add_machine(parser.add_argument_group("the machine"))
    _add_processes(
        parser.add_argument_group("several processes (replicas share a batch, under torchrun)")
    )
    _add_evaluation(parser.add_argument_group("evaluation"))
    return parser


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--config",
        metavar="FILE",
        help="options from a TOML file, such as those in configs/; the command line wins",
    )
    group.add_argument(
        "--data",
        metavar="{digits,cifar10,synthetic,PATH}",
        help="what to learn; PATH is a store that `alexkern prepare` made, or a folder with train/ "
        "and val/, each with one folder of images per class (default: digits)",
    )
    group.add_argument(
        "--preset", help="network (default: mini for digits and cifar10, otherwise paper)"
    )
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="start from these (.safetensors, a checkpoint, or torchvision's)",
    )
    group.add_argument(
        "--new-head",
        action=argparse.BooleanOptionalAction,
        help="but not fc8: for other classes than theirs (default: no)",
    )
    group.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the run: metrics.csv, config.toml, checkpoints (default: "
        "runs/<time>-<preset>-<data>)",
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="{auto,PATH}",
        help="continue: from the newest whole checkpoint in --output (auto), or from that of a "
        "file or folder",
    )
    group.add_argument(
        "--steps", type=_integer(1), metavar="N", help="end after N steps in all, schedule as is"
    )
    group.add_argument("--seed", type=_integer(0), help="of all random numbers (default: 0)")
    group.add_argument(
        "--print-freq",
        type=_integer(1),
        metavar="N",
        help="steps between two lines of progress and rows of metrics.csv (default: 10)",
    )
    group.add_argument(
        "--save-minutes",
        type=_number,
        metavar="M",
        help="between checkpoints within an epoch (default: 10)",
    )
    group.add_argument(
        "--tensorboard", action="store_true", help="write its files too, in the run's folder"
    )


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=_integer(1), metavar="N")
    group.add_argument("-b", "--batch-size", type=_integer(1), metavar="N")
    group.add_argument("--lr", type=_number, help="initial learning rate")
    group.add_argument(
        "--schedule",
        metavar="KIND[:NUMBERS]",
        help="fixed:E,... (divided by 10 at those epochs; default: at 28 %%, 57 %% and 88 %%), "
        "plateau:PATIENCE (when the error stops falling, three times), dexp:FACTOR,LEVELS, "
        "step:EPOCHS or constant",
    )
    group.add_argument("--momentum", type=_number, help="(0.9)")
    group.add_argument("--weight-decay", type=_number, metavar="D", help="(0.0005)")
    group.add_argument(
        "--bias-lr-factor", type=_number, metavar="F", help="times --lr, for biases (1)"
    )
    group.add_argument("--bias-schedule", metavar="KIND[:NUMBERS]", help="their own (the same)")
    group.add_argument("--bias-weight-decay", type=_number, metavar="D", help="(as --weight-decay)")
    group.add_argument("--dropout-mode", choices=CHOICES["dropout_mode"])
    group.add_argument(
        "--colour-noise",
        choices=CHOICES["colour_noise"],
        help="strength along the principal components: deviations as in the 2012 code, eigenvalues "
        "of 0..1 as in fb.resnet.torch, or of 0..255 as the paper's text has it",
    )
    group.add_argument("--colour-noise-epochs", type=_integer(0), metavar="N", help="(all)")
    group.add_argument(
        "--conv1-epochs", type=_integer(0), metavar="N", help="conv1 learns so long (always)"
    )
    group.add_argument(
        "--crop-offsets", type=_integer(1), metavar="N", help="positions along each axis (all)"
    )
    group.add_argument(
        "--crop-chunk", type=_integer(1), metavar="N", help="images that share a crop (1)"
    )


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--kernels",
        choices=CHOICES["kernels"],
        help="triton: this project's; torch: plain PyTorch; compile: torch.compile; auto: the "
        "fastest known, plain PyTorch on a CPU (default)",
    )
    group.add_argument("--amp", choices=CHOICES["amp"], help="autocast (default: off)")
    group.add_argument(
        "--half-exchange",
        action=argparse.BooleanOptionalAction,
        help="what columns exchange is rounded to float16 (default: no)",
    )
    group.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        help="only algorithms that give the same bits every time (default: no)",
    )
    group.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="capture the step and replay it, on a GPU (default: yes)",
    )
    group.add_argument(
        "-j",
        "--workers",
        type=_integer(0),
        metavar="N",
        help="processes that prepare batches (default: 0 for the small sets, else one per core of "
        "the machine, divided among the processes that torchrun has started on it)",
    )


def _add_processes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--columns",
        type=_integer(1),
        default=1,
        metavar="N",
        help="divide each layer's units among N processes; without torchrun they are started here, "
        "on a GPU each (default: 1)",
    )
    group.add_argument(
        "--parallel",
        choices=("columns", "hybrid"),
        default="columns",
        help="hybrid: only the fully connected layers are in columns, which share the images of "
        "the convolutions (default: columns)",
    )
    group.add_argument(
        "--max-restarts",
        type=_integer(0),
        default=0,
        metavar="N",
        help="of processes that --columns has started, if one of them ends early (default: 0)",
    )


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-e",
        "--evaluate",
        action="store_true",
        help="only evaluate --resume or --weights; under torchrun, on all processes",
    )
    group.add_argument(
        "--ten-crop", action="store_true", help="by ten crops of each image, as in the paper"
    )
    group.add_argument(
        "--predictions", metavar="FILE", help="write them, for `alexkern average` (.npz)"
    )


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
