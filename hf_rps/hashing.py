"""Integer hashing: from a seed and a name to row signs, rotations and slots, the same on every platform.

The mapping of a checkpoint is never stored; it is recomputed from the seed. So the hash is fixed here, in plain
integer arithmetic, and is part of the checkpoint format: golden integers in ``tests/core/test_hashing.py`` guard it.

Names are hashed with BLAKE2b (RFC 7693) and counters with the SplitMix64 finaliser (Steele, Lea and Flood, 'Fast
splittable pseudorandom number generators', OOPSLA 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def stream_key(seed: int, *labels: str) -> int:
    """Return the 64-bit key of the random stream that belongs to ``seed`` and ``labels``.

    >>> stream_key(0, "shift") == stream_key(0, "shift") != stream_key(1, "shift")
    True
    """
    text = "\x1f".join([str(int(seed)), *labels]).encode("utf-8")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def hash_int(key: int, counter: int) -> int:
    """Hash one counter: the ``counter``-th 64-bit integer of stream ``key``, in [0, 2**64)."""
    z = (key + (counter + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def hash_range(key: int, start: int, stop: int) -> np.ndarray:
    """Hash the counters ``start … stop - 1`` at once: a uint64 array, element by element equal to :func:`hash_int`."""
    counters = np.arange(start + 1, stop + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(key) + counters * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))


def hash_signs(key: int, count: int) -> np.ndarray:
    """The first ``count`` signs of stream ``key``: an int8 array of +1 and -1, the top bit of each hash."""
    return 1 - 2 * (hash_range(key, 0, count) >> np.uint64(63)).astype(np.int8)
