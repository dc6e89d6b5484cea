"""Train with automatic mixed precision, as any other model.

    python examples/train_amp.py

On a GPU float16 with gradient scaling; on a CPU bfloat16, which needs none.
"""

import torch
import torch.nn.functional as F
from torch import nn

from alexkern.nn import Conv2dBiasReLU, LinearBiasReLUDropout, LRNMaxPool2d


def main() -> None:
    """Learn to tell in which quarter of an image a bright square lies."""
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model = nn.Sequential(
        Conv2dBiasReLU(3, 16, 5, stride=2, padding=2),
        LRNMaxPool2d(5, kernel_size=3, stride=2),
        nn.Flatten(),
        LinearBiasReLUDropout(16 * 7 * 7, 64, p=0.2),
        nn.Linear(64, 4),
    ).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=gpu)
    for step in range(60):
        labels = torch.randint(4, (32,), device=device)
        images = torch.randn(32, 3, 32, 32, device=device)
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = 16 * (label // 2), 16 * (label % 2)
            image[:, row : row + 16, column : column + 16] += 1
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.float16 if gpu else torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    assert loss.item() < 0.5


if __name__ == "__main__":
    main()
