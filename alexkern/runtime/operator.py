"""Passes of ops as operators of PyTorch, ``torch.ops.alexkern.*``.

Whatever watches or transforms PyTorch's operators (compilation, export, fake tensors, modes,
``torch.func``, selective checkpointing, FLOP counters) sees one node for a pass. Plain eager calls
go straight to the code behind it, which takes a fraction of the dispatcher's time on the host.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from alexkern.runtime.launch import are_recorded

_library = torch.library.Library("alexkern", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)
_flops: dict[Any, Callable[..., int]] = {}

Operands = tuple[Tensor, Tensor, Tensor | None]


class Operator:
    """One pass: called with its operands first, then its numbers.

    Args:
        schema: As PyTorch's dispatcher takes it, without defaults: ``"name(Tensor input, float k)
            -> Tensor"``.
        compute: Does it. Where the schema returns several tensors, those that the arguments make
            superfluous may be None; the operator then returns empty ones.
        fake: Returns tensors of the right shape, dtype and strides, given such tensors.
        save: ``save(context, arguments, outputs)`` keeps what ``backward`` needs.
        backward: ``backward(context, *output_grads)`` returns the operands' gradients. Without it
            the operator has no derivative, and asking for one raises.
        autocast: What casts the first three operands where autocast is on.
        flops: ``flops(*arguments, out_val)`` counts floating-point operations, for PyTorch's
            ``FlopCounterMode``.
    """

    def __init__(
        self,
        schema: str,
        compute: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
        autocast: Callable[[Tensor, Tensor, Tensor | None], Operands] | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self._compute = compute
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._overload = getattr(torch.ops.alexkern, self.name).default
        self._function = _differentiable(f"alexkern::{self.name}", save, backward)
        self._autocast = autocast
        _library.impl(self.name, partial(_whole, compute), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"alexkern::{self.name}", partial(_whole, fake), lib=_library, allow_override=True
        )
        _library.impl(self.name, self._record, "Autograd", with_keyset=True)
        if autocast is not None:
            for key in ("AutocastCPU", "AutocastCUDA"):
                _library.impl(self.name, self._cast, key)
        if flops is not None:
            _flops[self._overload.overloadpacket] = flops

    def __call__(self, *arguments: Any) -> Any:
        """Run it, as a node where anybody looks."""
        if torch.compiler.is_compiling():
            return self._overload(*arguments)
        if _watched() or not _are_plain(arguments):
            _tell_flop_counters()
            return self._overload(*arguments)
        if _C._any_requires_grad(*arguments) and torch.is_grad_enabled():
            return self._function.apply(*arguments, self._compute)
        return self._compute(*arguments)

    def _record(self, keys: Any, *arguments: Any) -> Any:
        """The dispatcher's autograd kernel."""
        run = partial(self._below_autograd, keys)
        arguments = _with_tuples(arguments)  # as eager calls have them, also in backward
        differentiated = torch.is_grad_enabled() and _C._any_requires_grad(*arguments)
        if not differentiated and not _has_dual_level():
            return run(*arguments)
        if not _C._are_functorch_transforms_active():
            return self._function.apply(*arguments, run)
        # of the transform that is being applied
        with enable_single_level_autograd_function():
            return self._function.apply(*arguments, run)

    def _below_autograd(self, keys: Any, *arguments: Any) -> Any:
        # the other transforms of a nest still want to differentiate
        nested = _C._are_functorch_transforms_active()
        with (
            torch.set_grad_enabled(nested),
            forward_ad._set_fwd_grad_enabled(nested),
            _C._AutoDispatchBelowAutograd(),
        ):
            return self._overload.redispatch(keys & _C._after_autograd_keyset, *arguments)

    def _cast(self, *arguments: Any) -> Any:
        assert self._autocast is not None
        operands = self._autocast(*arguments[:3])
        keys = _C.DispatchKeySet(_C.DispatchKey.AutocastCPU)
        with _C._ExcludeDispatchKeyGuard(keys.add(_C.DispatchKey.AutocastCUDA)):
            return self._overload(*operands, *arguments[3:])


def backward_may_follow(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow, for which something more than the result has to be kept."""
    if not torch.is_grad_enabled():
        return False
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    # a tensor inside a transform does not say whether the one around it differentiates
    return not torch.compiler.is_compiling() and _C._are_functorch_transforms_active()


def _watched() -> bool:
    """Whether a mode, a transform or a trace wants to see every operator.

    Autocast is none of them: the ops cast before they call an operator.
    """
    return bool(
        _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state()
        or _has_dual_level()
    )


def _tell_flop_counters() -> None:
    """Give those that count now our formulas: PyTorch's register for them would import triton."""
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry |= _flops


def _has_dual_level() -> bool:
    """Whether tensors may carry tangents of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def _are_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether those that are tensors are what their data pointers say."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            ordinary = type(argument) in _PLAIN and argument.layout is torch.strided
            if not ordinary or argument.is_neg() or (argument.is_meta and not are_recorded()):
                return False
    return True


def _with_tuples(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(a) if isinstance(a, list) else a for a in arguments)


def _whole(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call with tuples in place of lists; empty tensors in place of superfluous results."""
    result = function(*_with_tuples(arguments))
    if isinstance(result, Tensor):
        return result
    some = next(a for a in arguments if isinstance(a, Tensor))
    return tuple(some.new_empty(0) if tensor is None else tensor for tensor in result)


def _differentiable(
    name: str,
    save: Callable[[Any, tuple[Any, ...], Any], None] | None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None,
) -> Any:
    """The autograd function of an operator, whose last argument runs it."""

    def forward(context: Any, *arguments: Any) -> Any:
        *arguments_, run = arguments
        outputs = run(*arguments_)
        context.set_materialize_grads(False)
        if save is not None:
            save(context, tuple(arguments_), outputs)
        return outputs

    def gradients(context: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if backward is None:
            raise RuntimeError(f"{name} has no derivative: double backward is not implemented")
        grads = backward(context, *output_grads)
        wanted = context.needs_input_grad
        operands = (g if want else None for g, want in zip(grads, wanted, strict=False))
        return *operands, *(None,) * (len(wanted) - len(grads))

    def jvp(context: Any, *tangents: Tensor | None) -> Any:
        raise NotImplementedError(f"{name} has no forward-mode derivative")

    methods = {"forward": forward, "backward": gradients, "jvp": jvp}
    members = {key: staticmethod(value) for key, value in methods.items()}
    return type(name.removeprefix("alexkern::"), (_SingleLevelFunction,), members)
