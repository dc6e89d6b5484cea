"""The ``alexkern`` command."""

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexkern.runtime.dispatch import Candidate, Convolution, Table

_DTYPES = ("bfloat16", "float16", "tf32", "float32")
_LAYOUTS = ("channels_last", "nchw")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 2 for what the user can mend."""
    description = "Tools of alexkern, AlexNet's ops as fused Triton kernels."
    parser = argparse.ArgumentParser(prog="alexkern", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, what in (
        (_info, "what is installed, and who computes here"),
        (_doctor, "info, and a check that every op computes right"),
    ):
        plain = commands.add_parser(command.__name__.removeprefix("_"), help=what)
        plain.add_argument("--json", action="store_true", help="for programs")
        plain.set_defaults(run=command)
    _add_tune(commands.add_parser("tune", help="measure who computes convolutions fastest"))
    _add_prepare(commands.add_parser("prepare", help="images to a store that trains fast"))
    _add_plot(commands.add_parser("plot", help="draw the curves of training runs"))
    _add_average(commands.add_parser("average", help="average several networks' predictions"))
    _add_export(commands.add_parser("export", help="write a run's weights for other programs"))
    options = parser.parse_args(arguments)
    from alexkern.runtime.dispatch import TableError

    try:
        return int(options.run(options))
    except (TableError, ValueError, ImportError, OSError) as error:
        print(f"alexkern: {error}", file=sys.stderr)
        return 2


def _info(options: argparse.Namespace) -> int:
    from alexkern.doctor import information

    found = information()
    print(json.dumps(found, indent=1) if options.json else _readable(found))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    """Exit status 1 if an op is wrong."""
    import torch

    from alexkern.doctor import checks, information

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # for the triton backend
    found, checked = information(), checks(torch.device("cuda" if gpu else "cpu"))
    if options.json:
        print(json.dumps(found | {"checks": [asdict(check) for check in checked]}, indent=1))
    else:
        print(_readable(found))
        for check in checked:
            verdict = check.problem or f"right, to {check.error:.1e}"
            print(f"{check.op}: {check.runs}; {verdict}")
    return int(any(check.problem for check in checked))


def _readable(found: dict[str, Any]) -> str:
    gpus = [f"{gpu['name']} (compute capability {gpu['capability']})" for gpu in found["gpus"]]
    versions = [f"{name} {version}" for name, version in found["versions"].items() if version]
    return "\n".join(
        [
            ", ".join(versions),
            f"GPUs: {', '.join(gpus) or 'none'}",
            f"backend {found['backend']}: {found['why']}",
            f"tables: {', '.join(found['tables']) or 'none'}",
        ]
    )


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_prepare)
    parser.usage = "alexkern prepare [options] SRC DST\n       alexkern prepare --check DST"
    parser.description = (
        "Prepare images once for every training: upright, scaled, cut to their central squares, "
        "with their mean and colours, in a store for --data. SRC has train/ and val/, or "
        "ILSVRC's archives and devkit. What was stopped goes on where it was."
    )
    parser.add_argument("source", metavar="SRC", nargs="?", type=Path, help="the images")
    parser.add_argument("store", metavar="DST", nargs="?", type=Path, help="folder of the store")
    parser.add_argument("--check", metavar="DST", type=Path, help="verify every file of a store")
    parser.add_argument("--size", type=int, default=256, help="side in pixels (%(default)s)")
    parser.add_argument(
        "-j", "--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)"
    )
    parser.add_argument(
        "--ground-truth",
        metavar="PATH",
        type=Path,
        help="classes of val images that are in no class folders: ILSVRC's devkit, or a file of "
        "`image class` lines (default: looked for in SRC)",
    )


def _prepare(options: argparse.Namespace) -> int:
    """Exit status 1 if --check finds damage; 130 or 143 if stopped by a signal."""
    if (options.store is None) == (options.check is None) or (options.check and options.source):
        raise ValueError("prepare takes SRC and DST, or --check DST (see --help)")
    for name in ("size", "workers"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be positive, got {getattr(options, name)}")
    try:
        from alexkern.data import prepare, store
    except ImportError as error:
        message = f"prepare needs Pillow and tqdm: pip install 'alexkern[train]' ({error})"
        raise ValueError(message) from error
    if isinstance(sys.stdout, io.TextIOWrapper):  # names in any script, on any terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    if options.check:
        problems = store.check_store(options.check, options.workers)
        print("\n".join(problems) or f"{options.check}: every file is as it was written")
        return int(bool(problems))
    default = signal.signal(signal.SIGTERM, _terminate)
    try:
        prepare.prepare(
            options.source, options.store, options.size, options.workers, options.ground_truth
        )
    except KeyboardInterrupt as interrupt:
        print("alexkern: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, default)
    return 0


def _terminate(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=lambda options: _show(options) if options.show else _tune(options))
    parser.description = (
        "Time every way to compute the network's convolutions on this GPU, after a check of each, "
        "and keep the result in a table: under --kernels auto the fastest is used from then on."
    )
    parser.add_argument("--show", action="store_true", help="print the tables, and measure nothing")
    parser.add_argument("--again", action="store_true", help="also what is in the table already")
    parser.add_argument("--preset", default="paper", help="network (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[128], help="images per step")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["bfloat16"])
    parser.add_argument("--layout", nargs="+", choices=_LAYOUTS, default=["channels_last"])
    parser.add_argument(
        "--output", type=Path, default=None, help="folder of the table (default: the user's own)"
    )


def _tune(options: argparse.Namespace) -> int:
    import torch

    from alexkern.runtime import dispatch
    from alexkern.tuning import DeviceLostError, tune

    if not torch.cuda.is_available():
        print("alexkern: tune needs a GPU, and torch finds none", file=sys.stderr)
        return 2
    if min(options.batch) < 1:
        raise ValueError(f"--batch must be positive, got {options.batch}")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = dispatch.gpu_name(device)
    path = dispatch.table_path(options.output or dispatch.user_folder(), gpu)
    table = dispatch.Table(gpu, dispatch.versions(), {})
    if path.exists() and (before := dispatch.load(path)).versions == table.versions:
        table = before
    known = {} if options.again else table.entries
    problems = [problem for problem in _problems(options) if problem not in known]

    def keep(problem: "Convolution", candidates: "list[Candidate]") -> None:
        table.entries[problem] = candidates
        dispatch.save(table, path)
        print(f"{len(table.entries)}: {_line(table, problem)}", flush=True)

    try:
        tune(problems, device, keep)
    except DeviceLostError as error:
        print(f"alexkern: {error}; what was measured before is in {path}", file=sys.stderr)
        return 1
    print(f"{len(problems)} convolutions measured, in {path}")
    return 0


def _problems(options: argparse.Namespace) -> "Iterator[Convolution]":
    import torch

    from alexkern.tuning import network_problems

    for name in options.dtype:
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        for layout in options.layout:
            for batch in options.batch:
                channels_last = layout == "channels_last"
                for problem in network_problems(options.preset, batch, dtype, channels_last):
                    yield replace(problem, dtype=name)


def _show(options: argparse.Namespace) -> int:
    from alexkern.runtime import dispatch

    folders = [options.output] if options.output else [dispatch.SHIPPED, dispatch.user_folder()]
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    if not paths:
        print(f"No table in {' or '.join(map(str, folders))}: nothing has been measured.")
        return 0
    for path in paths:
        table = dispatch.load(path)
        versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
        print(f"{path}: {table.gpu}, {versions}")
        if table.versions != dispatch.versions():
            print("not used here: measured with other versions than those installed")
        for problem in table.entries:
            print(_line(table, problem))
    return 0


def _line(table: "Table", problem: "Convolution") -> str:
    """Who won a problem, and by how much."""
    channels, *kernel = problem.weight[0], *problem.weight[2:]
    what = (
        f"{problem.direction} {list(problem.input)} -> {channels}, {kernel[0]}x{kernel[1]}, "
        f"stride {problem.stride[0]}, groups {problem.groups}, {problem.dtype} "
        f"{'channels_last' if problem.channels_last else 'nchw'}"
    )
    candidates = table.entries[problem]
    failed = sum(bool(candidate.failure) for candidate in candidates)
    best = [best for who in ("triton", "vendor") if (best := table.best(problem, who))]
    shown = [f"{candidate.choice} {candidate.microseconds:.1f} us" for candidate in best]
    if len(best) == 2:
        ours, theirs = (candidate.microseconds or 0.0 for candidate in best)
        shown.append(f"triton is {theirs / ours:.2f}x as fast as the vendor")
    winner = table.best(problem)
    name = winner.choice if winner else "nobody"
    return f"{what}: {name} wins; {'; '.join(shown)}; {failed} of {len(candidates)} failed"


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_plot)
    parser.description = (
        "Draw loss, errors, learning rate and images per second of training runs, into an SVG and "
        "a PNG file."
    )
    parser.add_argument("run_folders", metavar="RUN", nargs="+", type=Path, help="a run's folder")
    parser.add_argument(
        "--output",
        metavar="NAME",
        type=Path,
        help="the files' name without .svg and .png, or a folder (default: curves, in the first "
        "run's folder)",
    )


def _plot(options: argparse.Namespace) -> int:
    from alexkern.figures import plot

    print(*plot(options.run_folders, options.output), sep="\n")
    return 0


def _add_average(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_average)
    parser.description = (
        "Average the probabilities that several networks give for the same images, and print the "
        "errors of each and of the average."
    )
    what = "predictions, as `train_alexnet.py --evaluate --predictions FILE` writes them"
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help=what)
    parser.add_argument(
        "--weights", metavar="W", nargs="+", type=float, help="of each file (default: all equal)"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="keep the average as a file")


def _average(options: argparse.Namespace) -> int:
    from alexkern.predictions import Predictions, average

    if options.output in options.files:
        raise ValueError(f"--output {options.output} is one of the files to average")
    found = [Predictions.load(path) for path in options.files]
    mean = average(found, options.weights)
    if options.output:
        mean.save(options.output)
    width = max(len(each.name) for each in [*found, mean])
    print(f"{'':{width}}   top-1   top-5    loss")
    for each in [*found, mean]:
        errors = f"{each.error(1):7.2%} {each.error(5):7.2%}"
        print(f"{each.name:{width}} {errors} {each.loss():7.4f}")
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_export)
    parser.description = (
        "Write the weights of a checkpoint as safetensors, or those of preset owt with the names "
        "of torchvision's alexnet as .pth."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="of a training run")
    parser.add_argument("output", metavar="FILE", type=Path, help="*.safetensors or *.pth")


def _export(options: argparse.Namespace) -> int:
    from alexkern.files import save_torch
    from alexkern.models import alexnet, save_weights, torchvision_state_dict
    from alexkern.training import checkpoint

    state = checkpoint.load(options.checkpoint)
    model = alexnet(state["options"]["preset"], len(state["class_names"]))
    model.load_state_dict(state["model"])
    if options.output.suffix == ".pth":
        save_torch(torchvision_state_dict(model), options.output)
    else:
        save_weights(model, options.output)
    print(f"wrote {options.output}: preset {model.preset.name}, {model.num_classes} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
