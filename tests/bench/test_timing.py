"""The timing loop: what it counts, in which order, and what a GPU would be asked for."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from alexkern.runtime import timing
from alexkern.runtime.timing import Program, operand_sets, sample
from bench import compare, machine, report

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class FakeGPU:
    """Stands in for torch.cuda: work advances a device clock, in the order it was queued."""

    def __init__(self) -> None:
        self.now, self.captured, self.cleared = 0.0, [], 0
        self.capturing: list[Any] | None = None
        self.capture_fails = False
        outer = self

        class CUDAGraph:
            work: list[Any]

            def replay(self) -> None:
                for call in self.work:
                    call()

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = outer.now

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)  # milliseconds

        self.CUDAGraph, self.Event = CUDAGraph, Event

    @contextmanager
    def graph(self, graph: Any, stream: Any) -> Any:
        assert stream == "side stream"
        if self.capture_fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        assert self.cleared == 2 * len(self.captured) + 1
        self.capturing = graph.work = []
        yield
        self.capturing = None
        self.captured.append(graph)

    def current_stream(self) -> str:
        return "side stream"

    def synchronize(self) -> None:
        pass

    def clear(self) -> None:
        """Of cuBLAS's workspaces: before and after each capture."""
        self.cleared += 1

    def kernel(self, seconds: float) -> Any:
        """A call that takes so long on the device."""

        def run() -> None:
            self.now += seconds

        def call() -> float:
            if self.capturing is not None:
                self.capturing.append(run)
            else:
                run()
            return seconds

        return call


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    fake = FakeGPU()
    for name in ("CUDAGraph", "Event", "graph", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", fake.clear, raising=False)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: fake.now)
    return fake


def test_calls_are_repeated_until_a_sample_is_long_enough(gpu: FakeGPU) -> None:
    program = Program([gpu.kernel(5e-6), gpu.kernel(5e-6)], GPU)
    assert program.timing == "graph"
    assert program.length == 400  # 2 ms of 5 us
    assert [len(graph.work) for graph in gpu.captured] == [2, 400]
    assert Program([gpu.kernel(0.5)], GPU).length == 1


def test_samples_are_seconds_per_call(gpu: FakeGPU) -> None:
    programs = {"fast": Program([gpu.kernel(1e-5)], GPU), "slow": Program([gpu.kernel(3e-3)], GPU)}
    seconds = sample(programs, GPU, rounds=7)
    assert seconds["fast"] == pytest.approx([1e-5] * 7)
    assert seconds["slow"] == pytest.approx([3e-3] * 7)


def test_calls_that_cannot_be_captured_are_refused(gpu: FakeGPU) -> None:
    gpu.capture_fails = True
    with pytest.raises(RuntimeError, match="not permitted"):
        Program([gpu.kernel(1e-5)], GPU)


def test_launches_last_longer_than_graphs(gpu: FakeGPU) -> None:
    """Of a GPU that waits for them the host has to win a lead first."""
    program = Program([gpu.kernel(1e-5)], GPU, graph=False)
    assert program.timing == "launches"
    assert program.length == 2000
    assert sample({"": program}, GPU, rounds=3)[""] == pytest.approx([1e-5] * 3)
    assert not gpu.captured


def test_a_round_starts_on_a_busy_gpu(gpu: FakeGPU) -> None:
    """Its first graph runs once before its time is taken."""
    programs = {name: Program([gpu.kernel(2e-3)], GPU) for name in "ab"}
    before = gpu.now
    timing._one_round(programs, "ab", GPU)
    assert gpu.now - before == pytest.approx(3 * 2e-3)


def test_results_of_a_round_of_calls_stay_alive() -> None:
    """So that no call writes where the one before did."""
    program = Program([lambda: torch.zeros(3), lambda: torch.ones(3)], CPU)
    program.run()
    assert [float(result.sum()) for result in program._results] == [0.0, 3.0]
    assert program.result is program._results[0]


def test_every_set_of_operands_is_used_in_turn() -> None:
    used: list[int] = []
    program = Program([lambda i=i: used.append(i) or i for i in range(3)], CPU)
    used.clear()
    program.run()
    assert used == [0, 1, 2]
    assert program.result == 0


def test_variants_take_turns_and_each_goes_first() -> None:
    order: list[str] = []
    programs = {name: Program([lambda name=name: order.append(name)], CPU) for name in "abc"}
    order.clear()
    sample(programs, CPU, rounds=3)
    assert "".join(order) == "abcbcacab"


def test_the_page_s_figures() -> None:
    """Those of docs/benchmarks.md."""
    text = " ".join((report.ROOT / "docs" / "benchmarks.md").read_text("utf-8").split())
    graph, launches = (1e3 * timing._SAMPLE_SECONDS[kind] for kind in ("graph", "launches"))
    assert f"{timing.ROUNDS} samples** of {graph:.0f} ms each, {launches:.0f} ms of" in text
    assert f"after {timing._WARM_SECONDS} s that let the clocks settle" in text
    assert f"a copy of {machine._COPY_BYTES >> 30} GiB" in text
    assert f"{machine._MATMUL_SIZE}x{machine._MATMUL_SIZE} matrices" in text
    assert f"differ by more than {100 * compare._NOISE:.0f} %" in text


def test_no_programs_no_samples() -> None:
    assert sample({}, CPU, rounds=2) == {}


def test_operand_sets_fill_the_cache_four_times() -> None:
    assert operand_sets(10**9, 60 * 10**6) == 1
    assert operand_sets(60 * 10**6, 60 * 10**6) == 4
    assert operand_sets(10**6, 60 * 10**6) == 240
    assert operand_sets(0, 0) == 1


def test_time_goes_on_while_clocks_settle(gpu: FakeGPU) -> None:
    program = Program([gpu.kernel(1e-2)], GPU)
    before = gpu.now
    sample({"": program}, GPU, rounds=1)
    assert gpu.now - before == pytest.approx(0.2 + 2e-2, abs=1.1e-2)
