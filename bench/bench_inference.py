"""Inference with the paper's network."""

from bench.conftest import Compare
from bench.lab import Lab, Variant
from bench.ladder import INFERENCE, Ladder
from bench.record import Key
from bench.work import Work, network

FULL_VARIANTS = ("compile_max_autotune",)
VARIANTS = tuple(name for name in INFERENCE if name not in FULL_VARIANTS)


def test_inference(compare: Compare, lab: Lab, batch: int) -> None:
    def make() -> tuple[list[Work], dict[str, Variant]]:
        parts = network(batch, 2, training=False, response_norm=True)
        return parts, Ladder("paper", False, batch, lab).variants()

    compare(Key("network", "alexnet", "paper", "inference", "bf16", batch, ""), make)
