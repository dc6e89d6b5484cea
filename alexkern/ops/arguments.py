"""Argument checks that several ops share."""

from collections.abc import Sequence


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """(height, width) of an argument given as one int or as a sequence of one or two.

    Raises:
        TypeError: neither an int nor a sequence of ints.
        RuntimeError: another number of elements.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(element, int) for element in values):
        raise TypeError(f"{name} must be an int or a tuple of ints, got {value!r}")
    if len(values) not in (1, 2):
        raise RuntimeError(f"{name} must be one int or a tuple of two ints, got {value!r}")
    return values[0], values[-1]
