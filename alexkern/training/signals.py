"""SIGTERM and Ctrl-C: the first asks a run to stop, the second ends it."""

import os
import signal
from types import FrameType, TracebackType

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While this context is open, a first signal is only noted.

    A second one ends the process at once, as if nobody handled it.

    Attributes:
        received: Name of the first signal; empty if there was none.
    """

    def __init__(self) -> None:
        self.received = ""

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
        self.received = signal.Signals(number).name
        for each in _STOPPING:
            signal.signal(each, signal.SIG_DFL)  # no wait for Python, which may be in a long call
        # print() may be what was interrupted
        os.write(2, f"{self.received}: saving a checkpoint; once more to end at once\n".encode())
