"""Low-rank factorised training: the factors are the best ones, the budget is kept, and models train."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CASES, RESNET
from torch import nn
from transformers import AutoModel, ResNetConfig, ResNetForImageClassification
from transformers.pytorch_utils import Conv1D

from hf_rps import RPSConfig, get_rps_model
from hf_rps.layers.kinds import Candidate, kind_of
from hf_rps.targets import find_targets
from studies.methods.low_rank import (
    LowRankConv2d,
    LowRankLinear,
    choose_ranks,
    get_low_rank_model,
    low_rank_numbers,
    spectral_factors,
)
from studies.methods.magnitude import prune_by_magnitude


def conv(*arguments, **keywords):
    """An nn.Conv2d with weights that are far from those of low rank."""
    torch.manual_seed(0)
    return nn.Conv2d(*arguments, **keywords)


CONVS = {
    "stride and padding": {"stride": 2, "padding": 1},
    "dilation, same": {"dilation": 2, "padding": "same", "bias": False},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 1), (1, 6)])
def test_full_rank_is_the_dense_linear_layer(shape, bias):
    torch.manual_seed(0)
    dense = nn.Linear(*shape, bias=bias)
    layer, x = LowRankLinear(dense, min(shape)), torch.randn(2, 3, shape[0])
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer.weight, dense.weight)
    assert (layer.in_features, layer.out_features) == shape
    assert layer.bias is dense.bias


def test_full_rank_is_the_dense_conv1d():
    torch.manual_seed(0)
    dense = Conv1D(7, 5)
    layer, x = LowRankLinear(dense, 5, transposed=True), torch.randn(2, 3, 5)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer.weight, dense.weight)  # (in, out), as Conv1D stores it
    assert (layer.v.weight.shape, layer.u.weight.shape) == ((5, 5), (7, 5))


@pytest.mark.parametrize("geometry", CONVS.values(), ids=CONVS)
def test_full_rank_is_the_dense_convolution(geometry):
    dense = conv(3, 8, 3, **geometry)
    layer, x = LowRankConv2d(dense, 8), torch.randn(2, 3, 9, 10)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.weight, dense.weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("geometry", CONVS.values(), ids=CONVS)
def test_a_low_rank_convolution_is_one_with_the_product_as_its_weight(geometry):
    dense = conv(3, 8, (3, 5), **geometry)
    layer, x = LowRankConv2d(dense, 2), torch.randn(2, 3, 9, 10)
    assert (layer.v.weight.shape, layer.u.weight.shape) == ((2, 3, 3, 5), (8, 2, 1, 1))
    assert layer.numbers == 2 * (8 + 3 * 3 * 5)
    dense.weight.data = layer.weight.data
    torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@settings(max_examples=30, deadline=None)
def test_factors_are_the_best_of_their_rank(out, into, data):
    """Eckart and Young: the squared error is that of the singular values left out."""
    rank = data.draw(st.integers(1, min(out, into)))
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(out * into), dtype=torch.float64)
    u, v = spectral_factors(weight, rank)
    tail = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close((weight - u @ v).square().sum(), tail)
    torch.testing.assert_close(u.T @ u, v @ v.T)  # the singular values are split evenly


def test_half_precision_weights_keep_their_dtype():
    layer = LowRankLinear(nn.Linear(6, 4, dtype=torch.bfloat16), 2)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_torchs_generator_is_left_alone():
    dense, state = nn.Linear(6, 4), torch.get_rng_state()
    LowRankLinear(dense, 2)
    assert torch.get_rng_state().equal(state)


shapes = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6)


@given(shapes, st.floats(0.01, 1))
@settings(max_examples=300, deadline=None)
def test_the_budget_is_kept_and_spent(shapes, ratio):
    n, least = sum(out * into for out, into in shapes), sum(map(sum, shapes))
    budget = round(ratio * n)
    if least > budget:
        with pytest.raises(ValueError, match=rf"rank 1 are {least:,} already; the smallest ratio"):
            choose_ranks(shapes, ratio)
        return
    ranks = choose_ranks(shapes, ratio)
    room = budget - sum(rank * sum(shape) for rank, shape in zip(ranks, shapes, strict=True))
    assert all(1 <= rank <= min(shape) for rank, shape in zip(ranks, shapes, strict=True))
    assert room >= 0
    # less is left than the next rank of any weight would cost
    assert all(sum(shape) > room for rank, shape in zip(ranks, shapes, strict=True) if rank < min(shape))
    floors = [max(1, int(ratio * out * into / (out + into))) for out, into in shapes]
    if sum(rank * sum(shape) for rank, shape in zip(floors, shapes, strict=True)) <= budget:
        assert all(rank >= floor for rank, floor in zip(ranks, floors, strict=True))


@pytest.mark.parametrize(
    ("shapes", "ratio", "ranks"),
    [
        ([(64, 64)], 0.1, [3]),  # a budget of 410, 128 a rank
        ([(64, 64), (256, 64)], 0.1, [3, 5]),  # 2048; shares 3.2 and 5.12, 384 + 1600 and 64 left
        ([(8, 8), (8, 8), (8, 8)], 0.5, [2, 2, 2]),
        ([(8, 8), (8, 8), (8, 8)], 0.42, [2, 2, 1]),  # 81: five ranks, the first among equals first
        ([(64, 1), (64, 64)], 0.1, [1, 2]),  # 416: shares 0.098 and 3.2, but rank 1 of the first takes 65
    ],
)
def test_ranks_by_hand(shapes, ratio, ranks):
    assert choose_ranks(shapes, ratio) == ranks


def test_the_smallest_ratio_named_is_reached():
    with pytest.raises(ValueError, match=r"ratio=0.01 of the 20,480 .* is 205 .* 448 already") as error:
        choose_ranks([(64, 64), (256, 64)], 0.01)
    assert choose_ranks([(64, 64), (256, 64)], float(str(error.value).split()[-1])) == [1, 1]


CHOSEN = [case for case in CASES if case.name in ("vit", "gpt2", "llama", "t5", "mamba", "wavlm")]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_models_train(case):
    check_training(case.build(), case.batch(), RPSConfig())


def test_resnet_trains():
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**RESNET | {"num_labels": 5}))
    check_training(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, RPSConfig())
    assert any(isinstance(module, LowRankConv2d) for module in model.modules())


def check_training(model, batch, config, ratio=0.6):
    """All targets are replaced, the budget is kept, gradients reach all factors, and steps lower the loss."""
    targets = find_targets(model, config)
    dense = {c.name: c.module for c in targets}
    n, before = sum(c.module.weight.numel() for c in targets), sum(p.numel() for p in model.parameters())
    assert get_low_rank_model(model, ratio, config) is model
    layers = [model.get_submodule(name) for name in dense]
    assert all(isinstance(layer, (LowRankLinear, LowRankConv2d)) for layer in layers)
    assert 0.9 * ratio * n < low_rank_numbers(model) <= round(ratio * n)
    assert sum(p.numel() for p in model.parameters()) == before - n + low_rank_numbers(model)
    model.eval()  # with dropout, masks and layers left out the two losses would be of different draws
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model(**batch)[0].float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(layer.u.weight.grad.any() for layer in layers)
    assert all(layer.v.weight.grad.any() for layer in layers)
    assert losses[1] < losses[0]


def test_only_what_the_config_names_is_replaced_and_frozen_weights_stay_frozen(tiny, ids, tmp_path):
    model = tiny("bert", AutoModel)
    model.encoder.layer[0].output.dense.weight.requires_grad_(False)
    get_low_rank_model(model, 0.5, RPSConfig(target_modules=["output.dense"]))
    factorised = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    assert len(factorised) == 4
    assert all(name.endswith("output.dense") for name in factorised)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"encoder.layer.0.output.dense.{factor}.weight" for factor in "vu"]
    again = get_low_rank_model(tiny("bert", AutoModel), 0.5, RPSConfig(target_modules=["output.dense"]))
    with torch.no_grad():
        model.encoder.layer[1].output.dense.u.weight.add_(1)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize("ratio", [0, -1, 1.5, float("nan")])
def test_ratios_that_are_refused(tiny, ratio):
    with pytest.raises(ValueError, match=rf"ratio={ratio!r} is not valid; expected a number in \(0, 1\]"):
        get_low_rank_model(tiny("bert", AutoModel), ratio)


def test_too_small_a_ratio_leaves_the_model_as_it_was(tiny):
    model = tiny("bert", AutoModel)
    with pytest.raises(ValueError, match="the smallest ratio that can be reached is 0"):
        get_low_rank_model(model, 0.001)
    assert low_rank_numbers(model) == 0


def test_models_that_are_refused(tiny):
    with pytest.raises(ValueError, match=r"BertModel is compressed by hf_rps; call hf_rps\.to_dense"):
        get_low_rank_model(get_rps_model(tiny("bert", AutoModel), RPSConfig(ratio=0.5)), 0.5)
    pruned = tiny("bert", AutoModel)
    prune_by_magnitude(pruned, 0.5)
    with pytest.raises(ValueError, match=r"BertModel is pruned; call remove_pruning"):
        get_low_rank_model(pruned, 0.5)
    with pytest.raises(ValueError, match="BertModel has low-rank factors already"):
        get_low_rank_model(get_low_rank_model(tiny("bert", AutoModel), 0.5), 0.5)


@pytest.mark.parametrize("module", [nn.Conv2d(4, 8, 3, groups=2), nn.Conv3d(4, 8, 3)])
def test_layers_that_are_refused(module, monkeypatch):
    """Whatever find_targets lets through."""
    model = nn.Sequential(module)
    targets = [Candidate("0", module, kind_of(module))]
    monkeypatch.setattr("studies.methods.low_rank.find_targets", lambda model, config: targets)
    with pytest.raises(ValueError, match=r"target '0' is Conv.*groups=1.*exclude_modules"):
        get_low_rank_model(model, 0.5)
    assert model[0] is module


def test_layers_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"rank=5 is not valid for a weight of shape \(4, 6\); expected 1 to 4"):
        LowRankLinear(nn.Linear(6, 4), 5)
    with pytest.raises(ValueError, match="has groups=2"):
        LowRankConv2d(nn.Conv2d(4, 8, 3, groups=2), 1)
