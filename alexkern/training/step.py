"""A training step: everything between a batch on the device and its new weights."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alexkern.data import Batch
from alexkern.optim import KrizhevskySGD
from alexkern.parallel import Mesh
from alexkern.training.errors import DivergedError, TrainingError
from alexkern.training.forward import Forward
from alexkern.training.metrics import wrong_answers

# Steps that are not captured yet: libraries choose algorithms and the optimizer makes its state.
_WARM_UP = 3


class Outcome(NamedTuple):
    """Of one step, on the device, the same in all processes.

    Attributes:
        loss: Mean over the batch.
        finite: bool [2]: whether the loss is finite, and whether all gradients are. If not, the
            step changed no weight.
        sums: float64 [2]: loss times images, and wrong answers.
    """

    loss: Tensor
    finite: Tensor
    sums: Tensor


class Step:
    """Forward, loss, backward and update.

    On one GPU, with ``capture``, the whole is captured in a CUDA graph once and then replayed: all
    batches have one shape, and whatever changes from step to step is in device memory. The host
    never waits for the device.

    Args:
        forward: From pixels to class scores.
        optimizer: Its groups' rates are set through :meth:`set_rates`.
        scaler: Of the gradients, in float16.
        divisor: See :class:`Forward`.
        device: Where to compute.
        capture: Whether to capture.
        batch_size: Images of the batch, of which this process has its share.
        mesh: The processes that make the step together, which is not captured then.
    """

    def __init__(
        self,
        forward: Forward,
        optimizer: KrizhevskySGD,
        scaler: torch.amp.GradScaler,
        divisor: float,
        device: torch.device,
        capture: bool,
        batch_size: int,
        mesh: Mesh | None = None,
    ) -> None:
        self._batch_size, self._mesh = batch_size, mesh or Mesh()
        self._forward, self._optimizer, self._scaler = forward, optimizer, scaler
        self._divisor, self._device = divisor, device
        capture = capture and device.type == "cuda" and self._mesh.processes == 1
        self._to_warm_up = _WARM_UP if capture else 0
        self._eager = not self._to_warm_up
        self._graph: torch.cuda.CUDAGraph | None = None

    def set_rates(self, rates: Sequence[float]) -> None:
        """The learning rates of the optimizer's groups, from the next step on."""
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            if self._device.type != "cuda":
                group["lr"] = rate
            elif isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:  # a tensor, which a captured step reads anew each time
                group["lr"] = torch.tensor(rate, device=self._device)

    def __call__(self, batch: Batch, dropout_seeds: Sequence[int]) -> Outcome:
        """Make a step.

        Args:
            batch: This process's share, on the device.
            dropout_seeds: One per dropout layer.

        Returns:
            What the next call may write over.

        Raises:
            TrainingError: It cannot be captured.
        """
        # pinned, as the host would otherwise wait for all that the device has yet to do
        seeds = torch.tensor(dropout_seeds, pin_memory=self._device.type == "cuda")
        seeds = seeds.to(self._device, non_blocking=True)
        if self._eager:
            return self.compute(batch, seeds)
        if self._to_warm_up:
            self._to_warm_up -= 1
            return self._warm_up(batch, seeds)
        if self._graph is None:
            self._capture(batch, seeds)
            assert self._graph is not None
        for static, given in zip((*self._batch, self._seeds), (*batch, seeds), strict=True):
            static.copy_(given)
        self._graph.replay()
        return self._outcome

    def compute(self, batch: Batch, dropout_seeds: Tensor) -> Outcome:
        """What is captured; all its arguments are on the device."""
        labels, rows = batch.labels, self._mesh.data.portion(range(self._batch_size))
        corners = torch.zeros(len(batch.images), 2, dtype=torch.int64, device=self._device)
        logits = self._forward(
            batch.images, corners, batch.flips, batch.shift, dropout_seeds, self._divisor, rows
        )
        loss, wrong = self._judged(logits, labels)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        loss = loss.detach()
        broken = ~torch.stack((loss.isfinite(), self._gradients_are_finite()))
        report = torch.cat((torch.stack((loss, wrong)), broken)).double()
        self._mesh.add_up(report)
        finite = report[2:] == 0
        if not self._scaler.is_enabled():  # which would set it
            self._optimizer.found_inf = (~finite.all()).float()
        with self._forward.kernels():
            self._scaler.step(self._optimizer)
        self._scaler.update()
        loss, wrong = report[:2]
        return Outcome(loss.float(), finite, torch.stack((loss * self._batch_size, wrong)))

    def _judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the mean loss over the whole batch, and wrong answers among these."""
        if self._mesh.columns.index:  # whose logits are of no class
            return logits.sum(), logits.new_zeros(())
        loss = F.cross_entropy(logits, labels)
        if len(labels) != self._batch_size:
            loss = loss * (len(labels) / self._batch_size)
        return loss, wrong_answers(logits.detach(), labels, 1)

    def _gradients_are_finite(self) -> Tensor:
        if self._scaler.is_enabled():  # there they are infinite now and then, and the scale falls
            return torch.ones((), dtype=torch.bool, device=self._device)
        groups = (group["params"] for group in self._optimizer.param_groups)
        parameters = itertools.chain.from_iterable(groups)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, norm_type=torch.inf).isfinite()

    def _warm_up(self, batch: Batch, seeds: Tensor) -> Outcome:
        """On a stream of its own, as a capture is."""
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outcome = self.compute(batch, seeds)
        current.wait_stream(side)
        for tensor in outcome:
            tensor.record_stream(current)
        return outcome

    def _capture(self, batch: Batch, seeds: Tensor) -> None:
        self._batch, self._seeds = Batch(*map(torch.clone, batch)), seeds.clone()
        self._optimizer.zero_grad()  # gradients shall be the graph's own
        self._graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: another thread allocates page-locked memory for batches meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outcome = self.compute(self._batch, self._seeds)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise TrainingError(
                f"the step cannot be captured in a CUDA graph ({reason}): add --no-cuda-graph"
            ) from error


class Scaler(torch.amp.GradScaler):
    """A scaler of which all processes have the same: one's infinite gradient is everybody's.

    Args:
        device: Of the gradients.
        enabled: Otherwise it does nothing.
        mesh: The processes.
    """

    def __init__(self, device: torch.device, enabled: bool, mesh: Mesh) -> None:
        super().__init__(device.type, enabled=enabled)
        self._mesh = mesh

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        found: dict[str, Any] = super()._check_inf_per_device(optimizer)
        for number in found.values():
            self._mesh.add_up(number)
        return found


class Sentinel:
    """Learns that a step was not finite, one step later: the device computes meanwhile."""

    def __init__(self) -> None:
        self._pending: tuple[int, Tensor, Tensor, torch.cuda.Event | None] | None = None

    def note(self, step: int, outcome: Outcome) -> None:
        """Note a step, and check the one before.

        Raises:
            DivergedError: See :meth:`check`.
        """
        before, event = self._pending, None
        # into page-locked memory, once the device gets there
        loss, finite = (
            tensor.to("cpu", non_blocking=True) for tensor in (outcome.loss, outcome.finite)
        )
        if outcome.finite.is_cuda:
            event = torch.cuda.current_stream(outcome.finite.device).record_event()
        self._pending = before
        self.check()
        self._pending = step, loss, finite, event

    def check(self) -> None:
        """Wait for the step that was noted last.

        Raises:
            DivergedError: Its loss or a gradient was not finite.
        """
        if self._pending is None:
            return
        step, loss, finite, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        if not finite.all():
            what = f"the loss is {loss.item()}" if not finite[0] else "a gradient is not finite"
            raise DivergedError(
                f"{what} at step {step}, which changed no weight: lower --lr; the last checkpoint "
                "is as it was"
            )
