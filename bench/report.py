"""Tables and plots from records: for a terminal, for README and docs.

    python -m bench report                 # all tables of the newest record
    python -m bench report --write         # refresh the tables and plots in README and docs
    python -m bench report --check         # exit 1 if a table there is not the newest record's

In a page, a table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alexkern.figures.drawing import new_figure, save
from alexkern.models import PRESETS
from bench import scaling
from bench.compile_record import CompiledKernel, CompileRecord
from bench.layers import BATCH
from bench.record import RESULTS, Key, Measurement, Record, RecordError, load, newest
from bench.scaling import ETHERNET, INFINIBAND, NVLINK, PCIE, Cluster, Layout, predicted_step

ROOT = Path(__file__).parents[1]
PLOTS = ROOT / "docs" / "plots"
# That of the compiler that GPU machines have had; CI installs it to compare.
COMPILE_RECORD = RESULTS / "compile" / "triton-3.6.0.json"
_PATH = "lrn_path"  # the stem of the steps in docs/kernel-path.md
NOT_MEASURED = "Not measured on a GPU yet."
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Groups = dict[Key, dict[str, Measurement]]


def groups(measurements: Sequence[Measurement], suite: str = "") -> Groups:
    """Measurements by what was timed together, then by variant, in the order of the record."""
    found: Groups = {}
    for measurement in measurements:
        if measurement.key.suite == suite or not suite:
            found.setdefault(measurement.key.group, {})[measurement.key.variant] = measurement
    return found


def short(record: Record) -> str:
    """One line per group, for a terminal."""
    lines = [
        f"{name}: {tests.passed} passed, {len(tests.failed)} failed, {tests.skipped} skipped"
        + ("" if tests.complete else ", cut short")
        for name, tests in record.tests.items()
    ]
    for key, found in groups(record.measurements).items():
        cells = ", ".join(f"{name} {_cell(m)}" for name, m in _fastest(found).items())
        what = (key.layer, key.direction, key.dtype, str(key.batch))
        lines.append(f"{' '.join(filter(None, what))}: {cells}")
    return "\n".join(lines)


def _fastest(found: dict[str, Measurement]) -> dict[str, Measurement]:
    """All variants; of a long tuning only what ships and the three fastest."""
    if "shipped" not in found:
        return found
    timed = sorted((m for m in found.values() if m.seconds), key=lambda m: m.median)
    wrong = [m for m in found.values() if m.failure and m.failure.startswith("AssertionError")]
    return {m.key.variant: m for m in (found["shipped"], *timed[:3], *wrong)}


def _cell(measurement: Measurement) -> str:
    """Median in microseconds, half the width of its interval, and percent of the floor."""
    if not measurement.seconds:
        return measurement.failure or "checked"
    floor = f" ({_percent(measurement)})" if measurement.floor_seconds else ""
    return f"{_microseconds(measurement)} us{floor}"


def _microseconds(measurement: Measurement | None) -> str:
    if measurement is None:
        return "-"
    if not measurement.seconds:
        return "failed" if measurement.failure else "-"
    low, high = measurement.interval
    return f"{1e6 * measurement.median:.1f} ± {1e6 * (high - low) / 2:.1f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_table(record: Record) -> str:
    """What the record was made on, and the limits measured there."""
    machine, limits = record.machine, record.ceilings
    rates = ", ".join(
        f"{rate / 1e12:.0f} TFLOP/s {dtype}"
        for dtype, rate in limits.matmul_flops_per_second.items()
    )
    return (
        f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}, triton {machine.triton}, "
        f"cuDNN {machine.cudnn}; commit {record.commit}, {record.date}. Measured limits: copy "
        f"{limits.copy_bytes_per_second / 1e12:.2f} TB/s, {rates}."
    )


_OP_VARIANTS = {
    "alexkern": "alexkern",
    "alexkern_auto": "auto",
    "eager_nchw": "eager NCHW",
    "eager_channels_last": "eager channels_last",
    "compile": "torch.compile",
}


def ops_table(record: Record) -> str:
    """Each op and direction: the variants, the floor, and how the kernel stands to both."""
    rows = []
    predicted = _predicted(record.machine.capability)
    for key, found in groups(record.measurements, "ops").items():
        ours = found.get("alexkern")
        theirs = {name: m for name, m in found.items() if not name.startswith("alexkern")}
        others = [measured.median for measured in theirs.values() if measured.seconds]
        rows.append(
            [
                _name(key),
                *(_microseconds(found.get(name)) for name in _OP_VARIANTS),
                f"{1e6 * next(iter(found.values())).floor_seconds:.1f}",
                predicted.get((key.layer, key.direction, key.dtype, key.batch), "-"),
                _percent(ours),
                f"{min(others) / ours.median:.2f}x" if ours and ours.seconds and others else "-",
            ]
        )
    header = ["us per call", *_OP_VARIANTS.values(), "floor", "predicted"]
    return _markdown([*header, "of floor", "against the best other"], rows)


def memory_table(record: Record) -> str:
    """The most memory that one call of each op holds beyond its operands."""
    rows = [
        [_name(key), *(_megabytes(found.get(name)) for name in _OP_VARIANTS)]
        for key, found in groups(record.measurements, "ops").items()
    ]
    return _markdown(["peak MB", *_OP_VARIANTS.values()], rows)


def _name(key: Key) -> str:
    return f"{key.layer} {key.direction}, {key.dtype}, {key.batch}"


def _predicted(target: str) -> dict[tuple[str, str, str, int], str]:
    """Microseconds that the compile record predicts, by layer, direction, dtype and batch."""
    sums: dict[tuple[str, str, str, int], float] = {}
    for k in load(CompileRecord, COMPILE_RECORD).kernels:
        if (k.target, k.layout) == (target, "nhwc") and k.stem != _PATH:
            key = k.layer, k.direction, k.dtype, BATCH
            sums[key] = sums.get(key, 0.0) + k.predicted_us
    return {key: f"{microseconds:.1f}" for key, microseconds in sums.items()}


def _megabytes(measurement: Measurement | None) -> str:
    if measurement is None or measurement.peak_bytes is None:
        return "-"
    return f"{measurement.peak_bytes / 1e6:,.0f}"


def _percent(measurement: Measurement | None) -> str:
    return f"{100 * measurement.floor_share:.0f} %" if measurement and measurement.seconds else "-"


def network_table(record: Record) -> str:
    """Each network and direction: every rung's time, rate, memory and percent of the floor."""
    rows = []
    for key, found in groups(record.measurements, "network").items():
        for name, m in found.items():
            rate = f"{key.batch / m.median:,.0f}" if m.seconds else m.failure or "-"
            what = f"{key.layer} {key.direction}, {key.batch}: {name}"
            rows.append([what, _microseconds(m), rate, _megabytes(m), _percent(m)])
    return _markdown(["", "us", "images/s", "peak MB", "of floor"], rows)


def vendor_table(record: Record) -> str:
    """Every pass in cuDNN: each way's rate, and of the fastest the kernel of the longest name.

    That is the convolution's own: those beside it only convert or add.
    """
    rows = []
    names = ("nchw", "channels_last", "nchw_split", "channels_last_split")
    for key, found in groups(record.measurements, "vendor").items():
        timed = [m for m in found.values() if m.seconds]
        best = min(timed, key=lambda m: m.median, default=None)
        kernel = max(best.kernels, key=len, default="") if best else ""
        cells = (_rate(found.get(name)) for name in names)
        rows.append([f"{key.layer} {key.direction}, {key.dtype}", *cells, f"`{kernel[:60]}`"])
    header = ["TFLOP/s", "NCHW", "channels_last", "NCHW, split", "channels_last, split"]
    return _markdown([*header, "a kernel of the fastest"], rows)


def _rate(measurement: Measurement | None) -> str:
    if measurement is None or not measurement.seconds:
        return "-"
    return f"{measurement.flops / measurement.median / 1e12:.0f}"


def data_table(record: Record) -> str:
    """The data pipeline on one core of the machine's CPU."""
    found = groups(record.measurements, "data")
    if not found:
        return "Not measured yet."
    rows = [
        [f"{key.layer}, {name}", f"{key.batch / m.median:,.0f}"]
        for key, variants in found.items()
        for name, m in variants.items()
    ]
    table = _markdown(["", "images/s"], rows)
    return f"{table}\n\nOne core of a machine of {record.machine.cores} ({record.machine.cpu})."


def plots(record: Record) -> str:
    """The plots that :func:`plot` draws of the record."""
    return "\n".join(f"![{what}](plots/{name}.svg)" for name, (what, _) in _PLOTS.items())


def tests_table(record: Record) -> str:
    """What was tested on the machine."""
    rows = [
        [name, str(t.passed), str(len(t.failed)), str(t.skipped), "yes" if t.complete else "no"]
        for name, t in record.tests.items()
    ]
    return _markdown(["", "passed", "failed", "skipped", "complete"], rows)


def path_measured_table(record: Record) -> str:
    """The steps of a kernel's path, as measured."""
    rows = [
        [name, _microseconds(m), _percent(m)]
        for found in groups(record.measurements, "path").values()
        for name, m in found.items()
    ]
    return _markdown(["", "us", "of floor"], rows)


def _shown(record: CompileRecord) -> list[CompiledKernel]:
    """The part of a compile record that pages show: the paper's layers, in the usual form."""
    wanted = ("sm_90", "bf16", "nhwc")
    return [
        k
        for k in record.kernels
        if (k.target, k.dtype, k.layout) == wanted and " " not in k.layer  # "odd pool"
    ]


def compile_table(record: CompileRecord) -> str:
    """What the compiler made of the kernels."""
    rows = [
        [
            f"{k.layer} {k.direction} `{k.key[2]}`",
            str(k.registers),
            str(k.spilled_bytes),
            f"{100 * k.occupancy:.0f} %",
            f"{k.instructions_per_element:.4g}",
            f"{k.predicted_us:.4g}",
            k.bound,
        ]
        for k in _shown(record)
        if k.stem != _PATH
    ]
    header = ["kernel", "registers", "spilled bytes", "occupancy", "instructions per element"]
    return _markdown([*header, "predicted us", "bound by"], rows)


def path_table(record: CompileRecord) -> str:
    """The steps of a kernel's path, as compiled."""
    rows = [
        [
            f"`{k.kernel}`",
            f"{k.instructions['load_16_bytes']} + {k.instructions['load_narrower']}",
            str(k.registers),
            f"{k.instructions_per_element:.4g}",
            f"{k.predicted_us:.4g}",
            k.bound,
        ]
        for k in _shown(record)
        if k.stem == _PATH
    ]
    header = ["step", "loads of 16 bytes + narrower", "registers", "instructions per element"]
    return _markdown([*header, "predicted us", "bound by"], rows)


_NODE = Cluster(NVLINK)
_TWO = (Layout(columns=2), Layout(data=2), Layout(columns=2, hybrid=True))
_EIGHT = (Layout(data=4, columns=2), Layout(data=8), Layout(columns=8, hybrid=True))


def link_table() -> str:
    """What the predictions take for granted of links."""
    rows = [
        [
            link.name,
            f"{link.bytes_per_second / 1e9:g}",
            f"{1e6 * link.latency:g}",
            ", ".join(f"[{number}]({url})" for number, url in enumerate(link.sources, 1)),
        ]
        for link in (NVLINK, PCIE, INFINIBAND, ETHERNET)
    ]
    return _markdown(["", "GB/s of a GPU, each way", "us for a call", "sources"], rows)


def exchange_table() -> str:
    """Elements of each image that the paper's two columns send each other, and the step's bytes."""
    sent = scaling.exchanges(PRESETS["paper"], Layout(columns=2), BATCH, 1)
    rows = []
    for layer in dict.fromkeys(transfer.layer for transfer in sent):
        ways = [
            sum(t.bytes for t in sent if t[:3] == (layer, direction, column))
            for direction in ("forward", "backward")
            for column in (0, 1)
        ]
        rows.append([layer, *(f"{elements // BATCH:,}" for elements in ways), *_sizes(sum(ways))])
    rows.append(["together", "", "", "", "", *_sizes(sum(transfer.bytes for transfer in sent))])
    header = ["needed by", "forward, from 0", "from 1", "backward, from 0", "from 1"]
    return _markdown([*header, "MB in float32", "in bf16"], rows)


def _sizes(elements: int) -> list[str]:
    return [f"{elements * item_bytes / 1e6:.1f}" for item_bytes in (4, 2)]


def gradient_table() -> str:
    """The gradients of a process of column 0, how many sum them, and what each of these sends."""
    rows = []
    for layout in (*_TWO, *_EIGHT):
        row = [str(layout)]
        for summed in scaling.gradients(PRESETS["paper"], 1000, layout):
            row += [f"{summed.bytes / 1e6:.1f}", str(summed.processes)]
            row += [f"{summed.sent_bytes / 1e6:.1f}"]
        rows.append(row)
    header = ["MB", "fully connected", "processes", "sent", "convolutions", "processes", "sent"]
    return _markdown(header, rows)


def two_gpus_table(share: float) -> str:
    """Predicted: where the time of a step on two GPUs goes, at a share of the roofline's speed."""
    rows = []
    for batch in (BATCH, 8 * BATCH):
        alone = predicted_step(Layout(), _NODE, batch, floor_share=share)
        cases = [(f"{batch}, {Layout()}", alone)]
        for link in (NVLINK, PCIE):
            for layout in _TWO:
                step = predicted_step(layout, Cluster(link), batch, floor_share=share)
                cases.append((f"{batch}, {layout}, {link.name}", step))
        for name, step in cases:
            parts = (step.compute, step.exchange, step.wait, step.total)
            times = [f"{1e3 * seconds:.2f}" for seconds in parts]
            rate = f"{batch / step.total:,.0f}"
            rows.append([name, *times, rate, f"{alone.total / step.total:.2f}x"])
    header = ["ms", "compute", "exchange", "wait", "step", "images/s", "against one"]
    return _markdown(header, rows)


def scaling_table(share: float) -> str:
    """Predicted: images per second of several GPUs, and how often that of one GPU."""
    cases = [(layout, _NODE, "one machine") for layout in (*_TWO, *_EIGHT)]
    for machines, between in ((2, INFINIBAND), (4, INFINIBAND), (2, ETHERNET), (4, ETHERNET)):
        cluster, where = Cluster(NVLINK, between), f"{machines}, {between.name}"
        for layout in _EIGHT:
            cases.append((replace(layout, data=machines * layout.data), cluster, where))
    rows = []
    for layout, cluster, where in cases:
        row = [f"{layout}; {where}"]
        # the whole batch, and that of one GPU
        for batch, one in (
            (BATCH, BATCH),
            (8 * BATCH, 8 * BATCH),
            (BATCH * layout.processes, BATCH),
        ):
            step = predicted_step(layout, cluster, batch, floor_share=share)
            alone = predicted_step(Layout(), _NODE, one, floor_share=share)
            rate, one_rate = batch / step.total, one / alone.total
            row.append(f"{rate:,.0f} ({rate / one_rate:.2f}x)")
        rows.append(row)
    return _markdown(["images/s", "batch 128", "batch 1024", "128 on each GPU"], rows)


def parallel_table(record: Record) -> str:
    """Steps of several processes on a CPU, and what the model makes of one process's steps.

    Of each the fastest: what else runs on the machine only adds.
    """
    fastest = {
        measured.key: min(measured.seconds)
        for measured in record.measurements
        if measured.key.suite == "parallel" and measured.seconds
    }
    if not fastest:
        return "Not measured yet."
    steps = {(k.variant, k.batch): s for k, s in fastest.items() if k.op == "alexnet"}
    one = {batch: s for (variant, batch), s in steps.items() if variant == str(Layout())}
    link = scaling.measured_link({k.batch: s for k, s in fastest.items() if k.op == "swap"})
    rows = []
    for layout in scaling.CPU_LAYOUTS:
        step = scaling.cpu_step(layout, scaling.CPU_BATCH, one, link, record.machine.cores)
        seconds = (step.compute, step.exchange, step.wait, step.total)
        measured = steps[str(layout), scaling.CPU_BATCH]
        cells = [f"{1e3 * each:.1f}" for each in (*seconds, measured)]
        rows.append([str(layout), *cells, f"{measured / step.total:.2f}"])
    header = [
        "ms",
        "compute",
        "exchange",
        "wait",
        "predicted",
        "measured",
        "measured over predicted",
    ]
    swap = f"{1e6 * link.latency:.0f} us and {link.bytes_per_second / 1e9:.1f} GB/s each way"
    return f"{_markdown(header, rows)}\n\nA message: {swap}; {record.machine.cores} cores."


_TABLES: dict[str, Callable[[Record], str]] = {
    "machine": machine_table,
    "tests": tests_table,
    "ops": ops_table,
    "memory": memory_table,
    "plots": plots,
    "network": network_table,
    "vendor": vendor_table,
    "data": data_table,
    "path-measured": path_measured_table,
}
_COMPILE_TABLES: dict[str, Callable[[CompileRecord], str]] = {
    "compile": compile_table,
    "path": path_table,
}


def tables(record: Record | None, host: Record | None = None) -> dict[str, str]:
    """All tables by name; those of a GPU say so where there is no record.

    Args:
        record: Made on a GPU.
        host: Made without one: says how fast the data pipeline is, where the other does not.
    """
    made = {name: table(record) if record else NOT_MEASURED for name, table in _TABLES.items()}
    if host and not (record and groups(record.measurements, "data")):
        made["data"] = data_table(host)
    share = scaling.measured_share(record)
    made |= {"exchanges": exchange_table(), "gradients": gradient_table(), "links": link_table()}
    made |= {"two-gpus": two_gpus_table(share), "scaling": scaling_table(share)}
    made["parallel"] = parallel_table(host) if host else "Not measured yet."
    compiled = load(CompileRecord, COMPILE_RECORD)
    return made | {name: table(compiled) for name, table in _COMPILE_TABLES.items()}


def pages() -> list[Path]:
    """README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rendered(page: str, made: dict[str, str]) -> str:
    """The page with its tables replaced.

    Raises:
        KeyError: The page names a table that there is not.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}\n{made[found[2]]}\n\n{found[3]}", page)


def plot(record: Record, folder: Path) -> list[Path]:
    """Draw every plot, as SVG and PNG."""
    written = []
    for name, (_, draw) in _PLOTS.items():
        figure = new_figure(9, 5)
        draw(record, figure.subplots())
        written += save(figure, folder / name)
    return written


def _draw_bars(record: Record, axes: Any) -> None:
    found = groups(record.measurements, "ops")
    variants = list(dict.fromkeys(name for group in found.values() for name in group))
    labels = [f"{key.layer} {key.direction} {key.dtype} {key.batch}" for key in found]
    width = 0.8 / max(len(variants), 1)
    for index, variant in enumerate(variants):
        heights = [
            1 / group[variant].floor_share if variant in group else math.nan
            for group in found.values()
        ]
        places = [place + index * width for place in range(len(found))]
        axes.bar(places, heights, width, label=variant)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(1, color="black", linewidth=1)
    axes.set_ylabel(f"time over floor, {record.machine.gpu}")
    axes.set_xticks(range(len(found)), labels, rotation=90)
    axes.figure.legend(loc="outside upper center", ncols=len(variants))


def _draw_roofline(record: Record, axes: Any) -> None:
    bandwidth = record.ceilings.copy_bytes_per_second
    for dtype, rate in record.ceilings.matmul_flops_per_second.items():
        intensities = [8.0, rate / bandwidth, 8192.0]
        roof = [min(rate, bandwidth * x) / 1e12 for x in intensities]
        axes.plot(intensities, roof, label=f"limit, {dtype}")
    timed = [m for m in record.measurements if m.seconds and m.flops and m.key.suite == "ops"]
    for variant in dict.fromkeys(m.key.variant for m in timed):
        chosen = [m for m in timed if m.key.variant == variant]
        x = [m.flops / m.bytes for m in chosen]
        y = [m.flops / m.median / 1e12 for m in chosen]
        axes.plot(x, y, "o", label=variant)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel(f"TFLOP/s, {record.machine.gpu}")
    axes.legend()


_PLOTS = {
    "ops": ("Time of each op over its floor", _draw_bars),
    "roofline": ("Convolutions under the roofline", _draw_roofline),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("record", nargs="?", type=Path, help="default: the newest")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the newest is sought")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--short", action="store_true", help="one line per group")
    action.add_argument("--write", action="store_true", help="refresh README and docs")
    action.add_argument("--check", action="store_true", help="exit 1 if they differ")
    parsed = parser.parse_args(arguments)
    paths = parsed.record or newest(parsed.results), newest(parsed.results, gpu=False)
    record, host = (load(Record, path) if path else None for path in paths)
    if parsed.short:
        chosen = record or host
        print(short(chosen) if chosen else NOT_MEASURED)
        return 0
    made = tables(record, host)
    if not (parsed.write or parsed.check):
        print("\n\n".join(f"## {name}\n\n{table}" for name, table in made.items()))
        return 0
    if record and not record.machine.gpu:
        raise RecordError(f"{paths[0]}: made without a GPU, so its times are not for the pages")
    stale = _refresh(made, write=parsed.write)
    if parsed.write and record:
        print(*plot(record, PLOTS), sep="\n")
    return 1 if stale and parsed.check else 0


def _refresh(made: dict[str, str], write: bool) -> bool:
    """Whether a page's tables differ from these; they are replaced if ``write``."""
    stale = False
    for page in pages():
        text = page.read_text("utf-8")
        fresh = rendered(text, made)
        if fresh != text:
            stale = True
            did = "written" if write else "differs from the records"
            print(f"{page.relative_to(ROOT)}: {did}")
            if write:
                page.write_text(fresh, "utf-8")
    return stale
