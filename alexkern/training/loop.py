"""The training loop."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexkern.data import (
    Augmentation,
    Batches,
    Dataset,
    derive_seed,
    on_device,
    training_batches,
)
from alexkern.files import save_torch
from alexkern.models import AlexNet, get_preset, load_weights
from alexkern.optim import KrizhevskySGD, weights_and_biases
from alexkern.parallel import Mesh
from alexkern.predictions import Predictions
from alexkern.training import checkpoint
from alexkern.training.errors import DivergedError, StoppedError, UsageError
from alexkern.training.evaluation import Evaluated, centre_crop, evaluate, ten_crops
from alexkern.training.forward import Forward
from alexkern.training.metrics import Evaluation, LayerChange, Measured, Meter, MetricsFile, Row
from alexkern.training.options import Options
from alexkern.training.schedule import make_schedule
from alexkern.training.step import Scaler, Sentinel, Step
from alexkern.training.tensorboard import TensorBoard
from alexkern.training.utilisation import Utilisation

# The 2012 code divides images with colour noise by 1 + 0.1, so that they spread like those
# without, which evaluation has.
_NOISE_DIVISOR = {"stdev": 1.1}

# After so many steps a loss that never left that of a guess will hardly do so.
STALL_STEPS = 2000


class Network(NamedTuple):
    """A whole network, by the names of its parameters.

    Attributes:
        model: The parameters.
        optimizer: For each kind of the optimizer's state, what belongs to each parameter.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]


class Outlet:
    """Where a run's numbers and checkpoints go, and where a wish to stop comes from.

    Args:
        folder: Existing; gets ``metrics.csv`` and checkpoints.
        step: Steps of the run so far; what was written of later ones goes.
        stopping: Asked before every step and every batch of an evaluation.
        tensorboard: Whether its files are written as well.
        agreed: Makes of this process's wishes to stop and to save those of all processes.

    Raises:
        UsageError: TensorBoard is wanted and not installed.
    """

    def __init__(
        self,
        folder: Path,
        step: int = 0,
        stopping: Callable[[], object] = lambda: False,
        tensorboard: bool = False,
        agreed: Callable[[bool, bool], tuple[bool, bool]] = lambda stop, save: (stop, save),
    ) -> None:
        self._folder, self._stopping, self._agreed = folder, stopping, agreed
        checkpoint.tidy(folder, step)
        self._metrics = MetricsFile(folder / "metrics.csv", step)
        self._tensorboard = TensorBoard(folder / "tensorboard", step) if tensorboard else None

    def wishes(self, save: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether to save, which this process may wish."""
        return self._agreed(bool(self._stopping()), save)

    def stopping(self) -> bool:
        """Whether to stop."""
        return self.wishes(save=False)[0]

    def say(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)

    def write(self, row: Row) -> None:
        """A row of metrics."""
        self._metrics.write(row)
        if self._tensorboard:
            self._tensorboard.write(row)

    def write_network(self, step: int, changes: list[LayerChange], filters: Tensor) -> None:
        """What the network looks like at an epoch's end."""
        for change in changes:
            self.say(f"  {change}")
        if self._tensorboard:
            self._tensorboard.write_network(step, changes, filters)

    def save(self, state: dict[str, Any], name: str | None = None) -> None:
        """A checkpoint, under its step's name if it has none."""
        step = state["step"]
        path = self._folder / name if name else checkpoint.path_at(self._folder, step)
        save_torch(state, path)
        checkpoint.tidy(self._folder, step)


class Silence(Outlet):
    """That of all processes but the first, which writes for them.

    Args:
        stopping: As is the other, see :class:`Outlet`.
        agreed: Likewise.
    """

    def __init__(
        self,
        stopping: Callable[[], object] = lambda: False,
        agreed: Callable[[bool, bool], tuple[bool, bool]] = lambda stop, save: (stop, save),
    ) -> None:
        self._stopping, self._agreed = stopping, agreed

    def say(self, line: str) -> None:
        """Nothing."""

    def write(self, row: Row) -> None:
        """Nothing."""

    def write_network(self, step: int, changes: list[LayerChange], filters: Tensor) -> None:
        """Nothing."""

    def save(self, state: dict[str, Any], name: str | None = None) -> None:
        """Nothing."""


class Trainer:
    """One run: its network, its data, and how far it has come.

    Every random number is a function of the seed and of the step, epoch or sample it is for, so
    a resumed run continues with the numbers of an uninterrupted one.

    Args:
        options: The run's options.
        dataset: What it learns.
        device: Where it computes.
        mesh: The processes that train together; all make the same calls.

    Attributes:
        model: The network, or this process's column.
        step: Steps done.
        steps_per_epoch: Steps in an epoch.
        best: The evaluation with the lowest top-1 error, and its step; None before the first.

    Raises:
        UsageError: The network does not divide into the mesh's columns.
    """

    def __init__(
        self, options: Options, dataset: Dataset, device: torch.device, mesh: Mesh | None = None
    ) -> None:
        self._options, self._dataset, self._device = options, dataset, device
        self._mesh = mesh or Mesh()
        torch.manual_seed(derive_seed(options.seed, "initialisation"))
        preset = get_preset(options.preset)
        preset = replace(preset, dropout_mode=options.dropout_mode)  # type: ignore[arg-type]
        half = torch.float16 if options.half_exchange else None
        try:
            self.model = AlexNet(preset, len(dataset.class_names), self._mesh, half)
        except ValueError as error:
            raise UsageError(str(error)) from error
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if options.kernels == "compile":
            self.model.compile()
        self._optimizer = KrizhevskySGD(
            weights_and_biases(self.model, 1.0, options.bias_weight_decay),
            options.lr,
            options.momentum,
            options.weight_decay,
        )
        self._scaler = Scaler(device, options.amp == "fp16", self._mesh)
        self._schedule = make_schedule(options.schedule, options.epochs)
        own = options.bias_schedule != "same"
        self._bias_schedule = (
            make_schedule(options.bias_schedule, options.epochs) if own else self._schedule
        )
        mean = torch.from_numpy(dataset.mean).to(device)
        self._forward = Forward(self.model, mean, options.kernels, options.amp, self._mesh)
        self._margin = preset.stored_size - preset.crop_size
        self._meter = Meter(device)
        self._utilisation = Utilisation(
            preset, self.model.num_classes, options.amp, device, self._mesh.processes
        )
        self._seconds: dict[str, float] = defaultdict(float)
        self._step: tuple[tuple[bool, float], Step] | None = None
        self._stall_step = math.inf
        self._evaluated = -1
        self.best: tuple[Evaluation, int] | None = None
        self.step = 0
        self.steps_per_epoch = len(self._training_batches(0))
        self._batch_size = min(options.batch_size, len(dataset.train.labels))

    @property
    def total_steps(self) -> int:
        """Length of the learning rate schedule in steps."""
        return self._options.epochs * self.steps_per_epoch

    def state_dict(self, network: Network | None = None) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to continue: tensors and plain types.

        It does not depend on the processes, and is that of the whole network in the first of them.

        Args:
            network: What :meth:`whole_network` gave at this step, if it did.
        """
        model, optimizer = network or self.whole_network()
        return {
            "format": checkpoint.FORMAT,
            "model": model,
            "optimizer": optimizer,
            "scaler": self._scaler.state_dict(),
            "schedule": self._schedule.state_dict(),
            "meter": self._meter.state_dict(),
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "evaluated": self._evaluated,
            "best": {**asdict(self.best[0]), "step": self.best[1]} if self.best else {},
            "options": asdict(self._options),
            "class_names": list(self._dataset.class_names),
        }

    def whole_network(self) -> Network:
        """Parameters, and the optimizer's state, of all columns; empty but in the first process."""
        if self._mesh.data.index:
            return Network({}, {})
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        kinds: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for parameter, name in names.items():
            for kind, tensor in self._optimizer.state.get(parameter, {}).items():
                kinds[kind][name] = tensor
        optimizer = {kind: self.model.whole_of(tensors) for kind, tensors in kinds.items()}
        return Network(self.model.whole_of(self.model.state_dict()), optimizer)

    def load_weights(self, path: str, new_head: bool) -> None:
        """Start from a file's weights.

        Args:
            path: See :func:`alexkern.models.load_weights`.
            new_head: Keep the fresh fc8.

        Raises:
            ValueError, ImportError, FileNotFoundError: As that function does.
        """
        torch.manual_seed(derive_seed(self._options.seed, "initialisation"))
        whole = AlexNet(self.model.preset, self.model.num_classes)
        load_weights(whole, path, new_head=new_head)
        self.model.load_state_dict(self.model.part_of(whole.state_dict()))

    def load_state_dict(self, state: dict[str, Any], *, training: bool = True) -> None:
        """Continue where ``state`` was taken.

        Args:
            state: See :meth:`state_dict`.
            training: Whether to train on, for which an epoch must have as many steps as before.

        Raises:
            UsageError: It was trained on other classes, or in epochs of another length.
        """
        here, there = list(self._dataset.class_names), state["class_names"]
        if here != there:
            raise UsageError(
                f"the checkpoint knows {len(there)} classes ({_sample(there)}), "
                f"--data {self._dataset.name} has {len(here)} ({_sample(here)}): "
                "give the --data of that run, or start a new one"
            )
        if training and state["steps_per_epoch"] != self.steps_per_epoch:
            raise UsageError(
                f"an epoch of the checkpoint has {state['steps_per_epoch']} steps, and now "
                f"{self.steps_per_epoch}: leave --batch-size and --data as they were, or start a "
                "new run with --weights CHECKPOINT"
            )
        self.model.load_state_dict(self.model.part_of(state["model"]))
        self._load_optimizer(state["optimizer"])
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self._schedule.load_state_dict(state["schedule"])
        self._meter.load_state_dict(state["meter"])
        self.step, self._evaluated = state["step"], state["evaluated"]
        if state["best"]:
            best = dict(state["best"])
            step = best.pop("step")
            self.best = Evaluation(**best), step

    def _load_optimizer(self, whole: dict[str, dict[str, Tensor]]) -> None:
        """Take this process's part of the state, under today's options."""
        own = {kind: self.model.part_of(tensors) for kind, tensors in whole.items()}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = self._optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        state = {
            number: {kind: tensors[names[parameter]] for kind, tensors in own.items()}
            for number, parameter in enumerate(parameters)
            if all(names[parameter] in tensors for tensors in own.values())
        }
        mine = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": mine})

    def train(self, last_step: int, outlet: Outlet) -> bool:
        """Train until ``last_step`` steps are done; evaluate and save after every epoch.

        Args:
            last_step: Steps of the whole run, those before a resume included.
            outlet: Where numbers and checkpoints go.

        Returns:
            False if it was asked to stop before, and has saved where it was.

        Raises:
            UsageError: More processes share a batch than it has images.
            DivergedError: Loss or gradients are not finite. The last checkpoint stays as it is.
            DataError: An image cannot be decoded.
            RuntimeError: A process that makes batches has died.
            OSError: The folder cannot be written to.
        """
        if self._batch_size < (sharing := self._mesh.convolution_replicas.count):
            raise UsageError(f"{sharing} processes cannot share a batch of {self._batch_size}")
        self._meter.start()
        self._stall_step = self.step + STALL_STEPS
        try:
            while True:
                if (self.step == last_step or self._is_epoch_end) and self._evaluated != self.step:
                    self._end_epoch(outlet)
                if self.step >= last_step or self._schedule.finished:
                    return True
                self._train_epoch(last_step, outlet)
        except StoppedError:
            self._save(outlet)
            return False

    def evaluate(
        self,
        *,
        ten_crop: bool = False,
        keep: bool = False,
        stopping: Callable[[], object] = lambda: False,
    ) -> Evaluated:
        """Loss and errors on the held-out split, every sample once.

        Args:
            ten_crop: Ten crops of each image instead of the central one.
            keep: Whether the result has the probabilities.
            stopping: Asked before every batch.

        Raises:
            StoppedError: ``stopping`` said so.
            DivergedError: The loss is not finite.
        """
        self.model.eval()
        options = self._options
        with self._timed("evaluation"):
            evaluated = evaluate(
                self._forward,
                self._dataset.val,
                (ten_crops if ten_crop else centre_crop)(self._margin),
                self.model.preset.stored_size,
                options.batch_size,
                options.workers,
                self._device,
                keep=keep,
                stopping=stopping,
                mesh=self._mesh,
            )
        if not math.isfinite(loss := evaluated.evaluation.loss):
            raise DivergedError(
                f"the held-out loss is {loss} after step {self.step}: the network has diverged; "
                "go on from an earlier checkpoint, with a lower --lr"
            )
        return evaluated

    def predictions(self, probabilities: NDArray[np.float32], views: int) -> Predictions:
        """What :meth:`evaluate` kept, with its labels.

        Args:
            probabilities: float32 [N, classes].
            views: Crops of an image that they are means over.
        """
        names = self._dataset.class_names
        return Predictions(probabilities, self._dataset.val.labels, names, views)

    def summary(self) -> str:
        """Lines for the end of a run: its best errors, and where its time went."""
        lines = []
        if self.best:
            evaluation, step = self.best
            lines.append(f"best: {evaluation} after step {step}")
        if self._options.target:
            lines.append(f"to be reached: {self._options.target}")
        whole = sum(self._seconds.values())
        if not whole:
            return "\n".join([*lines, f"nothing was left to do after step {self.step}"])
        parts = [f"{name} {seconds / whole:.0%}" for name, seconds in self._seconds.items()]
        lines.append(f"time: {whole:.1f} s, of it {', '.join(parts)}")
        if self._seconds["waiting for data"] > 0.2 * whole:
            lines.append(
                "the data came too slowly: more --workers help, or for a folder of images "
                "`alexkern prepare`"
            )
        return "\n".join(lines)

    @property
    def _is_epoch_end(self) -> bool:
        return self.step > 0 and self.step % self.steps_per_epoch == 0

    def _train_epoch(self, last_step: int, outlet: Outlet) -> None:
        """Finish the epoch or stop at ``last_step``, whose row :meth:`_end_epoch` writes."""
        options = self._options
        epoch, first = divmod(self.step, self.steps_per_epoch)
        end = min((epoch + 1) * self.steps_per_epoch, last_step)
        step, sentinel = self._make_step(epoch), Sentinel()
        saved = time.monotonic()
        of_epoch = self._training_batches(epoch)
        with on_device(of_epoch, options.workers, self._device, first) as batches:
            for batch in self._meter.timed(islice(batches, end - self.step)):
                due = time.monotonic() - saved >= 60 * options.save_minutes
                stop, save = outlet.wishes(due and self.step % self.steps_per_epoch > 0)
                if stop:
                    sentinel.check()
                    raise StoppedError
                if save:
                    sentinel.check()
                    with self._meter.paused():
                        self._save(outlet)
                    saved = time.monotonic()
                step.set_rates(self._rates(self.step))
                seeds = [derive_seed(options.seed, "dropout", self.step, layer) for layer in (0, 1)]
                outcome = step(batch, seeds)
                self._meter.add(outcome.sums, self._batch_size)
                self.step += 1
                sentinel.note(self.step, outcome)
                if self.step < end and self.step % options.print_freq == 0:
                    sentinel.check()
                    self._write(outlet, self._meter.read(), None)
                    self._meter.reset()
        sentinel.check()

    def _make_step(self, epoch: int) -> Step:
        """An epoch's step: late switches are thrown between epochs."""
        options = self._options
        self.model.train()
        learns = options.conv1_epochs is None or epoch < options.conv1_epochs
        divisor = _NOISE_DIVISOR.get(self._colour_noise(epoch), 1.0)
        if self._step is None or self._step[0] != (learns, divisor):
            self.model.conv1.requires_grad_(learns)
            self._forward.replicate()
            step = Step(
                self._forward,
                self._optimizer,
                self._scaler,
                divisor,
                self._device,
                options.cuda_graph,
                self._batch_size,
                self._mesh,
            )
            self._step = (learns, divisor), step
        return self._step[1]

    def _end_epoch(self, outlet: Outlet) -> None:
        """Evaluate, write and save; at the end of the run, which may be within an epoch, too."""
        measured = self._meter.read()
        evaluation = self.evaluate(stopping=outlet.stopping).evaluation
        network = self.whole_network()
        self._write(outlet, measured, evaluation)
        if self._is_epoch_end:  # after the row, which has the rate of the last step
            self._schedule.observe(evaluation.top1_error)
        if network.model:
            changes = self._layer_changes(network)
            outlet.write_network(self.step, changes, network.model["conv1.weight"])
        self._meter.reset()
        self._evaluated = self.step
        if self.best is None or evaluation.top1_error < self.best[0].top1_error:
            self.best = evaluation, self.step
            self._save(outlet, checkpoint.BEST, network)
        self._save(outlet, network=network)
        self._meter.start()

    def _layer_changes(self, network: Network) -> list[LayerChange]:
        changes = []
        for name, weight in network.model.items():
            layer, _, kind = name.rpartition(".")
            if kind == "weight":
                velocity = network.optimizer.get("velocity", {}).get(name)
                moved = velocity is not None and self.model.get_parameter(name).requires_grad
                update = velocity.abs().mean().item() if velocity is not None and moved else 0.0
                changes.append(LayerChange(layer, weight.abs().mean().item(), update))
        return changes

    def _save(
        self, outlet: Outlet, name: str | None = None, network: Network | None = None
    ) -> None:
        with self._timed("saving"):
            outlet.save(self.state_dict(network), name)

    def _write(self, outlet: Outlet, measured: Measured, evaluation: Evaluation | None) -> None:
        """The row of metrics after ``step`` steps, which is printed as well."""
        self._seconds["training"] += measured.seconds - measured.waited
        self._seconds["waiting for data"] += measured.waited
        epoch = (self.step - 1) // self.steps_per_epoch + 1
        rate = self._rates(self.step - 1)[0]
        outlet.say(
            f"step {self.step}/{self.total_steps}  epoch {epoch}/{self._options.epochs}  "
            f"loss {measured.train_loss:.4f}  top-1 error {measured.train_top1_error:.1%}  "
            f"lr {rate:g}  {measured.images_per_second:.0f} images/s"
            f"{self._utilisation.of(measured.images_per_second)}  "
            f"waiting for data {measured.data_wait_share:.0%}"
        )
        if evaluation:
            outlet.say(f"held out after step {self.step}: {evaluation}")
        self._watch_for_stall(outlet, measured.train_loss)
        row = Row(
            step=self.step,
            epoch=epoch,
            train_loss=measured.train_loss,
            train_top1_error=measured.train_top1_error,
            val_loss=evaluation.loss if evaluation else None,
            val_top1_error=evaluation.top1_error if evaluation else None,
            val_top5_error=evaluation.top5_error if evaluation else None,
            learning_rate=rate,
            images_per_second=measured.images_per_second,
            data_wait_share=measured.data_wait_share,
        )
        outlet.write(row)

    def _watch_for_stall(self, outlet: Outlet, train_loss: float) -> None:
        """Say so, once, if the loss has never left that of a guess."""
        guess = math.log(max(len(self._dataset.class_names), 2))
        if train_loss < guess - 0.02:
            self._stall_step = math.inf
        elif self.step >= self._stall_step:
            self._stall_step = math.inf
            outlet.say(
                f"the loss is still that of a guess, ln {len(self._dataset.class_names)} = "
                f"{guess:.3f}. Usual causes: weights too small for biases of 1 (the paper's text "
                "lacks the 0.03 that conv3 to conv5 have in --preset krizhevsky2012; Caffe's "
                "caffe_alexnet has biases of 0.1), pixels that are not 0 to 255 less their mean, "
                f"or the learning rate (--lr {self._options.lr:g})"
            )

    def _rates(self, step: int) -> list[float]:
        """The learning rates of weights and of biases."""
        options = self._options
        epoch = step / self.steps_per_epoch
        bias_lr = options.lr * options.bias_lr_factor
        return [
            options.lr * self._schedule.factor(epoch),
            bias_lr * self._bias_schedule.factor(epoch),
        ]

    def _colour_noise(self, epoch: int) -> str:
        last = self._options.colour_noise_epochs
        return self._options.colour_noise if last is None or epoch < last else "none"

    def _training_batches(self, epoch: int) -> Batches:
        options, dataset = self._options, self._dataset
        augmentation = Augmentation(
            crop_size=self.model.preset.crop_size,
            crop_offsets=options.crop_offsets or self._margin + 1,
            flip=dataset.flip,
            chunk=options.crop_chunk,
            colour_noise=dataset.colours.noise(self._colour_noise(epoch)),
        )
        return training_batches(
            dataset.train, options.seed, epoch, options.batch_size, augmentation, self._mesh
        )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - start


def _sample(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
