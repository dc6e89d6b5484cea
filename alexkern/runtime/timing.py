"""The one timing loop: variants interleaved, every call on its own operands, CUDA graphs.

A :class:`Program` is a variant's calls made ready to run as one piece. :func:`sample` runs several
programs in turn, so that whatever drifts (clocks, temperature, other load) meets all of them.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# A sample lasts at least this long, so that what surrounds it stays below one percent of it: of a
# graph an event's resolution of half a microsecond, of launches the lead that the host has to
# win first from a GPU that waits for it.
_SAMPLE_SECONDS = {"graph": 2e-3, "launches": 20e-3}
# Clocks settle before the first sample.
_WARM_SECONDS = 0.2
ROUNDS = 40

Call = Callable[[], Any]


class Program:
    """The calls of one variant, repeated until they last long enough to be timed.

    On a GPU they are captured in a CUDA graph, whose replays have no host in them. The results of
    one round of the calls stay alive, so that the next call does not write where the last one did,
    in the cache. Built and run inside :func:`side_stream`.

    Args:
        calls: One per set of operands; each does the same work.
        device: Where they run.
        graph: Whether to capture; False for a variant whose launches are part of its time.

    Attributes:
        length: Calls per run.
        timing: ``"graph"`` or ``"launches"``.

    Raises:
        Exception: What a call raises, or RuntimeError if the calls cannot be captured.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device, graph: bool = True) -> None:
        self._calls, self._results = calls, [None] * len(calls)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.length = len(calls)
        graph = graph and device.type == "cuda"
        self.timing = "graph" if graph else "launches"
        self._run_calls()  # compiles, and lets libraries choose their algorithms
        if graph:
            self._capture()
        if device.type == "cuda":
            passes = round(_SAMPLE_SECONDS[self.timing] / self._seconds())
            if passes > 1:
                self.length *= passes
                if graph:
                    self._capture()

    @property
    def result(self) -> Any:
        """What the first call, or its last repetition, gave in the last run."""
        return self._results[0]

    def run(self) -> None:
        """All calls, ``length`` of them."""
        if self._graph:
            self._graph.replay()
        else:
            self._run_calls()

    def _run_calls(self) -> None:
        for index in range(self.length):
            index %= len(self._calls)
            self._results[index] = self._calls[index]()

    def _seconds(self) -> float:
        """Of the second of two runs."""
        self.run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.run()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def _capture(self) -> None:
        self._graph = None  # and its memory
        self._graph = captured(self._run_calls)


def captured(work: Call) -> torch.cuda.CUDAGraph:
    """The work as a CUDA graph of the current stream.

    The graph owns cuBLAS's workspace: another one may be freed by whoever captures next
    (max-autotune's graphs do), and replays would write to it all the same.
    """
    graph = torch.cuda.CUDAGraph()
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        work()
    torch._C._cuda_clearCublasWorkspaces()
    return graph


def sample(
    programs: Mapping[str, Program], device: torch.device, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds per call of each program, ``rounds`` samples of each, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    end_of_warm_up = time.perf_counter() + (_WARM_SECONDS if device.type == "cuda" else 0.0)
    while time.perf_counter() < end_of_warm_up:
        for program in programs.values():
            program.run()
        torch.cuda.synchronize()
    for turn in range(rounds):
        first = turn % max(len(names), 1)
        for name, elapsed in _one_round(programs, names[first:] + names[:first], device):
            seconds[name].append(elapsed / programs[name].length)
    return seconds


def _one_round(
    programs: Mapping[str, Program], order: Sequence[str], device: torch.device
) -> list[tuple[str, float]]:
    if device.type != "cuda":
        return [(name, _host_seconds(programs[name].run)) for name in order]
    events = []
    idle = True
    for name in order:
        if programs[name].timing == "launches":
            torch.cuda.synchronize()  # the work queued before would hide its launches
        elif idle:
            programs[name].run()  # or the first event would wait for the graph's launch
        idle = False
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        programs[name].run()
        end.record()
        events.append((name, begin, end))
    torch.cuda.synchronize()
    return [(name, begin.elapsed_time(end) / 1e3) for name, begin, end in events]


def _host_seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a stream of its own.

    Autograd runs a backward on the stream of its forward, and no graph can be captured on the
    default stream.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize(device)


def operand_sets(bytes_per_call: int, l2_bytes: int) -> int:
    """How many sets of operands to rotate so that each call finds a cold L2 cache.

    Between two uses of a set, four times the cache passes through it, results included.
    """
    return max(1, -(-4 * l2_bytes // max(bytes_per_call, 1)))
