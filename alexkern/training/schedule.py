"""Learning rate schedules: factors on the initial rate, as functions of the epochs done."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alexkern.training.errors import UsageError

# When the author lowered the rate by hand, in epochs of 90 (2012 code, layer-params-145).
_DROPS = (25 / 90, 51 / 90, 79 / 90)

# The paper lowered the rate three times.
_PLATEAUS = 3

# An error that falls by less than 0.1 percentage points has stopped improving.
_IMPROVEMENT = 0.001


class Schedule:
    """A factor on the initial learning rate.

    Args:
        factor: Of the epochs done, whole and part.
    """

    def __init__(self, factor: Callable[[float], float]) -> None:
        self._factor = factor

    def factor(self, epoch: float) -> float:
        """For a step, ``epoch`` epochs after the start."""
        return self._factor(epoch)

    def observe(self, error: float) -> None:
        """Hear of the held-out top-1 error at an epoch's end."""

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be gained by going on."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to continue: numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""


@dataclass
class Plateau(Schedule):
    """The paper's heuristic (section 5), automated.

    The rate is divided by 10 when the held-out error has stopped improving at the current one,
    three times; when it stops a fourth time the run is finished.

    Attributes:
        patience: So many epochs without a new lowest error are a plateau.
        best: Lowest error so far.
        waited: Epochs since.
        plateaus: How often the error stopped improving.
    """

    patience: int
    best: float = math.inf
    waited: int = 0
    plateaus: int = 0

    def factor(self, epoch: float) -> float:
        """The same for all steps between two evaluations."""
        return float(0.1 ** min(self.plateaus, _PLATEAUS))

    def observe(self, error: float) -> None:
        """Count the epochs without improvement."""
        improved = error < self.best - _IMPROVEMENT
        self.best = min(self.best, error)
        self.waited = 0 if improved else self.waited + 1
        if self.waited >= self.patience:  # beyond, if it was lowered since
            self.waited, self.plateaus = 0, self.plateaus + 1

    @property
    def finished(self) -> bool:
        """After the plateau that follows the third reduction."""
        return self.plateaus > _PLATEAUS

    def state_dict(self) -> dict[str, Any]:
        """Numbers."""
        return {"best": self.best, "waited": self.waited, "plateaus": self.plateaus}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; the state of another schedule is nothing to go by."""
        self.best = state.get("best", self.best)
        self.waited = state.get("waited", self.waited)
        self.plateaus = state.get("plateaus", self.plateaus)


def make_schedule(text: str, epochs: int) -> Schedule:
    """A schedule from its name and numbers.

    - ``"fixed:25,51,79"``: divided by 10 at the start of those epochs. ``"fixed"``: at 25, 51 and
      79 of 90, or those shares of another length, as in the 2012 code's run 145.
    - ``"plateau:5"``: see :class:`Plateau`. ``"plateau"``: a patience of 5 epochs.
    - ``"dexp:250,4"``: 4 levels of equal length that fall exponentially, the last by 250
      (cuda-convnet2's ``dexp[base;tgtFactor;numSteps]``). ``"dexp"``: these numbers.
    - ``"constant"``: 1.
    - ``"step:20"``: divided by 10 every 20 epochs (Caffe's ``lr_policy: "step"``).

    Args:
        text: As above.
        epochs: Length of the run.

    Raises:
        UsageError: Not of this form.
    """
    kind, _, rest = text.partition(":")
    try:
        numbers = [float(number) for number in rest.split(",")] if rest else []
        if any(not 0 < number < math.inf for number in numbers):
            raise ValueError
        return _KINDS[kind](epochs, *numbers)
    except (KeyError, ValueError, TypeError):
        raise UsageError(
            f"no learning rate schedule {text!r}: fixed[:EPOCH,...], plateau[:PATIENCE], "
            "dexp[:FACTOR,LEVELS], step:EPOCHS or constant, with positive numbers"
        ) from None


def _fixed(epochs: int, *drops: float) -> Schedule:
    at = drops or [epochs * drop for drop in _DROPS]
    return Schedule(lambda epoch: 0.1 ** sum(epoch >= drop for drop in at))


def _plateau(_: int, patience: float = 5) -> Schedule:
    return Plateau(_whole(patience))


def _dexp(epochs: int, factor: float = 250, levels: float = 4) -> Schedule:
    if _whole(levels) < 2:
        raise ValueError
    return Schedule(
        lambda epoch: factor ** -(min(epoch * levels // epochs, levels - 1) / (levels - 1))
    )


def _step(_: int, length: float) -> Schedule:
    return Schedule(lambda epoch: 0.1 ** (epoch // length))


def _constant(_: int) -> Schedule:
    return Schedule(lambda _: 1.0)


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError
    return int(number)


_KINDS: dict[str, Callable[..., Schedule]] = {
    "constant": _constant,
    "fixed": _fixed,
    "plateau": _plateau,
    "dexp": _dexp,
    "step": _step,
}
