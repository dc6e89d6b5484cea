"""SIGTERM and Ctrl-C: the first asks a run to stop, the second ends it."""

import os
import signal
import time
from types import FrameType, TracebackType

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While this context is open, a first signal is only noted.

    A second one ends the process at once, as if nobody handled it.

    Args:
        echo_seconds: So soon after the first, another does not count. Where a scheduler signals
            every process, those that torchrun started get its copy too.

    Attributes:
        received: Name of the first signal; empty if there was none.
    """

    def __init__(self, echo_seconds: float = 0.0) -> None:
        self.received = ""
        self._echo_seconds = echo_seconds
        self._time = 0.0

    def __bool__(self) -> bool:
        return bool(self.received)

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in _STOPPING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._time > self._echo_seconds:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._time = time.monotonic()  # first: its echo may interrupt this
        self.received = signal.Signals(number).name
        if not self._echo_seconds:
            for each in _STOPPING:
                signal.signal(each, signal.SIG_DFL)  # no wait for Python, maybe in a long call
        # print() may be what was interrupted
        os.write(2, f"{self.received}: saving a checkpoint; once more to end at once\n".encode())
