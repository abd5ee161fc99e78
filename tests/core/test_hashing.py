"""The hash is part of the checkpoint format: these integers must never change."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hf_rps.hashing import hash_int, hash_range, hash_signs, stream_key


def test_golden_integers():
    assert stream_key(0, "fold", "") == 9133681998519998900
    assert stream_key(-5, "sign", "encoder.layer.0.attention.output.dense") == 7692252301849656179
    assert [hash_int(0, i) for i in range(3)] == [16294208416658607535, 7960286522194355700, 487617019471545679]
    assert hash_int(2**64 - 1, 10**12) == 16091484694707276405
    assert hash_signs(stream_key(0, "sign", "q"), 16).tolist() == [1, 1, -1, -1, 1, 1, -1, 1, 1, 1, 1, -1, -1, 1, 1, 1]


def test_splitmix64_reference():
    # the published first output of SplitMix64 with seed 0 (Vigna's splitmix64.c)
    assert hash_int(0, 0) == 0xE220A8397B1DCDAF


@given(key=st.integers(0, 2**64 - 1), start=st.integers(0, 2**40), count=st.integers(0, 50))
def test_range_equals_single_hashes(key, start, count):
    assert hash_range(key, start, start + count).tolist() == [hash_int(key, start + i) for i in range(count)]


def test_signs_are_balanced_and_streams_differ():
    one, other = (hash_signs(stream_key(seed, "sign", "x"), 10_000).astype(int) for seed in (0, 1))
    assert set(one.tolist()) == {-1, 1}
    assert abs(one.mean()) < 0.05
    assert abs(np.mean(one * other)) < 0.05
