"""Bytes between columns against the paper's figure 2, and what the model of time must obey."""

import dataclasses
from collections import Counter
from collections.abc import Iterable

import pytest

from alexkern.models import PRESETS
from bench import work
from bench.record import Ceilings, Key
from bench.scaling import (
    ETHERNET,
    INFINIBAND,
    NVLINK,
    PCIE,
    Cluster,
    Layout,
    Link,
    Transfer,
    cpu_step,
    exchanges,
    gradients,
    measured_link,
    measured_share,
    predicted_step,
    step_time,
)
from tests.records import measurement, record

PAPER = PRESETS["paper"]
TWO, FOUR = Layout(columns=2), Layout(columns=4)
HYBRID = Layout(columns=2, hybrid=True)
NODE = Cluster(NVLINK)


def per_image(sent: Iterable[Transfer], source: int, direction: str = "forward") -> dict[str, int]:
    """Elements that one column sends, by the layer that needs them; of one image and one byte."""
    counted: Counter[str] = Counter()
    for transfer in sent:
        if (transfer.source, transfer.direction) == (source, direction):
            counted[transfer.layer] += transfer.bytes
    return dict(counted)


# Section 3.5 and figure 2 of the paper; a window of five maps reaches two of the other column.
BORDERS = {"conv1 norm": 2 * 55 * 55, "conv2 norm": 2 * 27 * 27}
CONNECTED = {"fc6": 6 * 6 * 128, "fc7": 2048}
FIGURE_2 = {**BORDERS, "conv3": 13 * 13 * 128, **CONNECTED}


def test_the_papers_columns_send_what_figure_2_shows() -> None:
    sent = exchanges(PAPER, TWO, 1, 1)
    assert per_image(sent, 0) == FIGURE_2
    assert per_image(sent, 1) == {**FIGURE_2, "fc8": 2048}
    assert per_image(sent, 0, "backward") == {**FIGURE_2, "fc8": 2048}
    assert per_image(sent, 1, "backward") == FIGURE_2


def test_bytes_of_the_papers_batch() -> None:
    """Column 1, forward: (21,632 + 4608 + 2 * 2048 + 2 * 3025 + 2 * 729) * 128 elements."""
    for item_bytes, expected in ((4, 19_376_128), (2, 9_688_064)):
        sent = exchanges(PAPER, TWO, 128, item_bytes)
        assert sum(t.bytes for t in sent if t[1:3] == ("forward", 1)) == expected


def test_what_travels_in_half_precision() -> None:
    """All but the maps that a normalisation needs."""
    whole, half = exchanges(PAPER, TWO, 8, 4), exchanges(PAPER, TWO, 8, 4, travelling_bytes=2)
    for before, after in zip(whole, half, strict=True):
        factor = 1 if before.layer.endswith("norm") else 2
        assert before == after._replace(bytes=factor * after.bytes)


@pytest.mark.parametrize(
    ("preset", "needed"),
    [
        # each column normalises its own maps in the 2012 source; ceilings change no size here
        ("krizhevsky2012", {"conv3": 13 * 13 * 128, **CONNECTED}),
        ("no_exchange", {}),
        ("exchange_conv4", {"conv4": 13 * 13 * 192, **CONNECTED}),
        (
            "exchange_all",
            {
                "conv2": 27 * 27 * 48,
                "conv3": 13 * 13 * 128,
                "conv4": 13 * 13 * 192,
                "conv5": 13 * 13 * 192,
                **CONNECTED,
            },
        ),
        ("conv6", {"conv3": 13 * 13 * 128, "conv6": 6 * 6 * 128, **CONNECTED}),
        ("minus_conv3", {"conv4": 13 * 13 * 128, **CONNECTED}),
        # normalises what it has pooled
        (
            "caffenet",
            {
                "conv1 norm": 2 * 27 * 27,
                "conv2 norm": 2 * 13 * 13,
                "conv3": 13 * 13 * 128,
                **CONNECTED,
            },
        ),
        (
            "owt",
            {
                "conv2": 27 * 27 * 32,
                "conv3": 13 * 13 * 96,
                "conv4": 13 * 13 * 192,
                "conv5": 13 * 13 * 128,
                **CONNECTED,
            },
        ),
    ],
)
def test_patterns_of_exchange(preset: str, needed: dict[str, int]) -> None:
    """What the first of two columns sends forward; fc8 is its own."""
    assert per_image(exchanges(PRESETS[preset], TWO, 1, 1), 0) == needed


def test_four_columns_border_only_on_their_neighbours() -> None:
    """A window of 4 maps reaches two to the left and one to the right."""
    norm = dataclasses.replace(PAPER.response_norm, size=4)
    preset = dataclasses.replace(PRESETS["owt"], response_norm=norm, steps=PAPER.steps)
    sent = [t for t in exchanges(preset, FOUR, 1, 1) if t.layer == "conv1 norm"]
    assert [(t.source, t.target, t.bytes // 55**2) for t in sent if t.direction == "forward"] == [
        *((1, 0, 1), (2, 1, 1), (3, 2, 1)),
        *((0, 1, 2), (1, 2, 2), (2, 3, 2)),
    ]
    (conv2,) = {t.bytes for t in exchanges(preset, FOUR, 1, 1) if t.layer == "conv2"}
    assert conv2 == 27 * 27 * 16


def test_the_hybrid_exchanges_what_fully_connected_layers_need() -> None:
    """Each of two processes sends its half of the rows of 9216 features."""
    sent = exchanges(PAPER, HYBRID, 2, 1)
    assert per_image(sent, 0) == {"fc6": 9216, "fc7": 2 * 2048}
    assert per_image(sent, 1) == {"fc6": 9216, "fc7": 2 * 2048, "fc8": 2 * 2048}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", [TWO, HYBRID, Layout(3, 2)])
def test_gradients_of_what_came_go_back(preset: str, layout: Layout) -> None:
    """What a column sends forward in all it receives backward, and the other way round."""
    sent = exchanges(PRESETS[preset], layout, 12, 4)
    for one, other in (("source", "target"), ("target", "source")):
        for column in range(layout.columns):
            forward, backward = (
                sum(t.bytes for t in sent if t.direction == way and getattr(t, end) == column)
                for way, end in (("forward", one), ("backward", other))
            )
            assert forward == backward


@pytest.mark.parametrize("preset", PRESETS)
def test_one_column_sends_nothing(preset: str) -> None:
    assert exchanges(PRESETS[preset], Layout(), 128, 4) == []
    assert exchanges(PRESETS[preset], Layout(data=4), 128, 4) == []
    assert {each.sent_bytes for each in gradients(PRESETS[preset], 1000, Layout())} == {0}


def test_shares_of_the_batch_send_their_own_rows() -> None:
    whole, half = (exchanges(PAPER, Layout(data, 2), 128, 2) for data in (1, 2))
    assert [t.bytes for t in whole] == [2 * t.bytes for t in half]


@pytest.mark.parametrize(
    ("preset", "layout", "batch", "message"),
    [
        ("paper", FOUR, 128, "conv2, of 2 groups and width 256, cannot be shared by 4 columns"),
        ("krizhevsky2012", FOUR, 128, "cannot be shared by 4 columns"),
        ("owt", Layout(columns=3), 128, "of 1 groups and width 4096, cannot be shared by 3"),
        ("paper", Layout(3, 2), 128, "a batch of 128 cannot be shared by 6 processes"),
        ("paper", Layout(1, 8, hybrid=True), 100, "a batch of 100 cannot be shared by 8"),
    ],
)
def test_what_cannot_be_shared(preset: str, layout: Layout, batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exchanges(PRESETS[preset], layout, batch, 4)


# weights and biases of the paper (section 3.5)
CONVOLUTIONS = 34_944 + 307_456 + 885_120 + 663_936 + 442_624
FC6_FC7, FC8 = 37_752_832 + 16_781_312, 4_097_000


@pytest.mark.parametrize(
    ("layout", "connected", "convolutions"),
    [
        # processes, ranks from one to the next, bytes
        (Layout(2), (2, 1, 4 * (FC6_FC7 + FC8)), (2, 1, 4 * CONVOLUTIONS)),
        (Layout(4, 2), (4, 2, 4 * (FC6_FC7 // 2 + FC8)), (4, 2, 2 * CONVOLUTIONS)),
        (
            Layout(2, 4, hybrid=True),
            (2, 4, 4 * (FC6_FC7 // 4 + FC8)),
            (8, 1, 4 * CONVOLUTIONS),
        ),
    ],
)
def test_gradients_are_summed_by_equals(
    layout: Layout, connected: tuple[int, int, int], convolutions: tuple[int, int, int]
) -> None:
    found = gradients(PAPER, 1000, layout)
    assert [each[1:] for each in found] == [connected, convolutions]
    sent = {2: 1, 4: 1.5, 8: 1.75}  # of its gradients, by each of so many in a ring
    assert [each.sent_bytes for each in found] == [sent[each[1]] * each.bytes for each in found]
    others = gradients(PAPER, 1000, layout, column=1)
    assert found[0].bytes - others[0].bytes == 4 * FC8
    assert found[1] == others[1]


def test_a_step_of_one_process_computes_only() -> None:
    """And takes as long as the roofline says of the whole network."""
    alone = predicted_step(Layout(), NODE, 128)
    assert (alone.exchange, alone.wait) == (0, 0)
    parts = work.network(128, 2, training=True, response_norm=True)
    ceilings = Ceilings(4.3e12, {"bf16": 790e12})
    floor = sum(part.floor_seconds(ceilings, "bf16") for part in parts)
    assert alone.total == pytest.approx(floor, rel=1e-12)
    slow = predicted_step(Layout(), NODE, 128, floor_share=0.5)
    assert slow.total == pytest.approx(2 * floor, rel=1e-12)


@pytest.mark.parametrize("layout", [TWO, HYBRID, Layout(2), Layout(2, 2)])
def test_slower_links_and_larger_batches_take_longer(layout: Layout) -> None:
    delayed = dataclasses.replace(NVLINK, latency=1e-3)
    fast, *slow = (
        predicted_step(layout, Cluster(link), 128).total for link in (NVLINK, PCIE, delayed)
    )
    assert fast < min(slow)
    batches = [predicted_step(layout, NODE, batch).total for batch in (128, 256, 1024)]
    assert batches == sorted(set(batches))


def test_a_column_computes_its_share() -> None:
    """Half of all but the crops, which both make, and fc8, which is the first's."""
    alone, half = (predicted_step(layout, NODE, 1024).compute for layout in (Layout(), TWO))
    assert alone / 2 < half < 0.52 * alone


def test_parts_of_a_step_add_up() -> None:
    """By hand, with a link of 1 byte and 100 calls per second."""
    link = Link("string", 1.0, 0.01)
    sent = [
        Transfer("fc8", "forward", 1, 0, 3),
        Transfer("fc8", "forward", 2, 0, 4),
        Transfer("fc8", "backward", 0, 1, 3),
        Transfer("fc8", "backward", 0, 2, 4),
    ]
    summed = gradients(PRESETS["mini"], 10, Layout(2, 3))
    connected, convolutions = (
        each._replace(processes=2, bytes=size) for each, size in zip(summed, (20, 6), strict=True)
    )
    # one call each way, and the column that sends or receives all of 7 bytes
    exchange = 2 * 0.01 + 7 + 7
    for hiding, wait in ((0.0, 20.01 + 6.01 + 0.01), (5.0, 15.01 + 6.02), (90.0, 6.02)):
        made = step_time(
            100.0, hiding, Layout(2, 3), sent, [connected, convolutions], Cluster(link)
        )
        assert made.exchange == pytest.approx(exchange)
        assert made.wait == pytest.approx(wait)
        assert made.total == pytest.approx(100 + exchange + wait)


def test_steps_on_a_cpu() -> None:
    """By hand: a step of 2 s and 10 ms for each image, and more processes than cores."""
    alone = {8: 2.08, 16: 2.16}
    link = measured_link({10: 0.5, 110: 1.5})
    assert (link.bytes_per_second, link.latency) == pytest.approx((100, 0.5))
    free = Link("wire", 1e30, 0.0)
    for layout, seconds in (
        (Layout(), 2.16),
        (TWO, 1 + 0.08),
        (Layout(data=2), 2 + 0.08),
        (Layout(2, 2), 2 * (1 + 0.04)),
    ):
        assert cpu_step(layout, 16, alone, free, cores=2).total == pytest.approx(seconds)
    assert cpu_step(TWO, 16, alone, link, cores=2).exchange > 6 * 2 * 0.5
    assert cpu_step(Layout(data=2), 16, alone, link, cores=2).wait > 3 * 0.5


def test_links_of_groups() -> None:
    """Processes of a group on one machine share its way out: one adapter each."""
    two_nodes = Cluster(NVLINK, INFINIBAND)
    assert two_nodes.link(8) == two_nodes.link(4, stride=2) == NVLINK
    whole, half = two_nodes.link(16), two_nodes.link(8, stride=2)
    assert whole.bytes_per_second == 370e9  # 8 * 47 is more
    assert half.bytes_per_second == 4 * 47e9
    assert whole.latency == half.latency == 30e-6
    assert two_nodes.link(2, stride=8) == INFINIBAND
    assert Cluster(NVLINK, ETHERNET).link(16).bytes_per_second == 12e9


def test_a_record_corrects_the_roofline() -> None:
    key = Key("network", "alexnet", "paper", "training", "bf16", 128, "alexkern")
    made = record(
        measurement(key=dataclasses.replace(key, variant="eager"), seconds=[9e-3]),
        measurement(key=key, seconds=[4e-3], floor_seconds=1e-3),
    )
    assert measured_share(made) == 0.25
    assert measured_share(record(measurement())) == measured_share(None) == 1


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_the_page_says_of_the_predictions(share: float) -> None:
    """docs/two-gpus.md: who is ahead where, whether GPUs reach the roofline or half its speed."""

    def rate(layout: Layout, batch: int, cluster: Cluster = NODE) -> float:
        return batch / predicted_step(layout, cluster, batch, floor_share=share).total

    data, pcie = Layout(2), Cluster(PCIE)
    for cluster in (NODE, pcie):
        assert rate(data, 128, cluster) < rate(TWO, 128, cluster) < rate(HYBRID, 128, cluster)
    assert rate(data, 128, pcie) < rate(Layout(), 128) < rate(TWO, 128, pcie)
    assert rate(TWO, 1024) < rate(data, 1024)
    assert rate(HYBRID, 1024) == pytest.approx(rate(data, 1024), rel=0.05)
    assert rate(TWO, 1024, pcie) < rate(data, 1024, pcie) < rate(HYBRID, 1024, pcie)
    eight = Layout(columns=8, hybrid=True)
    for batch in (128, 1024):
        assert rate(Layout(8), batch) < rate(Layout(4, 2), batch) < rate(eight, batch)
    assert rate(Layout(8), 128) < rate(data, 128)
    for machines in (2, 4):
        for layout in (Layout(4 * machines, 2), Layout(8 * machines), Layout(machines, 8, True)):
            assert rate(layout, 1024) < (1 if share == 1 else 1.25) * rate(eight, 1024)
            for batch in (128, 1024):
                assert rate(layout, batch, Cluster(NVLINK, ETHERNET)) < rate(Layout(), batch)
