"""Compile a model that contains the ops: one graph, each pass one node in it.

    python examples/compile_model.py

Without a GPU the kernels run in Triton's interpreter, and the graph runs as it was traced.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import alexkern
from alexkern.models import alexnet


def main() -> None:
    """Compare the compiled network with the eager one, for two batch sizes."""
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model = alexnet("mini", num_classes=10).to(device).eval()
    compiler = "inductor" if gpu else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
    with alexkern.use_backend("triton"), torch.no_grad():
        for batch in (4, 3):
            images = torch.randn(batch, 3, 32, 32, device=device)
            difference = (compiled(images) - model(images)).abs().max().item()
            print(f"batch of {batch}: compiled and eager logits differ by {difference:.1e}")
            assert difference < 1e-4
        images = (torch.randn(4, 3, 32, 32, device=device),)
        program = torch.export.export(model, images)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    print("exported:", ", ".join(name for name in operators if name.startswith("alexkern.")))


if __name__ == "__main__":
    main()
