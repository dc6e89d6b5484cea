"""The paper's whole network, training step and inference, on a ladder of ways to run it.

Every rung starts from the same weights and from stored uint8 crops on the device, and ends with
new weights, or with logits. PyTorch's rungs are an ``nn.Sequential`` of its own modules; this
library's training rungs are the step of ``train_alexnet.py``. The ladder is climbed twice: once
without response normalisation, so that nobody can say the difference is only PyTorch's slow LRN.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexkern.data import Batch
from alexkern.models import AlexNet, get_preset
from alexkern.optim import KrizhevskySGD
from alexkern.runtime.timing import Call
from alexkern.runtime.vendor import without_cudnn
from alexkern.training.forward import Forward
from alexkern.training.step import Step
from bench.lab import Lab, Variant
from bench.machine import precision
from bench.work import fan_in

NETWORKS = ("paper", "no_lrn")
# The weights stay as they are, and the work is the same.
_LEARNING_RATE = 0.0


@dataclass(frozen=True)
class Rung:
    """One way to run the network.

    Attributes:
        backend: This library's, None for PyTorch's own modules.
        channels_last: Memory format of images and weights.
        precision: ``"amp"`` (bfloat16 autocast, float32 weights), ``"bf16"`` (weights too) or
            ``"tf32"``.
        compile: Mode of torch.compile, None for eager.
        fused: One kernel for PyTorch's SGD instead of one for each of its steps.
        graph: The whole call is replayed as a CUDA graph.
    """

    backend: str | None = None
    channels_last: bool = True
    precision: str = "amp"
    compile: str | None = None
    fused: bool = False
    graph: bool = False


TRAINING = {
    "eager_tf32_nchw": Rung(channels_last=False, precision="tf32"),
    "eager": Rung(fused=True),
    "eager_graph": Rung(fused=True, graph=True),
    "compile": Rung(compile="default", fused=True),
    "compile_max_autotune": Rung(compile="max-autotune", precision="bf16", fused=True),
    "alexkern": Rung("auto"),
    "alexkern_graph": Rung("auto", graph=True),
    "alexkern_triton_graph": Rung("triton", graph=True),
}
# Weights are cast once, before.
INFERENCE = {
    "eager_tf32_nchw": Rung(channels_last=False, precision="tf32"),
    "eager": Rung(precision="bf16"),
    "eager_graph": Rung(precision="bf16", graph=True),
    "compile": Rung(precision="bf16", compile="default"),
    "compile_max_autotune": Rung(precision="bf16", compile="max-autotune"),
    "alexkern": Rung("auto", precision="bf16"),
    "alexkern_graph": Rung("auto", precision="bf16", graph=True),
    "alexkern_triton_graph": Rung("triton", precision="bf16", graph=True),
}


class Plain(nn.Module):
    """From stored crops to logits by PyTorch's own modules, around the layers of ``model``.

    Args:
        model: Of one of the plain orders: convolution, ReLU, normalisation, pooling.
        mean: As for :class:`alexkern.training.forward.Forward`.
        channels_last: The format of the images that reach the network.
    """

    def __init__(self, model: AlexNet, mean: Tensor, channels_last: bool) -> None:
        super().__init__()
        preset, norm = model.preset, model.preset.response_norm
        corner = (preset.stored_size - preset.crop_size) // 2
        centre = slice(corner, corner + preset.crop_size)
        self._mean = mean[centre, centre].permute(2, 0, 1)
        self._std, self._channels_last = preset.input_std, channels_last

        def tail(normalised: bool) -> list[nn.Module]:
            pool = nn.MaxPool2d(3, 2)
            if norm is None or not normalised:
                return [nn.ReLU(), pool]
            # PyTorch divides alpha by size, the paper does not
            alpha = norm.alpha * norm.size if norm.alpha_mode == "sum" else norm.alpha
            return [nn.ReLU(), nn.LocalResponseNorm(norm.size, alpha, norm.beta, norm.k), pool]

        self.layers = nn.Sequential(
            *(nn.ZeroPad2d(preset.conv1_padding), model.conv1, *tail(True)),
            *(model.conv2, *tail(True)),
            *(model.conv3, nn.ReLU()),
            *(model.conv4, nn.ReLU()),
            *(model.conv5, *tail(False)),
            nn.Flatten(),
            *(model.fc6, nn.ReLU(), nn.Dropout(preset.dropout)),
            *(model.fc7, nn.ReLU(), nn.Dropout(preset.dropout)),
            model.fc8,
        )

    def forward(self, images: Tensor, flips: Tensor, shift: Tensor) -> Tensor:
        """Logits of uint8 crops [B, size, size, 3], mirrored and shifted as in ``ops.augment``."""
        pixels = images.permute(0, 3, 1, 2)  # which is channels_last
        pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
        pixels = (pixels - self._mean + shift[:, :, None, None]) / self._std
        weight: Tensor = self.layers[1].weight  # type: ignore[assignment]
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        logits: Tensor = self.layers(pixels.to(weight.dtype, memory_format=layout))
        return logits


class Runner:
    """A rung's network and optimizer, on a batch of stored crops."""

    def __init__(self, rung: Rung, model: AlexNet, mean: Tensor, batch: Batch) -> None:
        self._rung, self._batch, self._gpu = rung, batch, mean.is_cuda
        model = deepcopy(model)
        layout = torch.channels_last if rung.channels_last else torch.contiguous_format
        model.to(mean.device, memory_format=layout)  # type: ignore[call-overload]
        if rung.precision == "bf16" and self._gpu:  # a CPU lacks some of PyTorch's ops in bf16
            model.bfloat16()
        ours = rung.backend is not None
        self._network = model if ours else Plain(model, mean, rung.channels_last)
        if rung.compile:
            mode = {"mode": rung.compile} if self._gpu else {"backend": "aot_eager"}
            self._network.compile(dynamic=False, **mode)
        amp = "bf16" if rung.precision == "amp" and self._gpu else "off"
        self._forward = Forward(model, mean, rung.backend or "torch", amp)
        sgd: Any = partial(torch.optim.SGD, fused=rung.fused and self._gpu)
        self._optimizer = (KrizhevskySGD if ours else sgd)(
            list(self._network.parameters()), lr=_LEARNING_RATE, momentum=0.9, weight_decay=5e-4
        )
        # what train_alexnet.py captures, with its measurements and its check for NaN
        scaler = torch.amp.GradScaler(enabled=False)
        self._step = Step(
            self._forward,
            self._optimizer,
            scaler,
            1.0,
            mean.device,
            capture=False,
            batch_size=len(batch.labels),
        )
        self._seeds = torch.tensor([1, 2], device=mean.device)
        self._corners = torch.zeros(len(batch.labels), 2, dtype=torch.int64, device=mean.device)

    def step(self) -> Tensor:
        """One step of training."""
        with self._precision():
            if self._rung.backend:
                return self._step.compute(self._batch, self._seeds).loss
            self._optimizer.zero_grad()
            loss = self._loss()
            loss.backward()
            self._optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def infer(self) -> Tensor:
        """The logits, without dropout."""
        with self._precision():
            return self._logits()

    def current_gradients(self) -> list[Tensor]:
        """What the last step left."""
        return [p.grad.detach() for p in self._network.parameters() if p.grad is not None]

    def gradients(self) -> list[Tensor]:
        """Of all parameters, without dropout."""
        self.train(False)
        self._optimizer.zero_grad()
        with self._precision():
            self._loss().backward()
        gradients = self.current_gradients()
        self._optimizer.zero_grad()
        self.train(True)
        return gradients

    def train(self, mode: bool) -> None:
        """Dropout on or off."""
        self._network.train(mode)

    def _loss(self) -> Tensor:
        logits = self._logits()
        exact = logits.dtype == torch.float64
        return F.cross_entropy(logits if exact else logits.float(), self._batch.labels)

    def _logits(self) -> Tensor:
        images, flips, shift, _ = self._batch
        if self._rung.backend:
            return self._forward(images, self._corners, flips, shift)
        # a weight is used once, so no cast is worth keeping
        amp = torch.autocast(
            "cuda", torch.bfloat16, self._gpu and self._rung.precision == "amp", cache_enabled=False
        )
        with amp:
            logits: Tensor = self._network(images, flips, shift)
        return logits

    def _precision(self) -> AbstractContextManager[None]:
        return precision("tf32" if self._rung.precision == "tf32" else "ieee")


class Ladder:
    """All rungs of one network, in training or in inference, with the truth in float64.

    A rung's logits, or the gradient of each parameter, may be off by at most twice what eager
    PyTorch's are (channels_last, AMP), plus the rounding of bfloat16; both in the RMS. Gradients
    are compared without dropout, in calls beside those that are timed; what the timed calls
    themselves left is held to the truth's size only, as their dropout is random.
    """

    def __init__(self, name: str, training: bool, batch: int, lab: Lab) -> None:
        preset = get_preset("mini" if lab.trial else "paper")
        changes: dict[str, Any] = {"dropout_mode": "inverted"}
        if name == "no_lrn":
            changes["response_norm"] = None
        if not lab.trial:
            # The paper's weights are so small that rounding hides a wrong layer: He et al.'s.
            changes |= {"weight_std": tuple(math.sqrt(2 / n) for n in fan_in()), "bias": (0,) * 8}
        self._model = AlexNet(replace(preset, **changes))
        self._model.to(lab.device)
        size, stored = preset.crop_size, preset.stored_size
        self._mean = 128 + 10 * torch.randn(stored, stored, 3, device=lab.device)
        # centred pixels have grey levels of about this spread
        pixels = 128 + 60 * torch.randn(batch, size, size, 3, device=lab.device)
        self._batch = Batch(
            pixels.clamp(0, 255).byte(),
            torch.rand(batch, device=lab.device) < 0.5,
            12 * torch.randn(batch, 3, device=lab.device),
            torch.randint(1000, (batch,), device=lab.device),
        )
        self._training = training
        own = self._results(Runner(Rung(), self._model, self._mean, self._batch))
        double = deepcopy(self._model).double()
        exact = Runner(Rung(precision="fp64"), double, self._mean.double(), self._batch)
        with without_cudnn():
            self._truths = [truth.double() for truth in self._results(exact)]
        self._own_errors = [
            _rms(value.double() - truth) for value, truth in zip(own, self._truths, strict=True)
        ]

    def variants(self) -> dict[str, Variant]:
        """By the rung's name."""
        rungs = TRAINING if self._training else INFERENCE
        return {name: self._variant(rung) for name, rung in rungs.items()}

    def _variant(self, rung: Rung) -> Variant:
        runners: list[Runner] = []

        def build() -> list[Call]:
            runners.append(Runner(rung, self._model, self._mean, self._batch))
            runners[0].train(self._training)
            return [runners[0].step if self._training else runners[0].infer]

        def error_ratio(result: Tensor) -> float:
            if not self._training:
                return self._ratio([result])
            left = self._size_ratio([result, *runners[0].current_gradients()])
            return max(left, self._ratio(runners[0].gradients()))

        return Variant(build, error_ratio, rung.graph)

    def _results(self, runner: Runner) -> list[Tensor]:
        if self._training:
            return runner.gradients()
        runner.train(False)
        return [runner.infer()]

    def _size_ratio(self, values: Sequence[Tensor]) -> float:
        """How far from the truth's size, over a factor of ten, loss and gradients are."""
        loss, *gradients = values
        factors = [_rms(g.double()) / _rms(t) for g, t in zip(gradients, self._truths, strict=True)]
        largest = torch.stack([torch.maximum(f, 1 / f) for f in factors]).max()
        return float(largest / 10) if loss.isfinite() else math.inf

    def _ratio(self, values: Sequence[Tensor]) -> float:
        ratios = []
        for value, truth, own in zip(values, self._truths, self._own_errors, strict=True):
            allowed = 2 * own + torch.finfo(torch.bfloat16).eps * _rms(truth)
            ratios.append(_rms(value.double() - truth) / allowed)
        return float(torch.stack(ratios).max())


def _rms(value: Tensor) -> Tensor:
    return value.square().mean().sqrt()
