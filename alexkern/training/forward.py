"""From stored pixels to class scores, under one backend and one precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

import alexkern
from alexkern import ops
from alexkern.models import AlexNet
from alexkern.parallel import Mesh, replicated

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Forward:
    """``ops.augment`` and the network.

    Args:
        model: The network.
        mean: Of stored images, float32 [size, size, 3]; its centre is subtracted from all crops,
            as in the 2012 code. On the network's device.
        kernels: The backend, or ``compile``, which is ``torch``.
        amp: ``off``, ``bf16`` or ``fp16`` autocast.
        mesh: The processes that compute it together.
    """

    def __init__(
        self, model: AlexNet, mean: Tensor, kernels: str, amp: str, mesh: Mesh | None = None
    ) -> None:
        preset = model.preset
        self._mesh, self._compiled = mesh or Mesh(), kernels == "compile"
        self._network: Callable[..., Tensor] = model
        self._model, self._std, self._device = model, preset.input_std, mean.device
        self._dtype = _AMP_DTYPES.get(amp)
        self._backend = "torch" if kernels == "compile" else kernels
        # For this project's kernels images are packed; a vendor's might be slower on that.
        packing = preset.packing if self._backend == "triton" else None
        self._packing = packing._asdict() if packing else {}
        corner = (preset.stored_size - preset.crop_size) // 2
        centre = slice(corner, corner + preset.crop_size)
        self._mean = mean[centre, centre].contiguous()

    def replicate(self) -> None:
        """Let replicas add up gradients, from now on, of what learns now."""
        if self._mesh.processes == 1:
            return
        convolutions: dict[str, nn.Module] = {}
        connected: dict[str, nn.Module] = {}
        for name, layer in self._model.named_children():
            (convolutions if name.startswith("conv") else connected)[name] = layer
        functions = self._model.features, self._model.classify
        if self._compiled:
            functions = torch.compile(functions[0]), torch.compile(functions[1])
        features = replicated(functions[0], convolutions, self._mesh.convolution_replicas)
        classify = replicated(functions[1], connected, self._mesh.data)
        self._network = lambda crops, *others: classify(features(crops), *others)

    def __call__(
        self,
        images: Tensor,
        corners: Tensor,
        flips: Tensor,
        shift: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
        divisor: float = 1.0,
        rows: range | None = None,
    ) -> Tensor:
        """Class scores of crops.

        Args:
            images: Stored ones, or crops of them.
            corners: This and what follows as in :func:`alexkern.ops.augment`.
            flips: Whether each is mirrored.
            shift: Of the colours.
            dropout_seeds: See :class:`alexkern.models.AlexNet`.
            divisor: Divides pixels besides the preset's ``input_std``.
            rows: As ``dropout_seeds``.

        Returns:
            float32 [B, classes]; no classes in columns but the first.
        """
        dtype = self._dtype or self._model.fc6.weight.dtype
        precision = torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)
        with precision, self.kernels():
            std = self._std * divisor
            crops = ops.augment(
                images, corners, flips, self._mean, std, shift, dtype=dtype, **self._packing
            )
            logits = self._network(crops, dropout_seeds, rows)
        return logits.float()

    def kernels(self) -> AbstractContextManager[None]:
        """The backend, for what else the step does."""
        return alexkern.use_backend(self._backend)
