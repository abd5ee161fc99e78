"""Lottery tickets: the rounds' densities, masks that only shrink, and an early state restored exactly."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from studies.methods.lottery_ticket import densities, global_magnitude_masks, rewind
from studies.methods.masks import apply_masks, masks_of, remove_pruning


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 2))


def train(model, steps=3):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 1, 3, 3, generator=generator)).square().sum().backward()
        optimizer.step()


@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=6), st.floats(0.01, 0.9))
def test_densities(compressions, rate):
    falling = densities(compressions, rate)
    wanted = {1 / c for c in compressions} - {1.0}
    assert wanted <= set(falling)
    assert (falling[-1] == min(wanted)) if wanted else falling == []
    for above, below in zip([1.0, *falling], falling, strict=False):
        assert below < above
        assert below >= (1 - rate) * above * (1 - 1e-8) or below in wanted  # no round removes more than the rate
        assert math.isclose(below, (1 - rate) * above, rel_tol=1e-8) or below in wanted


def test_densities_of_the_paper():
    assert densities([1.25, 1.5625]) == [0.8, 0.64]  # 0.8 · 0.8 in floats is above 0.64, and no round of its own
    assert densities([1]) == []
    assert len(densities([10])) == 11  # 0.8¹⁰ = 0.107


@pytest.mark.parametrize("compressions", [[], [0.5], [math.inf], [math.nan]])
def test_compressions_that_are_refused(compressions):
    with pytest.raises(ValueError, match=r"compressions=.* is not valid; expected finite numbers, 1 or more"):
        densities(compressions)


@pytest.mark.parametrize("rate", [0, 1, -0.2, math.nan])
def test_rates_that_are_refused(rate):
    with pytest.raises(ValueError, match=r"rate=.* is not valid"):
        densities([2], rate)


def test_rounds_only_prune_further_and_go_back_to_the_early_state():
    model = network()
    train(model, 1)
    early = copy.deepcopy(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    masks = None
    for kept in (60, 40, 15):
        train(model)
        trained = copy.deepcopy(masks)
        masks = global_magnitude_masks(model, kept)
        assert sum(int(m.sum()) for m in masks.values()) == kept
        assert trained is None or all((mask <= trained[name]).all() for name, mask in masks.items())
        rewind(model, early, masks)
        assert all(mask.equal(masks[name]) for name, mask in masks_of(model).items())
        plain = remove_pruning(copy_of(model)).state_dict()
        for name, value in early.items():
            mask = masks.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            assert plain[name].equal(value if mask is None else value * mask), name
    remove_pruning(model)
    assert sorted(id(p) for p in model.parameters()) == sorted(parameters)  # an optimizer may hold them


def copy_of(model):
    """A copy of a pruned model, which deepcopy refuses: its weights are products."""
    masks, twin = masks_of(model), network()
    apply_masks(twin, masks)
    twin.load_state_dict(model.state_dict())
    return twin


def test_masks_look_at_what_the_last_step_left():
    """weight is stale after an optimizer step; a pruned weight never comes back, whatever weight_orig says."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    apply_masks(model, {"0": torch.tensor([[False, True], [True, True]])})
    model[0].weight_orig.data = torch.tensor([[9.0, 0.0], [-5.0, 1.0]])
    assert global_magnitude_masks(model, 2)["0"].tolist() == [[False, False], [True, True]]
    within = masks_of(model)
    remove_pruning(model)
    assert global_magnitude_masks(model, 3, within=within)["0"].equal(within["0"])  # kept zeros before pruned ones
    with pytest.raises(ValueError, match="kept=4 is not valid; expected a whole number of weights from 1 to 3"):
        global_magnitude_masks(model, 4, within=within)


def test_states_that_are_refused():
    model = network()
    masks = global_magnitude_masks(model, 10)
    with pytest.raises(ValueError, match=r"is the model's own tensor, which training has changed; keep a copy"):
        rewind(model, model.state_dict(), masks)
    apply_masks(model, masks)
    with pytest.raises(ValueError, match=r"state differs from the state dict of this Sequential in .* keys"):
        rewind(model, {k: v.clone() for k, v in model.state_dict().items()}, masks)
