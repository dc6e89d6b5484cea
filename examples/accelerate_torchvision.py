"""Put the ops into a model of torchvision, see what was done, and take them out again."""

import torch
import torchvision

import alexkern

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = torchvision.models.squeezenet1_1().to(device, memory_format=torch.channels_last).eval()
images = torch.randn(4, 3, 224, 224, device=device).to(memory_format=torch.channels_last)

with torch.no_grad():
    before = model(images)
    print(alexkern.accelerate(model))
    after = model(images)
error = (after - before).abs().max() / before.abs().max()
print(f"largest difference of the logits, relative to the largest: {error:.1e}")

alexkern.restore(model)
print("restored:", type(model.features[0]).__name__)
