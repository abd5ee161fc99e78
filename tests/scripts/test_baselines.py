"""Magnitude pruning: which weights stay, what they take, and that training and saving respect it."""

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from hf_rps import RPSConfig, get_rps_model
from hf_rps.targets import find_targets
from studies.methods.magnitude import most_kept, prune_by_magnitude, remove_pruning, sparse_bytes


class Pair(nn.Module):
    """Two layers of 16 weights, nn.Linear and Conv1D, of magnitudes 1 to 16 and 0.5 to 15.5, signs in turn."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), Conv1D(4, 4)
        signs = torch.tensor([1.0, -1.0]).repeat(8)
        self.first.weight.data = ((torch.arange(16) + 1) * signs).view(4, 4)
        self.second.weight.data = ((torch.arange(16) + 0.5) * signs).view(4, 4)

    def forward(self, x):
        return self.second(self.first(x))


def test_the_largest_of_all_layers_together_are_kept():
    model = Pair()
    # 32 weights, 128 bytes; 0.5 of them are 64: 4 for the mask, 60 for 15 values, of 9, 9.5, ... 16
    assert prune_by_magnitude(model, 0.5) == 15
    assert model.first.weight.abs().flatten().tolist() == [0] * 8 + list(range(9, 17))
    assert model.second.weight.abs().flatten().tolist() == [0] * 9 + [i + 0.5 for i in range(9, 16)]
    assert model.first.weight.flatten()[9] == -10  # signs stay


@pytest.mark.parametrize(
    ("ratio", "n", "value_bytes", "kept"),
    [
        (0.5, 1024, 4, 480),  # 2048 bytes = 128 of mask + 1920
        (0.1, 10_000, 4, 687),  # 4000 = 1250 + 2750
        (0.02, 10_000, 4, 100),  # 800: the mask alone is 1250, a hundred pairs of value and index fit
        (0.0625, 1024, 4, 32),  # where both encodings cost the same
        (0.5, 1024, 2, 448),  # 1024 = 128 + 896
        (1, 1024, 4, 1024),  # stored dense
        (0.999, 8, 4, 7),  # 31.968 bytes: 1 + 28
        (1e-5, 1024, 4, 0),
    ],
)
def test_bytes_by_hand(ratio, n, value_bytes, kept):
    assert most_kept(ratio, n, value_bytes) == kept
    assert sparse_bytes(kept, n, value_bytes) <= ratio * n * value_bytes
    if 0 < kept < n:  # one more does not fit
        assert sparse_bytes(kept + 1, n, value_bytes) > ratio * n * value_bytes


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_targets_are_those_of_rps(tiny, kind):
    """Only they change, and the count is exact over all of them."""
    model = tiny(kind, AutoModel)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = RPSConfig(exclude_modules=["pooler.dense"])
    names = [f"{candidate.name}.weight" for candidate in find_targets(model, config)]
    n = sum(before[name].numel() for name in names)
    kept = prune_by_magnitude(model, 0.25, config)
    after = remove_pruning(model).state_dict()
    assert after.keys() == before.keys()
    assert sum(after[name].count_nonzero().item() for name in names) == kept == most_kept(0.25, n)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value * (after[name] != 0) if name in names else value)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_training_keeps_the_zeros_and_moves_the_rest(make):
    torch.manual_seed(0)
    model = Pair()
    prune_by_magnitude(model, 0.5)
    zeros, start = model.first.weight == 0, model.first.weight.detach().clone()
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.randn(5, 4))  # a pass applies the mask to the new weights
    assert (model.first.weight == 0).equal(zeros)
    assert (model.first.weight != start).equal(~zeros)


def test_removal_leaves_a_plain_model(tiny, ids, tmp_path):
    """save_pretrained writes it, and from_pretrained reads it, without a trace of masks."""
    model = tiny("bert", AutoModel)
    prune_by_magnitude(model, 0.25)
    expected = model(ids).last_hidden_state
    remove_pruning(model)
    assert not any("weight_" in name for name in model.state_dict())
    assert all(isinstance(c.module.weight, nn.Parameter) for c in find_targets(model, RPSConfig()))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, expected)


def test_ratio_one_keeps_everything():
    model = Pair()
    weight = model.first.weight.detach().clone()
    assert prune_by_magnitude(model, 1.0) == 32
    assert remove_pruning(model).first.weight.equal(weight)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0, r"stored_ratio=0 is not valid; expected a number in \(0, 1\]"),
        (1.5, "stored_ratio=1.5 is not valid"),
        (float("nan"), "stored_ratio=nan is not valid"),
        (0.05, "stored_ratio=0.05 of the 32 targeted weights of this Pair can't hold one weight.*raise it"),
    ],
)
def test_ratios_that_are_refused(ratio, message):
    model = Pair()
    with pytest.raises(ValueError, match=message):
        prune_by_magnitude(model, ratio)
    assert isinstance(remove_pruning(model).first.weight, nn.Parameter)  # nothing has happened to it


def test_models_that_are_refused(tiny):
    compressed = get_rps_model(tiny("bert", AutoModel), RPSConfig(ratio=0.5))
    with pytest.raises(ValueError, match=r"BertModel is compressed by hf_rps; call hf_rps\.to_dense"):
        prune_by_magnitude(compressed, 0.5)
    pruned = Pair()
    prune_by_magnitude(pruned, 0.5)
    with pytest.raises(ValueError, match=r"Pair is pruned already; call remove_pruning"):
        prune_by_magnitude(pruned, 0.5)
