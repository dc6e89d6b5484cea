"""What several ops do with their arguments alike."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """(height, width) of an argument given as one int or as a sequence of one or two.

    Raises:
        TypeError: neither an int nor a sequence of ints.
        RuntimeError: another number of elements.
    """
    if isinstance(value, int):
        return value, value
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(element, int) for element in values):
        raise TypeError(f"{name} must be an int or a tuple of ints, got {value!r}")
    if len(values) not in (1, 2):
        raise RuntimeError(f"{name} must be one int or a tuple of two ints, got {value!r}")
    return values[0], values[-1]


def check_alike(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse weight or bias of another dtype, or on another device, than the input's.

    Raises:
        RuntimeError: as PyTorch.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, "
                f"but found at least two devices, {input.device} and {tensor.device}!"
            )
        if tensor is not None and tensor.dtype != input.dtype:
            raise RuntimeError(
                f"Input type ({input.dtype}) and {name} type ({tensor.dtype}) should be the same"
            )


def autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in autocast's dtype, where autocast is on and casts them."""
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return input, weight, bias
    if torch.float64 in (input.dtype, weight.dtype):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
