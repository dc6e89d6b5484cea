"""A training step of the paper's network, from stored crops to new weights."""

import pytest

from bench.conftest import Compare
from bench.lab import Lab, Variant
from bench.ladder import NETWORKS, TRAINING, Ladder
from bench.layers import BATCH
from bench.record import Key
from bench.work import Work, network

# max-autotune takes minutes to compile; of large batches only who is compared in the end
LARGE = 1024
CASES = [
    *((layer, BATCH, rung) for layer in NETWORKS for rung in TRAINING),
    *(("paper", LARGE, rung) for rung in ("eager", "compile_max_autotune", "alexkern_graph")),
]


@pytest.mark.parametrize(("layer", "batch", "variant"), CASES)
def test_training(compare: Compare, lab: Lab, layer: str, batch: int, variant: str) -> None:
    batch = batch // 64 if lab.trial else batch

    def make() -> tuple[list[Work], dict[str, Variant]]:
        normalised = layer == "paper"
        parts = network(batch, 2, training=True, response_norm=normalised)
        return parts, Ladder(layer, True, batch, lab).variants()

    compare(Key("network", "alexnet", layer, "training", "bf16", batch, ""), make)
