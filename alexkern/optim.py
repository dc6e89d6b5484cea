"""The paper's update rule as a ``torch.optim.Optimizer``."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class KrizhevskySGD(Optimizer):
    """Stochastic gradient descent as in the paper, section 5.

    For a weight w with gradient g::

        v <- momentum * v - weight_decay * lr * w - lr * g
        w <- w + v

    The learning rate is inside the velocity v, where ``torch.optim.SGD`` multiplies the velocity
    by it: the two agree while the rate is constant, and after a drop this one still carries the
    larger steps of before. State: one velocity per parameter, of its shape and dtype.

    Args:
        params: Parameters, or dicts of parameter groups.
        lr: Learning rate.
        momentum: Share of the velocity that stays.
        weight_decay: Decay of the weights, times the learning rate.

    Raises:
        ValueError: ``lr``, ``momentum`` or ``weight_decay`` is negative.
        RuntimeError: By ``step``: a gradient is sparse.
    """

    def __init__(
        self, params: ParamsT, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not momentum >= 0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if not weight_decay >= 0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

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
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        weights: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        gradients: list[Tensor] = [p.grad for p in weights if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise RuntimeError("KrizhevskySGD does not support sparse gradients")
        for weight in weights:
            if "velocity" not in self.state[weight]:
                self.state[weight]["velocity"] = torch.zeros_like(weight)
        velocities: list[Tensor] = [self.state[weight]["velocity"] for weight in weights]
        lr, decay = group["lr"], group["weight_decay"]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, weights, alpha=-decay * lr)
        torch._foreach_add_(velocities, gradients, alpha=-lr)
        torch._foreach_add_(weights, velocities)
