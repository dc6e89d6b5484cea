"""An op in a plain CNN: swap the module that a function comes from.

    python examples/plain_cnn.py

On a GPU the kernels run; on a CPU plain PyTorch does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alexkern.ops as ops


class PlainCNN(nn.Module):
    """Convolution, ReLU, normalisation, pooling and a classifier."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        self.ours = ours
        self.conv = nn.Conv2d(3, 32, 5, padding=2)
        self.classifier = nn.Linear(32 * 15 * 15, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of [N, 3, 32, 32]."""
        if self.ours:
            x = ops.conv2d_bias_relu(images, self.conv.weight, self.conv.bias, padding=2)
            x = ops.lrn_max_pool2d(x, 5, 3, 2, alpha=1e-4, k=2.0)
        else:
            x = F.relu(self.conv(images))
            x = F.max_pool2d(F.local_response_norm(x, 5, alpha=1e-4, k=2.0), 3, 2)
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


def main() -> None:
    """Compare logits and gradients of the two."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    theirs, ours = PlainCNN(ours=False).to(device), PlainCNN(ours=True).to(device)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(16, 3, 32, 32, device=device)
    for model in (theirs, ours):
        model(images).square().sum().backward()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-3)
    for name, parameter in ours.named_parameters():
        reference = theirs.get_parameter(name).grad
        assert parameter.grad is not None
        assert reference is not None
        difference = (parameter.grad - reference).norm() / reference.norm()
        print(f"{name:20} gradient differs by {difference.item():.1e} of its norm")
        assert difference < 1e-3


if __name__ == "__main__":
    main()
