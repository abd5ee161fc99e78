"""Random sequences of operations: after each one the model equals its dense twin, or there was a clear error.

What is done is in tests/support/sequences, what is compared in its ``world``. A failure names the shortest sequence
that fails in the same way; ``Sequence(...).run(folder)``, as it is printed, does it again.
"""

import re

import pytest
import torch
from sequences.runner import OPERATIONS, Sequence
from transformers import PreTrainedModel

from hf_rps.conversion import find_banks
from hf_rps.freezing import FrozenParts
from hf_rps.layers import stand_in
from hf_rps.layers.base import RPSLayer
from hf_rps.psi.divisor import Divisor


def check(seeds, folder):
    for seed in seeds:
        sequence = Sequence.drawn(seed)
        failure = sequence.failure(folder / "work")
        if failure is not None:
            pytest.fail(f"seed {seed}: {failure}\nshortest: {sequence.shortest(folder / 'work')!r}", pytrace=False)


@pytest.mark.parametrize("first", [0, 30])
def test_sequences(tmp_path, first):
    check(range(first, first + 30), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 250))
def test_many_sequences(tmp_path, first):
    check(range(first, first + 250), tmp_path)


# ---- that it finds what is wrong


def lossy_loading(patch):
    load = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        found = load(cls, *args, **kwargs)
        for bank in find_banks(found[0]):
            bank.psi.data.mul_(1 + 1e-6)
        return found

    patch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))


def frozen_parts_unnoticed(patch):
    patch.setattr(FrozenParts, "__call__", lambda self, module: None)


def gradient_by_another_divisor(patch):
    patch.setattr(Divisor, "divide_", lambda self, gradient: gradient.div_(2.0))


def lost_writes(patch):
    patch.setattr(stand_in, "_refuse_writes", lambda *args: None)


def dtypes_that_stay(patch):
    patch.setattr(RPSLayer, "_apply", torch.nn.Module._apply)


SABOTAGES = {
    lossy_loading: "psi of bank 0",
    frozen_parts_unnoticed: "nothing was said",
    gradient_by_another_divisor: "psi's gradient differs",
    lost_writes: "was accepted|was not refused",
    dtypes_that_stay: "float",
}
WITHIN = 200  # sequences


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.__name__)
def test_defects_are_found(tmp_path, monkeypatch, sabotage):
    sabotage(monkeypatch)
    failures = (Sequence.drawn(seed).failure(tmp_path / "work") or "" for seed in range(1000, 1000 + WITHIN))
    assert any(re.search(SABOTAGES[sabotage], failure) for failure in failures)


def test_every_operation_is_drawn():
    drawn = {name for seed in range(1000, 1100) for name, _ in Sequence.drawn(seed).steps}
    assert drawn == OPERATIONS.keys()
