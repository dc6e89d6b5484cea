"""The training loop."""

import math
from contextlib import AbstractContextManager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import alexkern
from alexkern import ops
from alexkern.data import (
    Batch,
    Batches,
    Dataset,
    derive_seed,
    evaluation_batches,
    iterate,
    training_batches,
)
from alexkern.models import alexnet
from alexkern.optim import KrizhevskySGD
from alexkern.training import checkpoint
from alexkern.training.errors import DivergedError, UsageError
from alexkern.training.metrics import Evaluation, Measured, Meter, MetricsFile, Row, wrong_answers
from alexkern.training.options import Options

# When the author lowered the rate by hand, in epochs of 90 (2012 code, layer-params-145).
_DROPS = (25 / 90, 51 / 90, 79 / 90)

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(initial: float, step: int, total_steps: int) -> float:
    """Divided by 10 three times: at epochs 25, 51 and 79 of 90, or those shares of any length.

    Args:
        initial: Rate of the first step.
        step: Steps done before this one.
        total_steps: Length of the schedule.
    """
    return initial * 0.1 ** sum(step / total_steps >= drop for drop in _DROPS)


class Trainer:
    """One run: its network, its data, and how far it has come.

    Every random number is a function of the seed and of the step, epoch or sample it is for, so
    a resumed run continues with the numbers of an uninterrupted one.

    Args:
        options: The run's options.
        dataset: What it learns.
        device: Where it computes.

    Attributes:
        model: The network.
        step: Steps done.
        steps_per_epoch: Steps in an epoch.
    """

    def __init__(self, options: Options, dataset: Dataset, device: torch.device) -> None:
        self._options, self._dataset, self._device = options, dataset, device
        torch.manual_seed(derive_seed(options.seed, "initialisation"))
        self.model = alexnet(options.preset, len(dataset.class_names))
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if options.kernels == "compile":
            self.model.compile()
        self._optimizer = KrizhevskySGD(
            self.model.parameters(), options.lr, options.momentum, options.weight_decay
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        preset = self.model.preset
        self._margin = preset.stored_size - preset.crop_size
        # the central crop's mean for every crop, as in the 2012 code
        centre = slice(self._margin // 2, self._margin // 2 + preset.crop_size)
        self._mean = torch.from_numpy(dataset.mean[centre, centre]).contiguous().to(device)
        self._backend = "torch" if options.kernels == "compile" else options.kernels
        self._images, self._seconds = 0, 0.0
        self.step = 0
        self.steps_per_epoch = len(self._training_batches(0))

    @property
    def total_steps(self) -> int:
        """Length of the learning rate schedule in steps."""
        return self._options.epochs * self.steps_per_epoch

    @property
    def images_per_second(self) -> float:
        """Training speed so far, evaluation left out; 0 before the first row of metrics."""
        return self._images / self._seconds if self._seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to continue: tensors and plain types."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "options": asdict(self._options),
            "class_names": list(self._dataset.class_names),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            UsageError: It was trained on other classes.
        """
        here, there = list(self._dataset.class_names), state["class_names"]
        if here != there:
            raise UsageError(
                f"the checkpoint knows {len(there)} classes ({_sample(there)}), "
                f"--data {self._dataset.name} has {len(here)} ({_sample(here)}): "
                "give the --data of that run, or start a new one"
            )
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        for group in self._optimizer.param_groups:
            group["momentum"] = self._options.momentum
            group["weight_decay"] = self._options.weight_decay
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def train(self, last_step: int, output: Path) -> Evaluation:
        """Train until ``last_step`` steps are done; evaluate and save after every epoch.

        Args:
            last_step: Steps of the whole run, those before a resume included.
            output: Existing folder for ``metrics.csv`` and ``checkpoint.pt``.

        Returns:
            The last evaluation.

        Raises:
            DivergedError: The loss is not finite. The last checkpoint stays as it is.
            DataError: An image cannot be decoded.
        """
        metrics = MetricsFile(output / "metrics.csv", self.step)
        evaluation = None
        while self.step < last_step:
            meter = Meter(self._device)
            epoch_end = self.step - self.step % self.steps_per_epoch + self.steps_per_epoch
            self._train_epoch(min(epoch_end, last_step), meter, metrics)
            measured = self._read(meter)
            evaluation = self.evaluate()
            metrics.write(self._report(measured, evaluation))
            checkpoint.save(output / checkpoint.FILE_NAME, self.state_dict())
        return evaluation or self.evaluate()

    @torch.inference_mode()
    def evaluate(self) -> Evaluation:
        """Loss and errors on the held-out split: central crops, every sample once."""
        self.model.eval()
        sums = torch.zeros(3, device=self._device)
        options, split = self._options, self._dataset.val
        batches = evaluation_batches(split, options.batch_size, self._margin)
        for batch in iterate(batches, options.workers, self._device.type == "cuda"):
            batch = batch.to(self._device)
            with self._precision(), self._kernels():
                logits = self.model(self._input(batch)).float()
            loss = F.cross_entropy(logits, batch.labels, reduction="sum")
            sums += torch.stack((loss, *(wrong_answers(logits, batch.labels, k) for k in (1, 5))))
        return Evaluation(*(sums / len(split.labels)).tolist())

    def _train_epoch(self, last_step: int, meter: Meter, metrics: MetricsFile) -> None:
        """Finish the epoch or stop at ``last_step``, whose row the caller writes."""
        self.model.train()
        epoch, first = divmod(self.step, self.steps_per_epoch)
        pin_memory = self._device.type == "cuda"
        batches = iterate(self._training_batches(epoch), self._options.workers, pin_memory, first)
        for batch in meter.timed(islice(batches, last_step - self.step)):
            meter.add(*self._train_step(batch.to(self._device)))
            self.step += 1
            if self.step % self._options.print_freq == 0 and self.step < last_step:
                metrics.write(self._report(self._read(meter), None))

    def _train_step(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Update the weights once; gives the loss, the logits and the labels."""
        options = self._options
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        seeds = [derive_seed(options.seed, "dropout", self.step, layer) for layer in (0, 1)]
        # pinned, as the host would otherwise wait for all that the device has yet to do
        dropout_seeds = torch.tensor(seeds, pin_memory=self._device.type == "cuda")
        dropout_seeds = dropout_seeds.to(self._device, non_blocking=True)
        with self._precision(), self._kernels():
            logits = self.model(self._input(batch), dropout_seeds)
        logits = logits.float()
        loss = F.cross_entropy(logits, batch.labels)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        with self._kernels():
            self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss, logits, batch.labels

    def _read(self, meter: Meter) -> Measured:
        measured = meter.read()
        if not math.isfinite(measured.train_loss):
            raise DivergedError(
                f"the loss is {measured.train_loss} by step {self.step}: lower --lr "
                f"({self._options.lr}); the last checkpoint is as it was"
            )
        self._images += measured.images
        self._seconds += measured.seconds
        return measured

    def _report(self, measured: Measured, evaluation: Evaluation | None) -> Row:
        """The row of metrics after ``step`` steps, which is printed as well."""
        epoch = (self.step - 1) // self.steps_per_epoch + 1
        rate = self._learning_rate(self.step - 1)
        print(
            f"step {self.step}/{self.total_steps}  epoch {epoch}/{self._options.epochs}  "
            f"loss {measured.train_loss:.4f}  top-1 error {measured.train_top1_error:.1%}  "
            f"lr {rate:g}  {measured.images_per_second:.0f} images/s  "
            f"waiting for data {measured.data_wait_share:.0%}",
            flush=True,
        )
        if evaluation:
            print(f"held out after step {self.step}: {evaluation}", flush=True)
        return Row(
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

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self._options.lr, step, self.total_steps)

    def _training_batches(self, epoch: int) -> Batches:
        options, dataset = self._options, self._dataset
        return training_batches(
            dataset.train, options.seed, epoch, options.batch_size, self._margin, dataset.flip
        )

    def _input(self, batch: Batch) -> Tensor:
        """What the network sees, in the dtype that autocast would cast it to.

        For this project's kernels it is packed; a vendor's might be slower on it.
        """
        preset, dtype = self.model.preset, _AMP_DTYPES.get(self._options.amp, torch.float32)
        packing = preset.packing if self._backend == "triton" else None
        return ops.augment(
            batch.images,
            batch.corners,
            batch.flips,
            self._mean,
            preset.input_std,
            dtype=dtype,
            **(packing._asdict() if packing else {}),
        )

    def _kernels(self) -> AbstractContextManager[None]:
        return alexkern.use_backend(self._backend)

    def _precision(self) -> AbstractContextManager[object]:
        dtype = _AMP_DTYPES.get(self._options.amp)
        return torch.autocast(self._device.type, dtype, enabled=dtype is not None)


def _sample(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
