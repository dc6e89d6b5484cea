"""Memory layouts that the kernels take as they are: NCHW and channels_last, both dense."""

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor of three or more dimensions is stored densely as [N, *spatial, C].

    A tensor that is dense in both orders (one channel, or one pixel) counts as contiguous.
    """
    if tensor.is_contiguous():
        return False
    return tensor.movedim(1, -1).is_contiguous()


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is dense in a supported layout, else one contiguous copy.

    Raises:
        NotImplementedError: not a strided tensor.
    """
    if tensor.layout is not torch.strided:
        raise NotImplementedError(f"kernels take strided tensors, got layout {tensor.layout}")
    if tensor.is_contiguous() or (tensor.dim() >= 3 and is_channels_last(tensor)):
        return tensor
    return tensor.contiguous()


def dense_as(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor, copied only if it is not dense in the given layout."""
    if not channels_last:
        return tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def is_dense(tensor: Tensor) -> bool:
    """Whether elements that do not overlap lie in memory without gaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((extent - 1) * stride for extent, stride in strides) == tensor.numel() - 1


def ordered_as(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, copied only if its elements do not lie in memory in the order of ``like``.

    ``like`` is dense.

    Raises:
        RuntimeError: The shapes differ.
    """
    if tensor.shape != like.shape:
        raise RuntimeError(
            f"expected a tensor of shape {list(like.shape)}, got {list(tensor.shape)}"
        )
    if tensor.stride() == like.stride():
        return tensor
    strides = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    if all(own == wanted for extent, own, wanted in strides if extent > 1):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def outer_channels_inner(tensor: Tensor) -> tuple[int, int, int]:
    """The extents of a dense tensor seen as [outer, channels, inner] in memory."""
    channels = tensor.shape[1]
    if is_channels_last(tensor):
        return tensor.numel() // channels, channels, 1
    inner = tensor[0, 0].numel()
    return tensor.shape[0], channels, inner


def convolution_fp32_precision() -> str:
    """``"tf32"`` or ``"ieee"``: torch's current switch for float32 convolutions.

    Read from the ``fp32_precision`` attributes; the older ``allow_tf32`` raises once a user
    has set the newer ones.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if convolutions.fp32_precision == "tf32" else "ieee"
