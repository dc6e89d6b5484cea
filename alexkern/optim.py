"""The paper's update rule as a ``torch.optim.Optimizer``."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from alexkern import reference
from alexkern.runtime import config
from alexkern.runtime.backend import runs_triton
from alexkern.runtime.launch import device_code, launch
from alexkern.runtime.layout import is_dense, ordered_as

_HALF = (torch.float16, torch.bfloat16)

# Elements that the kernel treats alike: 16 bytes of float32.
_VECTOR = 4


def weights_and_biases(
    model: nn.Module, lr_factor: float = 2.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups in which a network's biases learn at their own rate.

    With the defaults, biases learn twice as fast as weights and do not decay: so did the 2012
    code (``epsB=0.02`` beside ``epsW=0.01``, no decay of biases in its update) and Caffe's AlexNet
    (``lr_mult: 2``, ``decay_mult: 0``). The paper mentions neither: "equal learning rate for all
    layers" (section 5).

    Args:
        model: The network; a bias is a parameter whose own name is ``bias``.
        lr_factor: Times the optimizer's learning rate, for biases.
        weight_decay: Of biases.

    Returns:
        Groups for :class:`KrizhevskySGD`: weights, with the optimizer's defaults, and biases.
    """
    named = list(model.named_parameters())
    biases = [parameter for name, parameter in named if name.rpartition(".")[2] == "bias"]
    weights = [parameter for name, parameter in named if name.rpartition(".")[2] != "bias"]
    apart = {"params": biases, "lr_factor": lr_factor, "weight_decay": weight_decay}
    return [{"params": weights}, apart]


class KrizhevskySGD(Optimizer):
    """Stochastic gradient descent as in the paper, section 5.

    For a weight w with gradient g::

        v <- momentum * v - weight_decay * lr * w - lr * g
        w <- w + v

    The learning rate is inside the velocity v, where ``torch.optim.SGD`` multiplies the velocity
    by it: the two agree while the rate is constant, and after a drop this one still carries the
    larger steps of before.

    Parameters in float16 or bfloat16 get a float32 master weight, which learns, and of which the
    parameter is the rounded copy. State, in the parameter's memory order and in float32 (float64
    for float64): ``velocity``, and ``master`` for a half-precision parameter; both stay float32 in
    ``state_dict`` and ``load_state_dict``. A half-precision parameter that is changed by hand
    falls back to its master at the next step: load the optimizer's state along with the model's.

    The ``triton`` backend, and ``auto`` on a GPU, update all parameters of a group that agree in
    device and dtypes in one launch and one pass, 20 bytes per parameter; elements that cannot
    be read 16 bytes at a time (a tensor's last three, an odd address) take a second one. Other
    dtypes, parameters with gaps in memory and tensor subclasses take ``torch._foreach`` calls, as
    does the ``torch`` backend. A gradient in another memory order than its parameter is copied
    once per step.

    CUDA graphs: give ``lr`` as a float32 tensor on the device, which each replay reads, and make
    the same step once before the capture, as state and tables of addresses are not made during
    one (RuntimeError). A capture may bring new gradients, as it does after ``zero_grad()``: their
    addresses then are arguments of a kernel in the graph, not a copy from the host. The optimizer
    keeps what a captured step reads; after ``load_state_dict``, capture again.

    Args:
        params: Parameters, or dicts of parameter groups (see :func:`weights_and_biases`).
        lr: Learning rate: a number or a tensor of one element. No step waits for a device tensor,
            unless parameters are on the CPU.
        momentum: Share of the velocity that stays.
        weight_decay: Decay of the weights, times the learning rate.
        lr_factor: Times ``lr``: for groups that shall follow one schedule at their own rates.

    Attributes:
        found_inf: Not set at first. A tensor of one element on the device: where it is not zero,
            steps change nothing, and the host does not wait to know. Set it to gate the steps by
            a check of your own; :class:`torch.amp.GradScaler` sets it before a step, and deletes
            it after.
        grad_scale: Likewise; gradients are divided by it as they are read, and stay as they are.
            GradScaler's ``unscale_``, which clipping needs, refuses float16 gradients, as ever.

    Raises:
        ValueError: ``lr``, ``momentum``, ``weight_decay`` or ``lr_factor`` is negative, or ``lr``
            a tensor of another number of elements.
        RuntimeError: By ``step``: a gradient is sparse, or see CUDA graphs above.
    """

    found_inf: Tensor
    grad_scale: Tensor
    _step_supports_amp_scaling = True  # torch.amp.GradScaler sets the two and does not unscale

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        *,
        lr_factor: float = 1.0,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {list(lr.shape)}")
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "lr_factor": lr_factor}
        for name, value in defaults.items():
            if not value >= 0:
                raise ValueError(f"Invalid {name} value: {value}")
        super().__init__(params, {"lr": lr, **defaults})
        self._forget_tables()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("lr_factor", 1.0)
        self._forget_tables()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; float32 state stays float32."""
        loaded: dict[str, Any] = {}
        # The last hook sees what the others made of the dict.
        handle = self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # The base class has cast all state to its parameter's dtype.
        names = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for parameter, name in zip(parameters, names, strict=True):
            for key, value in loaded["state"].get(name, {}).items():
                self.state[parameter][key] = value.to(parameter.device, _state_dtype(parameter))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            for kind, updates in self._updates(group).items():
                first, rule = updates[0], self._rule(group, kind.device)
                if kind.plain and runs_triton(first.parameter, first.gradient):
                    self._launch((index, kind), updates, rule)
                else:
                    _run_reference(updates, rule)
        return loss

    def _forget_tables(self) -> None:
        self._plans: dict[tuple[int, _Kind], _Plan] = {}
        self._captured: list[tuple[Tensor, ...]] = []  # what graphs may read at any time

    @torch._disable_dynamo  # type: ignore[attr-defined]  # no traced tensor has an address
    def _launch(self, key: "tuple[int, _Kind]", updates: "list[_Update]", rule: "_Rule") -> None:
        """Run the kernel on updates of one kind, through tables that are made when needed."""
        places = [update.place for update in updates]
        largest = max((update.parameter for update in updates), key=Tensor.numel)
        blocks = [config.multi_tensor(largest, vector) for vector in (_VECTOR, 1)]
        plan = self._plans.get(key)
        if plan is None or (plan.places, plan.blocks) != (places, blocks):
            _check_not_captured(largest)
            plan = self._plans[key] = _Plan(places, blocks, _tables(updates, blocks))
        for table in plan.tables:
            gradients = table.gradients(updates)
            if _is_captured(largest):
                self._captured.append((table.pieces, table.owners, gradients))
            _launch_table(table, gradients, updates[0], rule)

    def _updates(self, group: dict[str, Any]) -> "dict[_Kind, list[_Update]]":
        """What there is to do in a group, by what a launch must have in common."""
        found = defaultdict(list)
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None or parameter.numel() == 0:
                continue
            if gradient.layout != torch.strided:
                raise RuntimeError("KrizhevskySGD does not support sparse gradients")
            plain = type(parameter) in (Tensor, nn.Parameter) and is_dense(parameter)
            master, velocity = self._state_of(parameter, plain)
            if plain:
                gradient = ordered_as(gradient, parameter)
            kind = _Kind(parameter.device, parameter.dtype, gradient.dtype, plain)
            found[kind].append(_Update(parameter, master, velocity, gradient))
        return found

    def _state_of(self, parameter: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
        """Master weight (the parameter itself if not half precision) and velocity."""
        state, dtype = self.state[parameter], _state_dtype(parameter)
        half = parameter.dtype in _HALF
        if not half:
            state.pop("master", None)  # out of date if the parameter is halved again
        if "velocity" not in state:
            _check_not_captured(parameter)
            state["velocity"] = torch.zeros_like(parameter, dtype=dtype)
        if half and "master" not in state:
            _check_not_captured(parameter)
            state["master"] = parameter.detach().to(dtype)
        # A model may move, change its memory format, or continue with another one's state.
        for name in ("velocity", "master") if half else ("velocity",):
            value = state[name].to(parameter.device, dtype)
            value = ordered_as(value, parameter) if plain else value
            if value is not state[name]:
                _check_not_captured(parameter)
                state[name] = value
        return state["master"] if half else parameter, state["velocity"]

    def _rule(self, group: dict[str, Any], device: torch.device) -> "_Rule":
        lr, factor = group["lr"], group["lr_factor"]
        if isinstance(lr, Tensor):
            on_host = lr.is_cpu and device.type != "cpu"
            lr = lr.item() if on_host else _sent(lr, device)
        return _Rule(
            lr if factor == 1 else lr * factor,
            group["momentum"],
            group["weight_decay"],
            self._on_device("grad_scale", device),
            self._on_device("found_inf", device),
        )

    def _on_device(self, name: str, device: torch.device) -> Tensor | None:
        value: Tensor | None = getattr(self, name, None)
        return None if value is None else _sent(value, device)


class _Rule(NamedTuple):
    """The numbers of a step; tensors have no dimensions and are on the parameters' device."""

    lr: float | Tensor
    momentum: float
    weight_decay: float
    grad_scale: Tensor | None
    found_inf: Tensor | None


class _Update(NamedTuple):
    """What the update of one parameter reads and writes."""

    parameter: Tensor
    master: Tensor
    velocity: Tensor
    gradient: Tensor

    @property
    def place(self) -> tuple[int | bool, ...]:
        """All that tables depend on: addresses but the gradient's, size, whether vectors fit."""
        addresses = [tensor.data_ptr() for tensor in self]
        fits = all(a % (_VECTOR * t.itemsize) == 0 for a, t in zip(addresses, self, strict=True))
        return *addresses[:3], self.parameter.numel(), fits


class _Kind(NamedTuple):
    """What the updates of one launch have in common.

    The elements of ``plain`` parameters are all there is in a stretch of memory: no gaps, and no
    subclass that keeps them elsewhere.
    """

    device: torch.device
    parameter: torch.dtype
    gradient: torch.dtype
    plain: bool


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """One element on a device; only the host must wait for it, as it would read it too early."""
    return value.squeeze().to(device, non_blocking=device.type != "cpu")


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float32 if parameter.dtype in _HALF else parameter.dtype


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_not_captured(tensor: Tensor) -> None:
    if _is_captured(tensor):
        raise RuntimeError(
            "KrizhevskySGD must make a step with the same parameters before one is captured in a "
            "CUDA graph: each replay would make its state anew"
        )


@dataclass
class _Table:
    """The tables of one launch, in device memory; see kernels/sgd.py.

    Attributes:
        blocks: Of its programs.
        parts: Of each piece the number of its update, and its first element.
        pieces: int64 [pieces, 5].
        owners: int32 [programs].
    """

    blocks: config.PointwiseConfig
    parts: list[tuple[int, int]]
    pieces: Tensor
    owners: Tensor
    _addresses: tuple[list[int], Tensor] | None = None

    def gradients(self, updates: "Sequence[_Update]") -> Tensor:
        """The addresses of the pieces' gradients, int64 [pieces].

        A table that was read is not written again, so that a graph may go on reading it. One that
        a graph writes holds nothing before the first replay: nobody else gets it.
        """
        found = [
            updates[number].gradient.data_ptr() + begin * updates[number].gradient.itemsize
            for number, begin in self.parts
        ]
        if self._addresses and self._addresses[0] == found:
            return self._addresses[1]
        # The numbers travel as arguments of a kernel: unlike a copy, that never waits, and a
        # graph keeps them.
        table = torch.zeros_like(self.pieces[:, 0])
        torch._foreach_add_(table.unbind(), found)
        if not _is_captured(table):
            self._addresses = found, table
        return table


class _Plan(NamedTuple):
    """The tables of one kind of update, and what they are made for."""

    places: list[tuple[int | bool, ...]]
    blocks: list[config.PointwiseConfig]
    tables: list[_Table]


def _tables(updates: "Sequence[_Update]", blocks: Sequence[config.PointwiseConfig]) -> list[_Table]:
    """One table for what can be read in vectors, one for the rest; none that would be empty."""
    found = []
    for chosen in blocks:
        parts, rows = [], []
        counts: list[int] = []
        for number, update in enumerate(updates):
            parameter, master, velocity, size, fits = update.place
            in_vectors = size - size % _VECTOR if fits else 0
            begin, end = (0, in_vectors) if chosen.vector > 1 else (in_vectors, size)
            if begin == end:
                continue
            parts.append((number, begin))
            rows.append(
                [
                    master + begin * update.master.itemsize,
                    velocity + begin * update.velocity.itemsize,
                    parameter + begin * update.parameter.itemsize,
                    end - begin,
                    sum(counts),
                ]
            )
            counts += chosen.programs(end - begin)
        if parts:
            device = updates[0].parameter.device
            owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            pieces = torch.tensor(rows, dtype=torch.int64, device=device)
            found.append(_Table(chosen, parts, pieces, owners.to(device, torch.int32)))
    return found


def _launch_table(table: _Table, gradients: Tensor, like: "_Update", rule: _Rule) -> None:
    unused = like.master
    on_device = isinstance(rule.lr, Tensor)
    launch(
        device_code("sgd").sgd_step,
        (table.owners.numel(),),
        table.pieces,
        gradients,
        table.owners,
        like.parameter,
        like.gradient,
        unused if rule.found_inf is None else rule.found_inf,
        unused if rule.grad_scale is None else rule.grad_scale,
        rule.lr if on_device else float(rule.lr),
        float(rule.momentum),
        float(rule.weight_decay),
        num_warps=table.blocks.num_warps,
        GATED=rule.found_inf is not None,
        SCALED=rule.grad_scale is not None,
        LR_ON_DEVICE=on_device,
        BLOCK=table.blocks.block,
        VECTOR=table.blocks.vector,
    )


def _run_reference(updates: "Sequence[_Update]", rule: _Rule) -> None:
    parameters, masters, velocities, gradients = (
        list(tensors) for tensors in zip(*updates, strict=True)
    )
    reference.krizhevsky_sgd(masters, velocities, gradients, *rule)
    if masters[0] is not parameters[0]:
        torch._foreach_copy_(parameters, masters)
