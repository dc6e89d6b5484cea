"""Compile every kernel as the ops launch it, for GPUs that this machine need not have.

    python -m bench static sm_90        # a table of what the compiler made of each kernel
    python -m bench static --check      # compare all with the committed record, as CI does
    python -m bench static --record     # accept all as they are now

The ops run on meta tensors with launches recorded instead of made, so what is compiled is
exactly what a GPU would be asked for: types, alignment, constants, warps and stages. Registers,
spills and instructions are read from the result with the tools that come with Triton;
:mod:`bench.compile_record` says what they mean and predicts a time from them.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from types import SimpleNamespace
from typing import Any

import torch

import alexkern.ops as ops
from alexkern import use_backend
from alexkern.models import alexnet
from alexkern.ops import conv_passes
from alexkern.optim import KrizhevskySGD
from alexkern.runtime import config
from alexkern.runtime.launch import Launch, record_launches, underlying
from bench import lrn_path
from bench.compile_record import (
    GPUS,
    CompiledKernel,
    CompileRecord,
    differences,
    four_digits,
    predict,
    programs_per_multiprocessor,
    record_path,
    table,
)
from bench.layers import (
    AUGMENTATION,
    BATCH,
    CONVOLUTIONS,
    DROPOUTS,
    FULLY_CONNECTED,
    NORMALISED,
    PACKING,
    POOLS,
)
from bench.machine import DTYPES, precision
from bench.programs import (
    WARP,
    Compilation,
    Program,
    compilation,
    compile_programs,
    executed_instructions,
)
from bench.record import FORMAT, RecordError, load, save
from bench.work import parameters as parameter_count
from bench.work import update

# not in the paper: channels, and elements in the batch, that 8 divides and 16 does not
ODD = (24, 7, 7)
_ODD_BATCH = 3
# so many images that offsets need 64 bits
_LARGE_BATCH = 2**15

# Parameters that the optimizer's kernel updates, of which it is given addresses only. The odd
# ones are fewer than a vector.
_UPDATED = {"sgd": parameter_count(), "odd sgd": 3}

LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
TARGETS = (*GPUS, "gfx942")
# the last is no op's, but that of docs/kernel-path.md
STEMS = ("augment", "conv", "dropout", "linear", "lrn", "lrn_pool", "pool", "sgd", "lrn_path")
_EVERYTHING: dict[str, Any] = {
    "targets": tuple(GPUS),
    "dtypes": tuple(DTYPES),
    "layouts": tuple(LAYOUTS),
    "stems": STEMS,
}

_PAPER_NORM: Any = {"alpha": 1e-4, "beta": 0.75, "k": 2.0, "alpha_mode": "sum"}

# How often a kernel's loops are run, from its parameters: one number if all loops make as many
# trips, else one per loop that the compiler leaves in the program, in order.
TRIPS: dict[str, Callable[[Any], tuple[int, ...]]] = {
    "augment_crops": lambda p: (p.images_per_program,),
    "conv2d": lambda p: (_ceil(p.KERNEL_H * p.KERNEL_W * p.GROUP_IN, p.BLOCK_K),),
    "conv2d_weight_grad": lambda p: (_ceil(p.pixels_per_split, p.BLOCK_K),),
    # at most: taps that lie outside the image are left out
    "conv2d_boxes": lambda p: (p.KERNEL_H * p.KERNEL_W * p.GROUP_IN // p.BLOCK_K,),
    "conv2d_weight_grad_boxes": lambda p: (
        _ceil(p.images, p.BLOCK_K) * _ceil(p.height * p.width, p.grid[1]),
    ),
    "conv2d_epilogue_backward": lambda p: (_ceil(p.pixels_per_split, p.BLOCK_M),),
    "linear_epilogue_backward": lambda p: (_ceil(p.rows_per_split, p.BLOCK_M),),
    "sum_partials": lambda p: (_ceil(p.splits, p.ROWS),),
    "lrn_max_pool_forward": lambda p: (p.OUT_ROWS,),
    "lrn_max_pool_backward": lambda p: (p.STEPS,) if p.STEPS > 1 else (),
    "step_1_formula": lambda p: (5,),
    "max_pool_forward": lambda p: (p.KERNEL_H * p.KERNEL_W,),
    "max_pool_backward_looped": lambda p: (
        (((p.KERNEL_H - 1) * p.DILATION_H) // p.STRIDE_H + 1)
        * (((p.KERNEL_W - 1) * p.DILATION_W) // p.STRIDE_W + 1),
    ),
}

# Kernels that multiply: what a configuration of a convolution changes.
MULTIPLYING = ("conv2d", "conv2d_boxes", "conv2d_weight_grad", "conv2d_weight_grad_boxes")

# The tensors that a kernel writes over what it has read.
IN_PLACE = {"linear_epilogue": ("y_pointer",), "conv2d_epilogue": ("y_pointer",)}

# The parameter that is a kernel's result, where it has no count.
_RESULTS = ("result_pointer", "masked_pointer", "y_pointer", "dx_pointer", "partial_pointer")


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)


@dataclass(frozen=True)
class LayerLaunch:
    """One launch of a layer; the fields are those of :class:`CompiledKernel`, ``trips`` apart."""

    layer: str
    direction: str
    number: int
    dtype: str
    layout: str
    compilation: Compilation
    programs: int
    elements: int
    bytes: int
    flops: int
    trips: tuple[int, ...] | None


def is_candidate(layer: str) -> bool:
    """Whether a convolution is compiled as a measurement may choose it to be."""
    return " as " in layer


def layer_launches(
    dtype: str,
    layout: str,
    stems: Sequence[str] = STEMS,
    target: str = "sm_90",
    candidates: bool = True,
) -> list[LayerLaunch]:
    """The launches of AlexNet's layers, forward and backward, at batch 128.

    With ``candidates`` also every configuration of the convolutions, for sm_90 in bf16 and
    channels_last.
    """
    found = []
    major = 8 if target == "sm_80" else 9
    calls = _layers(dtype, layout)
    if candidates and (dtype, layout, target) == ("bf16", "nhwc", "sm_90") and "conv" in stems:
        calls = chain(calls, _candidates())
    for layer, call in calls:
        with (
            record_launches() as launches,
            use_backend("triton"),
            precision(dtype),
            config.assumed_generation(major),
        ):
            output = call()
            forward = len(launches)
            if output.requires_grad:
                output.backward(torch.empty_like(output))
        for direction, made in (("forward", launches[:forward]), ("backward", launches[forward:])):
            for index, launch in enumerate(made):
                if is_candidate(layer) and launch.kernel.__name__ not in MULTIPLYING:
                    continue  # candidates differ in nothing else
                number = sum(other.kernel is launch.kernel for other in made[: index + 1])
                found.append(_layer_launch(launch, layer, direction, number, dtype, layout))
    if dtype == "tf32":  # which only the convolutions see
        stems = [stem for stem in stems if stem == "conv"]
    return [launch for launch in found if launch.compilation.stem in stems]


def _layers(dtype: str, layout: str) -> Iterator[tuple[str, Any]]:
    """Each layer's name, and a call of its op on meta tensors."""

    def tensor(*shape: int) -> torch.Tensor:
        result = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        if len(shape) == 4:
            result = result.to(memory_format=LAYOUTS[layout])
        return result.requires_grad_()

    def convolution(batch: int, shape: tuple[int, ...], *geometry: Any) -> Any:
        channels, kernel, stride, padding, groups = geometry
        image = tensor(batch, *shape).requires_grad_(shape[0] > 3)  # conv1 learns no image
        weight = tensor(channels, shape[0] // groups, kernel, kernel)
        arguments = image, weight, tensor(channels), stride, padding, 1, groups
        return lambda: ops.conv2d_bias_relu(*arguments)

    def finishing(*shape: int) -> Any:
        """What is left to do after a vendor's convolution."""
        output, bias = tensor(BATCH, *shape).detach(), tensor(shape[0]).detach()
        return lambda: conv_passes.finish(output, bias, relu=True)

    def normalisation(*shape: int) -> Any:
        return lambda: ops.local_response_norm(tensor(*shape), 5, 1e-4, 0.75, 2.0, "sum")

    def normalised_pooling(*shape: int) -> Any:
        return lambda: ops.lrn_max_pool2d(tensor(*shape), 5, 3, 2, **_PAPER_NORM)

    def pooling(*shape: int, kernel: int = 3, stride: int = 2) -> Any:
        return lambda: ops.max_pool2d(tensor(*shape), kernel, stride)

    def dropping(*shape: int, **place: Any) -> Any:
        return lambda: ops.dropout(tensor(*shape), **place)

    def whole(batch: int, shape: tuple[int, ...], *geometry: Any) -> Any:
        channels, kernel, stride, padding, groups = geometry
        image = tensor(batch, *shape).requires_grad_(shape[0] > 3)
        weight = tensor(channels, shape[0] // groups, kernel, kernel)
        arguments = image, weight, tensor(channels), stride, padding, 1, groups
        tail: Any = {"size": 5, "kernel_size": 3, "pool_stride": 2, **_PAPER_NORM}
        return lambda: ops.conv2d_bias_relu_lrn_max_pool2d(*arguments, **tail)

    def fully_connected(batch: int, inputs: int, outputs: int, **keywords: Any) -> Any:
        arguments = tensor(batch, inputs), tensor(outputs, inputs), tensor(outputs)
        return lambda: ops.linear_bias_relu_dropout(*arguments, **keywords)

    def augmentation(
        batch: int, stored: int, *crop: int, shifted: bool = False, **packing: Any
    ) -> Any:
        def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        images, mean = meta(torch.uint8, batch, stored, stored, 3), meta(torch.float32, *crop, 3)
        corners, flips = meta(torch.int64, batch, 2), meta(torch.bool, batch)
        shift = meta(torch.float32, batch, 3) if shifted else None
        arguments = images, corners, flips, mean, 57.6, shift
        return lambda: ops.augment(*arguments, dtype=DTYPES[dtype], **packing)

    def updating(*shapes: tuple[int, ...]) -> Any:
        learned = [tensor(*shape) for shape in shapes]
        for parameter in learned:
            parameter.grad = torch.empty_like(parameter)
        optimizer = KrizhevskySGD(learned, lr=0.01)

        def step() -> torch.Tensor:
            optimizer.step()
            return learned[0].detach()

        return step

    if layout == "nhwc":  # the only layout of the result
        yield "augment", augmentation(BATCH, *AUGMENTATION)
        yield "augment packed", augmentation(BATCH, *AUGMENTATION, **PACKING)
        yield "augment shift", augmentation(BATCH, *AUGMENTATION, shifted=True)
        yield "odd augment", augmentation(_ODD_BATCH, 11, 7, 8, shifted=True)
        yield "large augment", augmentation(_LARGE_BATCH, *AUGMENTATION)
    for name, layer in CONVOLUTIONS.items():
        yield name, convolution(BATCH, *layer)
    for name, layer in CONVOLUTIONS.items():
        yield f"{name} vendor", finishing(layer.channels, *layer.output_size)
    for number, shape in POOLS.items():
        if number in NORMALISED:
            yield f"lrn{number}", normalisation(BATCH, *shape)
            # these take long to compile in NCHW, where they differ in little
            if layout == "nhwc" or number == "1":
                yield f"lrn_pool{number}", normalised_pooling(BATCH, *shape)
            if layout == "nhwc":
                yield f"conv_lrn_pool{number}", whole(BATCH, *CONVOLUTIONS[f"conv{number}"])
        yield f"pool{number}", pooling(BATCH, *shape)
    if layout == "nhwc" and dtype in ("bf16", "fp16"):
        for step in lrn_path.STEPS:
            image = tensor(BATCH, *POOLS["1"]).detach()
            yield "lrn1", partial(lrn_path.run, step, image)
    for number, (units,) in DROPOUTS.items():
        yield f"dropout{number}", dropping(BATCH, units)
        yield f"dropout{number} shard", dropping(BATCH, units // 2, row_stride=units)
    for number in DROPOUTS:
        name = f"fc{number}"
        yield name, fully_connected(BATCH, *FULLY_CONNECTED[name])
    yield "fc6 eval", fully_connected(BATCH, *FULLY_CONNECTED["fc6"], training=False)
    yield "fc6 linear", fully_connected(BATCH, *FULLY_CONNECTED["fc6"], activation="none")
    with torch.device("meta"):
        network = alexnet("paper")
    yield "sgd", updating(*(parameter.shape for parameter in network.parameters()))
    yield "odd sgd", updating((_UPDATED["odd sgd"],))
    for name, batch, shape, outputs in (
        ("odd", _ODD_BATCH, ODD, ODD[0]),
        ("large", _LARGE_BATCH, CONVOLUTIONS["conv2"][0], 2**17),
    ):
        yield f"{name} conv", convolution(batch, shape, shape[0], 3, 2, 1, 2)
        yield f"{name} lrn", normalisation(batch, *shape)
        if layout == "nhwc" or name == "large":
            yield f"{name} lrn_pool", normalised_pooling(batch, *shape)
        yield f"{name} pool", pooling(batch, *shape)
        yield f"{name} dropout", dropping(batch, *shape)
        yield f"{name} linear", fully_connected(batch, shape[0], outputs)
    # too many taps and pixels to unroll
    yield "odd looped pool", pooling(_ODD_BATCH, *ODD, kernel=6, stride=3)


def _candidates() -> Iterator[tuple[str, Any]]:
    """The convolutions in every configuration that a measurement may choose."""
    for tile in config.candidates(config.MatmulConfig):
        for name, call in _layers("bf16", "nhwc"):
            if name in CONVOLUTIONS and (not tile.boxes or CONVOLUTIONS[name].group_in % 64 == 0):
                with config.forced(tile):
                    yield f"{name} as {tile.name}", call


def _layer_launch(
    launch: Launch, layer: str, direction: str, number: int, dtype: str, layout: str
) -> LayerLaunch:
    kernel = launch.kernel
    arguments = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    parameters = SimpleNamespace(**arguments, **launch.constants, grid=launch.grid)
    trips = TRIPS.get(kernel.__name__)
    if layer in _UPDATED:
        elements = _UPDATED[layer]
        size = update(elements, DTYPES[dtype].itemsize).bytes
    else:
        elements = _elements(kernel.__name__, parameters)
        size = _bytes(kernel.__name__, parameters)
    return LayerLaunch(
        layer,
        direction,
        number,
        dtype,
        layout,
        compilation(launch),
        programs=prod(launch.grid),
        elements=elements,
        bytes=size,
        flops=_flops(kernel.__name__, parameters),
        trips=trips(parameters) if trips else None,
    )


def _elements(kernel: str, parameters: Any) -> int:
    if hasattr(parameters, "count"):
        return int(parameters.count)
    for name in _RESULTS:
        if hasattr(parameters, name):
            return int(getattr(parameters, name).numel())
    raise ValueError(f"{kernel} has no parameter that bench.static knows as its result")


def _bytes(kernel: str, parameters: Any) -> int:
    """Of all tensors; of stored images those of the crops, one for each value of the mean."""
    # a pointer that the kernel does not use is given a tensor that is there already
    values = map(underlying, vars(parameters).values())
    tensors = {id(value): value for value in values if isinstance(value, torch.Tensor)}
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    if kernel == "augment_crops":
        sizes[id(parameters.images_pointer)] = parameters.batch * parameters.mean_pointer.numel()
    written_over = [getattr(parameters, name) for name in IN_PLACE.get(kernel, ())]
    return sum(sizes.values()) + sum(sizes[id(tensor)] for tensor in written_over)


def _flops(kernel: str, parameters: Any) -> int:
    """Of a convolution: for each element of its output, or of the result that takes its place."""
    if kernel not in MULTIPLYING:
        return 0
    outputs = {"conv2d_weight_grad": "grad_pointer", "conv2d_weight_grad_boxes": "grad"}
    output = underlying(getattr(parameters, outputs.get(kernel, "result_pointer")))
    products = parameters.KERNEL_H * parameters.KERNEL_W * parameters.GROUP_IN
    return int(2 * output.numel() * products)


def compile_kernels(
    targets: Sequence[str],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    stems: Sequence[str] = STEMS,
    candidates: bool = True,
) -> list[CompiledKernel]:
    """The entries of a record. Other targets than those of GPUS are compiled and left out."""
    work = [
        (launch, target)
        for target in targets
        for dtype in dtypes
        for layout in layouts
        for launch in layer_launches(dtype, layout, stems, target, candidates)
    ]
    programs = compile_programs((launch.compilation, target) for launch, target in work)
    return [
        _compiled_kernel(launch, target, programs[launch.compilation, target])
        for launch, target in work
        if target in GPUS
    ]


def _compiled_kernel(launch: LayerLaunch, target: str, program: Program) -> CompiledKernel:
    compilation, gpu = launch.compilation, GPUS[target]
    options = dict(compilation.options)
    resident = programs_per_multiprocessor(gpu, program.binary, options["num_warps"])
    executed = executed_instructions(compilation.kernel, program, launch.trips)
    warp_instructions = executed * options["num_warps"] * launch.programs
    tensor_cores = program.instructions["tensor_core"] > 0
    predicted_us, bound = predict(
        gpu, launch.dtype, tensor_cores, launch.bytes, warp_instructions, launch.flops
    )
    return CompiledKernel(
        layer=launch.layer,
        direction=launch.direction,
        kernel=compilation.kernel,
        number=launch.number,
        stem=compilation.stem,
        dtype=launch.dtype,
        layout=launch.layout,
        target=target,
        blocks={n: v for n, v in compilation.constants if n.startswith(("BLOCK", "VECTOR"))},
        **options,
        registers=program.binary.registers,
        spilled_bytes=program.binary.spilled_bytes,
        shared_bytes=program.binary.shared_bytes,
        programs_per_multiprocessor=resident,
        occupancy=resident * options["num_warps"] / gpu.warps,
        instructions=program.instructions,
        programs=launch.programs,
        elements=launch.elements,
        bytes=launch.bytes,
        flops=launch.flops,
        instructions_per_element=four_digits(warp_instructions * WARP / launch.elements),
        predicted_us=predicted_us,
        bound=bound,
    )


def _check(selection: dict[str, Any]) -> int:
    """Compare with the committed record; the exit status."""
    import triton

    path = record_path(triton.__version__)
    if not path.exists():
        raise RecordError(
            f"{path}: no record for triton {triton.__version__}; python -m bench static --record "
            "makes one"
        )
    committed = [
        kernel
        for kernel in load(CompileRecord, path).kernels
        if all(getattr(kernel, name.removesuffix("s")) in selection[name] for name in selection)
    ]
    fresh = compile_kernels(**selection)
    lines = differences(committed, fresh)
    if not lines:
        print(f"{len(fresh)} kernels are as in {path.name}")
        return 0
    print("\n".join(lines))
    print(f"{len(lines)} of {len(fresh)} kernels are not as in {path.name}.")
    print("If that is intended: python -m bench static --record, and commit the result.")
    return 1


def _record() -> int:
    """Write the record of the installed triton; the exit status."""
    import triton

    path = record_path(triton.__version__)
    kernels = compile_kernels(**_EVERYTHING)
    save(CompileRecord(FORMAT, triton.__version__, kernels), path)
    print(f"{len(kernels)} kernels written to {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m bench static", description=description)
    parser.add_argument("targets", nargs="*", help=", ".join(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    parser.add_argument("--stems", nargs="+", choices=STEMS)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with the committed record")
    action.add_argument("--record", action="store_true", help="write the record (always of all)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: a table of sm_90 in bf16, channels_last, unless told otherwise."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    known = tuple(GPUS) if options.check else TARGETS
    if unknown := [target for target in options.targets if target not in known]:
        parser.error(f"unknown targets {unknown}, choose from {known}")
    chosen = {name: value for name in _EVERYTHING if (value := getattr(options, name))}
    if options.record:
        if chosen:
            parser.error("--record writes all kernels, not a selection")
        return _record()
    if options.check:
        return _check(_EVERYTHING | chosen)
    default = {"targets": ("sm_90",), "dtypes": ("bf16",), "layouts": ("nhwc",)}
    selection = _EVERYTHING | default | chosen
    for line in table(compile_kernels(**selection)):
        print(line)
    for target in selection["targets"]:
        if target not in GPUS:
            print(f"{target}: {', '.join(selection['stems'])} compiled; nothing more is checked")
    return 0
