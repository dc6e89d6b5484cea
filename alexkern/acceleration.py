"""The ops put into a model that exists already, and taken out again.

A module that is taken stays the object that it is and becomes one of another class, as torch's own
parametrizations and lazy modules do: names, parameters, hooks, flags, ``state_dict`` and whoever
holds a reference stay as they are, copies and pickles carry the change with them, and taking it
back is to give the class back.
"""

import copy
import inspect
import operator
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from alexkern import ops
from alexkern.nn import (
    Conv2dBiasReLU,
    Dropout,
    LinearBiasReLUDropout,
    LocalResponseNorm,
    LRNMaxPool2d,
    MaxPool2d,
)

__all__ = ["Left", "Replaced", "Report", "accelerate", "restore"]


_ROOT = "the model"  # which has no name


@dataclass(frozen=True)
class Replaced:
    """Modules whose work one op does now.

    Attributes:
        names: Of the module that computes, and of those that hand on what it gives.
        by: The class that computes: one of :mod:`alexkern.nn`.
    """

    names: tuple[str, ...]
    by: str


@dataclass(frozen=True)
class Left:
    """What might have been replaced and was not.

    Attributes:
        name: Of a module, or of a function with the module that calls it.
        reason: Why, and where it helps what to write instead.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did; ``str`` gives a table, and of many names a few."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        done = [(item.by, ", ".join(item.names)) for item in self.replaced]
        reasons: dict[str, list[str]] = {}
        for item in self.left:
            reasons.setdefault(item.reason, []).append(item.name)
        kept = [(_some(names), reason) for reason, names in reasons.items()]
        width = max((len(by) for by, _ in done), default=0)
        return "\n".join(
            [
                f"replaced: {len(done)}",
                *(f"  {by:{width}}  {names}" for by, names in done),
                f"left: {len(self.left)}",
                *(f"  {names}: {reason}" for names, reason in kept),
            ]
        )


def _some(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(names) if more < 2 else f"{', '.join(names[:3])} and {more} more"


def accelerate(model: nn.Module) -> Report:
    """Let this project's ops do the work of a model's layers, in place.

    Taken are ``nn.Conv2d`` with the ``nn.ReLU`` behind it, ``nn.Linear`` with its ReLU and the
    ``nn.Dropout`` behind that, ``nn.LocalResponseNorm``, alone or with the ``nn.MaxPool2d`` behind
    it, ``nn.MaxPool2d`` and ``nn.Dropout``; only these very classes, without hooks on forward or
    backward and without parametrizations. The module that comes first computes; the others stand
    where they stood and hand on what they get. Names, parameters, ``state_dict`` and the objects
    themselves stay, so an optimizer made before goes on.

    Two modules count as neighbours where :mod:`torch.fx` shows that the second, and nobody else,
    gets the first one's output, in training and in evaluation, with and without the optional
    arguments of ``forward``. Where the model does not trace, or draws random numbers in Python
    while it is traced, neighbours are those within an ``nn.Sequential``, on the assumption that it
    is called as a whole. Tracing runs ``forward`` of a copy without values, several times; what it
    prints is printed.

    What a model computes stays what it was, up to rounding and to which random units are dropped
    (``docs/numerics.md``). But neighbours share one output from now on: who calls the first one by
    itself, or hooks it, gets what the last one gave. :func:`restore` before looking inside, and
    give the whole model, as a part does not show what else calls its modules. Branches that depend
    on the type of an argument, or on attributes that change later, cannot be seen.

    Returns:
        What was replaced, and what was left and why. Of a model that was accelerated before,
        nothing is replaced again.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_module("accelerate", model)
    names = dict(model.named_modules(remove_duplicate=False))
    found = _Neighbours(model, names)
    steps, left = _plan(model, names, found)
    for step in steps:
        step.take(names)
    if steps and not found.still(model):
        for name in chain.from_iterable(step.names for step in steps):
            _give_back(names[name])
        steps, left = [], [Left(_ROOT, "calls others when the classes of its modules change")]
    return Report(tuple(step.replaced() for step in steps), tuple(left))


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate` in all modules of ``model``, or of a part or copy of it.

    Each is of its old class again. Parameters, flags and hooks are the present ones.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: a module that was taken has got another class since, as parametrizations do;
            nothing is undone then.
    """
    _check_module("restore", model)
    taken = {name: module for name, module in model.named_modules() if _TAKEN in module.__dict__}
    for name, module in taken.items():
        if type(module) is not module.__dict__[_TAKEN].now:
            raise RuntimeError(
                f"{name} has become a {type(module).__name__} since it was accelerated: "
                "remove what changed its class (a parametrization?) first"
            )
    for module in taken.values():
        _give_back(module)


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, got {type(model).__name__}")


# --- what becomes of a module

_TAKEN = "_alexkern_taken"  # the attribute of a module that holds the next


@dataclass(frozen=True)
class _Taken:
    """How a module is given back: its class, the one that it got, attributes that it got."""

    before: type[nn.Module]
    now: type[nn.Module]
    added: tuple[str, ...]


class _Named(nn.Module):
    """Shown by the name that follows the underscore."""

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("_")


class Absorbed(_Named):
    """Stands where a module stood whose work is done by one before."""

    def forward(self, input: Tensor) -> Tensor:
        """What the one before gave."""
        return input


class _AbsorbedReLU(Absorbed, nn.ReLU):
    pass


class _AbsorbedMaxPool2d(Absorbed, nn.MaxPool2d):
    pass


class _AbsorbedDropout(Absorbed, nn.Dropout):
    pass


# each of the class that it was as well, for who asks with isinstance
_ABSORBED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: _AbsorbedReLU,
    nn.MaxPool2d: _AbsorbedMaxPool2d,
    nn.Dropout: _AbsorbedDropout,
}


class _LRNMaxPool2d(_Named, LRNMaxPool2d, nn.LocalResponseNorm):
    """LRN, then max-pool, as the two modules of torch are on [C, H, W] as well.

    There :class:`torch.nn.LocalResponseNorm` takes C for the batch, and H for the channels.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Of [N, C, H, W] or [C, H, W]."""
        if input.dim() == 4:
            return super().forward(input)
        normalised = ops.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
        windows = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return cast(Tensor, ops.max_pool2d(normalised, *windows))


class _LinearBiasReLUDropout(_Named, LinearBiasReLUDropout):
    """With the probability and the mode of the dropout that stands behind, whatever they are."""

    dropout: tuple[nn.Dropout]  # a tuple, so that it stays at its own name only

    def forward(self, input: Tensor, *, seed: Tensor | None = None) -> Tensor:
        """Of [*, in_features]."""
        (dropout,) = self.dropout
        operands = (input, self.weight, self.bias)
        return ops.linear_bias_relu_dropout(*operands, dropout.p, dropout.training, seed=seed)

    @property
    def p(self) -> float:  # type: ignore[override]
        """That of the dropout."""
        return self.dropout[0].p


@dataclass(frozen=True)
class _Step:
    """One entry of the plan: the first of the names gets a class and attributes."""

    names: tuple[str, ...]
    now: type[nn.Module]
    attributes: dict[str, Any]

    def take(self, names: dict[str, nn.Module]) -> None:
        first, *others = (names[name] for name in self.names)
        _take(first, self.now, self.attributes)
        for other in others:
            _take(other, _ABSORBED[type(other)], {})

    def replaced(self) -> Replaced:
        return Replaced(
            tuple(name or _ROOT for name in self.names), self.now.__name__.removeprefix("_")
        )


def _take(module: nn.Module, now: type[nn.Module], attributes: dict[str, Any]) -> None:
    added = tuple(name for name in attributes if name not in module.__dict__)
    module.__dict__.update(attributes)
    module.__dict__[_TAKEN] = _Taken(type(module), now, added)
    module.__class__ = now


def _give_back(module: nn.Module) -> None:
    taken: _Taken = module.__dict__.pop(_TAKEN)
    module.__class__ = taken.before
    for attribute in taken.added:
        del module.__dict__[attribute]


_SINGLES: dict[type[nn.Module], tuple[type[nn.Module], dict[str, Any]]] = {
    nn.LocalResponseNorm: (LocalResponseNorm, {"alpha_mode": "mean", "groups": 1}),
    nn.MaxPool2d: (MaxPool2d, {}),
    nn.Dropout: (Dropout, {"mode": "inverted"}),
}
_CANDIDATES = (nn.Conv2d, nn.Linear, *_SINGLES)
_OURS = (Conv2dBiasReLU, LinearBiasReLUDropout, LRNMaxPool2d, LocalResponseNorm, MaxPool2d, Dropout)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _obstacle(module: nn.Module, wanted: type[nn.Module]) -> str:
    """Why a module is not just one of the wanted class; empty if it is."""
    if parametrize.is_parametrized(module):
        return "is parametrized"
    if type(module) is not wanted:
        return f"is of class {type(module).__name__}, which may compute something else"
    if _hooked(module):
        return "has hooks, which would see something else"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    return ""


def _plan(
    model: nn.Module, names: dict[str, nn.Module], found: "_Neighbours"
) -> tuple[list[_Step], list[Left]]:
    """What is to be done, in the order of the modules, and what is not."""
    steps: list[_Step] = []
    left = list(found.remarks)
    absorbed: set[str] = set()
    for name, module in model.named_modules():
        wanted = next((kind for kind in _CANDIDATES if isinstance(module, kind)), None)
        if wanted is None or type(module) in _OURS or _TAKEN in module.__dict__:
            continue
        if name in absorbed:
            continue
        obstacle = _obstacle(module, wanted)
        step = None if obstacle else _step(name, names, found)
        if isinstance(step, _Step):
            steps.append(step)
            absorbed.update(step.names[1:])
        else:
            left.append(Left(name or _ROOT, obstacle or str(step)))
    # a pool may come before its norm in the order of names
    steps = [step for step in steps if step.names[0] not in absorbed]
    return steps, left


def _step(name: str, names: dict[str, nn.Module], found: "_Neighbours") -> "_Step | str":
    """What becomes of a module and its followers, or why nothing does."""
    module = names[name]
    if isinstance(module, nn.LocalResponseNorm):
        pool = found.follower(name, nn.MaxPool2d)
        if pool.name and not names[pool.name].return_indices:
            return _Step((name, pool.name), _LRNMaxPool2d, _pooling(names[pool.name]))
    if type(module) in _SINGLES:
        now, attributes = _SINGLES[type(module)]
        return _Step((name,), now, attributes)
    relu = found.follower(name, nn.ReLU)
    if not relu.name:
        return relu.reason
    if isinstance(module, nn.Conv2d):
        return _Step((name, relu.name), Conv2dBiasReLU, {"activation": "relu"})
    shared: dict[str, Any] = {"activation": "relu", "mode": "inverted"}
    dropout = found.follower(relu.name, nn.Dropout)
    if not dropout.name or found.changes_in_place(dropout.name):
        return _Step((name, relu.name), LinearBiasReLUDropout, {"p": 0.0, **shared})
    shared["dropout"] = (names[dropout.name],)
    return _Step((name, relu.name, dropout.name), _LinearBiasReLUDropout, shared)


def _pooling(pool: nn.Module) -> dict[str, Any]:
    """What a pool brings to the norm before it."""
    arguments = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    windows = {name: getattr(pool, name) for name in arguments}
    return {**windows, "alpha_mode": "mean", "groups": 1}


# --- who gets whose output


@dataclass(frozen=True)
class _Follower:
    """The module that alone gets another one's output, or why there is none."""

    name: str = ""
    reason: str = ""


class _Neighbours:
    """Which modules follow which, and remarks on what was seen on the way."""

    def __init__(self, model: nn.Module, names: dict[str, nn.Module]) -> None:
        self.names = names
        self.counts = Counter(map(id, names.values()))
        self.remarks: list[Left] = []
        self.graphs: list[fx.Graph] | None
        try:
            self.graphs = _graphs(model)
        except Exception as problem:  # whatever a model's forward raises
            self.graphs = None
            reason = (str(problem).strip().splitlines() or [""])[0][:200]
            self.remarks.append(
                Left(
                    _ROOT,
                    f"does not trace ({type(problem).__name__}: {reason}): only neighbours in an "
                    "nn.Sequential are fused, and calls of functions are not seen",
                )
            )
            self._next = _neighbours_in_sequentials(model)
        else:
            self.calls = [_calls(graph) for graph in self.graphs]
            self.remarks += dict.fromkeys(
                remark for graph in self.graphs for remark in _functions(graph)
            )

    def follower(self, name: str, wanted: type[nn.Module]) -> _Follower:
        """The module behind this one, if it is just of the wanted class."""
        if self.counts[id(self.names[name])] > 1:
            return _Follower(reason=f"stands at {self.counts[id(self.names[name])]} names")
        found = self._in_sequential(name) if self.graphs is None else self._traced(name, wanted)
        if not found.name:
            return found
        behind = self.names[found.name]
        if not isinstance(behind, wanted):
            reason = f"no {wanted.__name__} follows, but {type(behind).__name__}"
            return _Follower(reason=reason)
        obstacle = _obstacle(behind, wanted)
        if self.counts[id(behind)] > 1:
            obstacle = f"stands at {self.counts[id(behind)]} names"
        if obstacle:
            return _Follower(reason=f"its {wanted.__name__}, {found.name}, {obstacle}")
        return found

    def still(self, model: nn.Module) -> bool:
        """Whether the model calls what it called, as one that asks for classes may not."""
        if self.graphs is None:
            return True
        try:
            return list(map(str, _graphs(model))) == list(map(str, self.graphs))
        except Exception:
            return False

    def changes_in_place(self, name: str) -> bool:
        """Whether a module's output may be written to by who gets it.

        A dropout's may, but not that of the op that keeps its output for backward.
        """
        if self.graphs is None:
            return bool(getattr(self.names.get(self._next.get(name, "")), "inplace", False))
        return any(
            _may_write(user, node, self.names)
            for calls in self.calls
            for node in calls[name]
            for user in node.users
        )

    def _in_sequential(self, name: str) -> _Follower:
        if name in self._next:
            return _Follower(self._next[name])
        return _Follower(reason="nothing follows it in an nn.Sequential")

    def _traced(self, name: str, wanted: type[nn.Module]) -> _Follower:
        """The one user of the one call, the same in all graphs."""
        followers = set()
        for calls in self.calls:
            if len(calls[name]) > 1:
                return _Follower(reason=f"is called {len(calls[name])} times")
            for node in calls[name]:
                found = _user(node, wanted)
                if not found.name:
                    return found
                followers.add(found.name)
        if not followers:
            return _Follower(reason="is not called where torch.fx can see it")
        if len(followers) > 1:
            return _Follower(reason=f"is followed by {' or '.join(sorted(followers))}")
        behind = followers.pop()
        most = max(len(calls[behind]) for calls in self.calls)
        if most > 1:
            return _Follower(
                reason=f"its {wanted.__name__}, {behind}, is called {most} times: "
                "give each place one of its own"
                if isinstance(self.names[behind], wanted)
                else f"no {wanted.__name__} follows, but {type(self.names[behind]).__name__}"
            )
        if any(len(calls[behind]) != len(calls[name]) for calls in self.calls):
            return _Follower(reason=f"{behind} is also called without it")
        return _Follower(behind)


def _neighbours_in_sequentials(model: nn.Module) -> dict[str, str]:
    """Each member of an nn.Sequential, and the next."""
    return {
        f"{prefix}{first}": f"{prefix}{second}"
        for name, module in model.named_modules()
        if not _obstacle(module, nn.Sequential)
        for prefix in [f"{name}." if name else ""]
        for first, second in pairwise(module._modules)
    }


def _calls(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The calls of each module; an empty list for one that is not called."""
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
    return calls


# fx shows x += y as x + y
_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv)


def _may_write(user: fx.Node, node: fx.Node, names: dict[str, nn.Module]) -> bool:
    """Whether a call may change its operand."""
    if user.op == "call_module":
        return bool(getattr(names[str(user.target)], "inplace", False))
    if user.target in _ARITHMETIC:
        return user.args[0] is node
    called = user.target if isinstance(user.target, str) else user.target.__name__
    return called.endswith("_") or bool(user.kwargs.get("inplace"))


_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_WRITE = {
    F.local_response_norm: ("F.local_response_norm", "nn.LocalResponseNorm", "local_response_norm"),
    F.max_pool2d: ("F.max_pool2d", "nn.MaxPool2d", "max_pool2d"),
    F.max_pool2d_with_indices: ("F.max_pool2d", "nn.MaxPool2d", "max_pool2d"),
    torch.max_pool2d: ("torch.max_pool2d", "nn.MaxPool2d", "max_pool2d"),
    F.dropout: ("F.dropout", "nn.Dropout", "dropout"),
    torch.dropout: ("torch.dropout", "nn.Dropout", "dropout"),
}


def _user(node: fx.Node, wanted: type[nn.Module]) -> _Follower:
    """The one module that gets what a call gives."""
    users = list(node.users)
    if len(users) != 1:
        return _Follower(reason=f"its output is used {len(users)} times")
    (user,) = users
    if user.op == "call_module" and user.all_input_nodes == [node]:
        return _Follower(str(user.target))
    if wanted is nn.ReLU and user.op.startswith("call_") and user.target in _RELUS:
        called = "a function" if user.op == "call_function" else "a method"
        return _Follower(
            reason=f"its ReLU is {called}: write nn.ReLU as a module of the model, "
            "or alexkern.nn's module in the place of both"
        )
    return _Follower(reason=f"no {wanted.__name__} follows")


def _functions(graph: fx.Graph) -> Iterator[Left]:
    """Calls of functions that have modules which would have been taken."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _WRITE:
            continue
        called, module, op = _WRITE[node.target]
        caller = list(node.meta.get("nn_module_stack", {"": None}))[-1]
        yield Left(
            f"{called} in {caller}" if caller else called,
            f"is a function: write {module} as a module of the model, or alexkern.ops.{op}",
        )


# --- tracing


def _graphs(model: nn.Module) -> list[fx.Graph]:
    """What the model calls: as it stands, in training, in evaluation; with and without options.

    Raises:
        Exception: the model does not trace, or what it does depends on random numbers.
    """
    if isinstance(model, _CANDIDATES):
        return []  # a layer has nothing inside
    if "forward" in model.__dict__:
        raise TypeError("its forward is not that of its class")
    hooked = {name for name, module in model.named_modules() if _hooked(module)}
    graphs = []
    for training in (None, True, False):
        for options in (None, _defaults(model)):
            if options == {}:
                continue
            skeleton = _skeleton(model)
            if training is not None:
                for module in skeleton.modules():
                    module.training = training
            with _no_random_numbers():
                graphs.append(_Tracer(hooked).trace(skeleton, options))
    return graphs


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The arguments that a call may leave out, with what they are then."""
    arguments = inspect.signature(type(model).forward).parameters.values()
    return {item.name: item.default for item in arguments if item.default is not item.empty}


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy whose tensors have no values and whose modules have no hooks."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        empty = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    for module in model.modules():
        memo.update((id(getattr(module, hooks)), OrderedDict()) for hooks in _HOOKS)
    return copy.deepcopy(model, memo)


class _Tracer(fx.Tracer):
    """Layers are single calls, and those who inherit from one; what a hook would see is used."""

    def __init__(self, hooked: set[str]) -> None:
        super().__init__()
        self.hooked = hooked

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, (*_CANDIDATES, nn.ReLU, LRNMaxPool2d))
        return leaf or bool(super().is_leaf_module(m, module_qualified_name))

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        if self.path_of_module(m) in self.hooked:
            self.create_proxy("call_function", _seen_by_hooks, (args, kwargs, result), {})
        return result


def _seen_by_hooks(*tensors: Any) -> None:
    """A node of the graph for hooks, which are not run."""


@contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Put the generators back, and raise if the block has drawn: it may have branched on that."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    host, gpus = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    try:
        yield
        drawn = (
            python != random.getstate()
            or str(numpy) != str(np.random.get_state())
            or not torch.equal(host, torch.get_rng_state())
            or any(
                not torch.equal(state, torch.cuda.get_rng_state(device))
                for state, device in zip(gpus, devices, strict=True)
            )
        )
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(host)
        for state, device in zip(gpus, devices, strict=True):
            torch.cuda.set_rng_state(state, device)
    if drawn:
        raise RuntimeError("forward draws random numbers, on which it may depend")
