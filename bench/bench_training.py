"""A training step of the paper's network: forward, loss, backward, update."""

import pytest

from bench.conftest import Compare
from bench.lab import Lab, Variant
from bench.ladder import NETWORKS, TRAINING, Ladder
from bench.record import Key
from bench.work import Work, network

# max-autotune takes minutes to compile: once
CASES = [
    (layer, rung)
    for layer in NETWORKS
    for rung in TRAINING
    if (layer, rung) != ("no_lrn", "compile_max_autotune")
]


@pytest.mark.parametrize(("layer", "variant"), CASES)
def test_training(compare: Compare, lab: Lab, layer: str, batch: int, variant: str) -> None:
    def make() -> tuple[list[Work], dict[str, Variant]]:
        normalised = layer == "paper"
        parts = network(batch, 2, training=True, response_norm=normalised)
        return parts, Ladder(layer, True, batch, lab).variants()

    compare(Key("network", "alexnet", layer, "training", "bf16", batch, ""), make)
