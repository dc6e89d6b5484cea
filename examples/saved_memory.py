"""What PyTorch's ops and ours keep for backward, in bytes per byte of input.

    python examples/saved_memory.py

Without a GPU the kernels run in Triton's interpreter.
"""

import os
from collections.abc import Callable

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch.nn.functional as F
from torch import Tensor

import alexkern
import alexkern.ops as ops


def saved_bytes(function: Callable[[Tensor], Tensor], input: Tensor) -> int:
    """Memory that autograd holds on to between forward and backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(input)
    del output
    return sum(kept.values())


def main() -> None:
    """Print a line per op."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    input = torch.randn(2, 32, 13, 13, device=device, requires_grad=True)
    calls: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "local_response_norm": (
            lambda x: F.local_response_norm(x, 5),
            lambda x: ops.local_response_norm(x, 5),
        ),
        "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2), lambda x: ops.max_pool2d(x, 3, 2)),
        "dropout": (lambda x: F.dropout(x), lambda x: ops.dropout(x)),
        "both, in one pass": (
            lambda x: F.max_pool2d(F.local_response_norm(x, 5), 3, 2),
            lambda x: ops.lrn_max_pool2d(x, 5, 3, 2),
        ),
    }
    size = input.numel() * input.element_size()
    print(f"{'':20} {'PyTorch':>8} {'alexkern':>9}")
    with alexkern.use_backend("triton"):
        for name, (theirs, ours) in calls.items():
            ratios = saved_bytes(theirs, input) / size, saved_bytes(ours, input) / size
            print(f"{name:20} {ratios[0]:8.2f} {ratios[1]:9.2f}")
            assert ratios[1] < ratios[0]


if __name__ == "__main__":
    main()
