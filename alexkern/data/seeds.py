"""Random numbers as pure functions of what they are for."""

import zlib

import numpy as np


def derive_seed(*keys: int | str) -> int:
    """A seed from any sequence of keys: equal keys, equal seed; unequal keys, unrelated seeds.

    Args:
        keys: Names and integers in [0, 2**63), such as ``(run_seed, "dropout", step, layer)``.

    Returns:
        An integer in [0, 2**63): fits an int64 tensor and ``torch.manual_seed``.
    """
    # The count of keys first: SeedSequence takes [1] and [1, 0] for the same entropy.
    # Bit 63 keeps names apart from integers.
    words = [len(keys)]
    for key in keys:
        value = zlib.crc32(key.encode()) | 1 << 63 if isinstance(key, str) else key
        words += [value & 0xFFFFFFFF, value >> 32]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*keys: int | str) -> np.random.Generator:
    """A numpy generator (Philox), seeded by :func:`derive_seed` of the keys."""
    return np.random.Generator(np.random.Philox(derive_seed(*keys)))
