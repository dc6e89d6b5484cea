"""The paper's whole network, training step and inference, on a ladder of ways to run it.

Every rung starts from the same weights. PyTorch's rungs are an ``nn.Sequential`` of its own
modules. The ladder is climbed twice: once without response normalisation, so that nobody can say
the difference is only PyTorch's slow LRN.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexkern import use_backend
from alexkern.models import AlexNet, get_preset
from alexkern.optim import KrizhevskySGD
from alexkern.runtime.timing import Call
from alexkern.runtime.vendor import without_cudnn
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
    "eager": Rung(),
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


def plain(model: AlexNet) -> nn.Sequential:
    """The network of PyTorch's own modules, around the same layers."""
    preset, norm = model.preset, model.preset.response_norm

    def tail(normalised: bool) -> list[nn.Module]:
        pool = nn.MaxPool2d(3, 2)
        if norm is None or not normalised:
            return [nn.ReLU(), pool]
        # PyTorch divides alpha by size, the paper does not
        alpha = norm.alpha * norm.size if norm.alpha_mode == "sum" else norm.alpha
        return [nn.ReLU(), nn.LocalResponseNorm(norm.size, alpha, norm.beta, norm.k), pool]

    return nn.Sequential(
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


class Runner:
    """A rung's network, optimizer and context, on given images."""

    def __init__(self, rung: Rung, model: AlexNet, images: Tensor, labels: Tensor) -> None:
        self._rung, self._gpu = rung, images.is_cuda
        model = deepcopy(model)
        layout = torch.channels_last if rung.channels_last else torch.contiguous_format
        self._images, self._labels = images.to(memory_format=layout), labels
        self._network: nn.Module = plain(model) if rung.backend is None else model
        self._network.to(images.device, memory_format=layout)  # type: ignore[call-overload]
        if rung.precision == "bf16" and self._gpu:  # a CPU lacks some of PyTorch's ops in bf16
            self._network.bfloat16()
            self._images = self._images.bfloat16()
        if rung.compile:
            mode = {"mode": rung.compile} if self._gpu else {"backend": "aot_eager"}
            self._network.compile(dynamic=False, **mode)
        rule: Any = KrizhevskySGD
        if rung.backend is None:
            rule = partial(torch.optim.SGD, fused=rung.fused and self._gpu)
        parameters = list(self._network.parameters())
        self._optimizer = rule(parameters, lr=_LEARNING_RATE, momentum=0.9, weight_decay=5e-4)

    def step(self) -> Tensor:
        """One step of training."""
        self._optimizer.zero_grad()
        with self._precision():
            loss = self._loss()
            loss.backward()
        self._optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def infer(self) -> Tensor:
        """The logits, without dropout."""
        with self._precision(), self._context():
            logits: Tensor = self._network(self._images)
        return logits

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
        with self._context():
            logits = self._network(self._images)
        return F.cross_entropy(logits.to(self._loss_dtype), self._labels)

    @property
    def _loss_dtype(self) -> torch.dtype:
        return torch.float64 if self._images.dtype == torch.float64 else torch.float32

    def _precision(self) -> AbstractContextManager[None]:
        return precision("tf32" if self._rung.precision == "tf32" else "ieee")

    def _context(self) -> AbstractContextManager[Any]:
        """The backend, and autocast; a weight is used once, so no cast is worth keeping."""
        stack = ExitStack()
        if self._rung.backend:
            stack.enter_context(use_backend(self._rung.backend))
        if self._rung.precision == "amp" and self._gpu:
            stack.enter_context(torch.autocast("cuda", torch.bfloat16, cache_enabled=False))
        return stack


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
        size = preset.crop_size
        # centred pixels have grey levels of about this spread
        self._images = 60 * torch.randn(batch, 3, size, size, device=lab.device)
        self._labels = torch.randint(1000, (batch,), device=lab.device)
        self._training = training
        own = self._results(Runner(Rung(), self._model, self._images, self._labels))
        double = deepcopy(self._model).double()
        exact = Runner(Rung(precision="fp64"), double, self._images.double(), self._labels)
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
            runners.append(Runner(rung, self._model, self._images, self._labels))
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
