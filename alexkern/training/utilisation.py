"""Which share of a GPU's peak the network's arithmetic takes."""

import torch
from torch.utils.flop_counter import FlopCounterMode

import alexkern
from alexkern.models import AlexNet, Preset

# Dense products of 16-bit numbers per second, NVIDIA's data sheets of the SXM modules.
_PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def training_flops(preset: Preset, num_classes: int) -> int:
    """Floating-point operations of the products of one image's training step.

    Forward, weight gradients and input gradients cost the same; the image needs no gradient.
    """
    with torch.device("meta"), alexkern.use_backend("torch"):
        model = AlexNet(preset, num_classes).eval()
        image = torch.empty(1, 3, preset.crop_size, preset.crop_size)
        with FlopCounterMode(display=False) as whole, torch.no_grad():
            model(image)
        left, right, top, bottom = preset.conv1_padding
        padded = torch.nn.functional.pad(image, (left, right, top, bottom))
        with FlopCounterMode(display=False) as first, torch.no_grad():
            model.conv1(padded)
    flops: int = 3 * whole.get_total_flops() - first.get_total_flops()
    return flops


class Utilisation:
    """Model-FLOP utilisation, where the GPU's peak is known.

    Args:
        preset: The network.
        num_classes: Its outputs.
        amp: As in the options; there is none for float32.
        device: Where it trains.
        count: Of such devices.
    """

    def __init__(
        self, preset: Preset, num_classes: int, amp: str, device: torch.device, count: int = 1
    ) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peaks = [peak for gpu, peak in _PEAK_FLOPS.items() if gpu in name]
        self._seconds = 0.0  # of one image, at the peak
        if peaks and amp != "off":
            self._seconds = training_flops(preset, num_classes) / (peaks[0] * count)

    def of(self, images_per_second: float) -> str:
        """For the log; empty where no peak is known."""
        if not self._seconds:
            return ""
        return f" ({images_per_second * self._seconds:.1%} of the peak FLOP/s)"
