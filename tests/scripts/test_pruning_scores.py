"""Pruning at initialisation: scores against formulas and finite differences, and that scoring leaves no trace."""

import copy

import pytest
import torch
from pruning_models import Net, batches_of, seeded, tiny_model
from torch import nn

from studies.methods.at_start import NEEDS, prune_at_start
from studies.methods.masks import masks_of, remove_pruning, targeted_weights
from studies.methods.positive import norms_without_statistics
from studies.methods.scores import grasp_scores, magnitude_scores, random_scores, snip_scores, synflow_scores


def with_gate(model, name, index, value, function):
    """``function(model)`` with one weight multiplied by ``value``."""
    weight = model.get_submodule(name).weight
    kept = weight.data[index].clone()
    weight.data[index] = kept * value
    result = function(model)
    weight.data[index] = kept
    return result


def central_differences(model, function, step=1e-5):
    """d function / d gate at gate 1, for a gate on each targeted weight in turn."""
    derivatives = {}
    for name, weight in targeted_weights(model).items():
        derivatives[name] = torch.zeros_like(weight)
        for index in map(tuple, torch.ones_like(weight).nonzero().tolist()):
            up, down = (with_gate(model, name, index, 1 + s, function) for s in (step, -step))
            derivatives[name][index] = (up - down) / (2 * step)
    return derivatives


def mean_gradients(model, batches):
    loss = sum(model(**batch).loss for batch in batches) / len(batches)
    return torch.autograd.grad(loss, list(targeted_weights(model).values()))


# ---- scores by other means


def test_snip_of_two_layers_by_hand():
    """dL/dW2 = e hᵀ and dL/dW1 = W2ᵀ e xᵀ, for h = W1 x and the error e = W2 h - t."""
    model, (batch,) = seeded(Net, lambda h: h), batches_of(1)
    w1, w2, x, t = model.first.weight, model.second.weight, batch["x"], batch["labels"]
    h = x @ w1.T
    e = h @ w2.T - t
    scores = snip_scores(model, [batch])
    torch.testing.assert_close(scores["second"], (w2 * (e.T @ h)).abs())
    torch.testing.assert_close(scores["first"], (w1 * ((e @ w2).T @ x)).abs())


@pytest.mark.parametrize("middle", [None, lambda: nn.BatchNorm1d(4), lambda: nn.LayerNorm(4)])
def test_snip_is_the_loss_in_a_gate_per_weight(middle):
    """With BatchNorm, on the batch's statistics."""
    model, batches = seeded(Net, middle=middle and middle()), batches_of()
    expected = central_differences(model, lambda m: sum(m(**b).loss.item() for b in batches) / 2)  # m is in train mode
    model.eval()
    for name, score in snip_scores(model, iter(batches)).items():
        torch.testing.assert_close(score, expected[name].abs(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("middle", [None, lambda: nn.BatchNorm1d(4)])
def test_grasp_is_half_the_squared_gradient_norm_in_a_gate_per_weight(middle):
    """-w Hg goes with removal, so the weights to keep have the largest w Hg = d(½ ‖g‖²) / dgate."""
    model, batches = seeded(Net, middle=middle and middle()), batches_of()
    expected = central_differences(
        model, lambda m: sum(g.square().sum().item() for g in mean_gradients(m, batches)) / 2
    )
    for name, score in grasp_scores(model, iter(batches)).items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=1e-6)


def test_synflow_of_two_layers_by_hand():
    """R = 1ᵀ |W2| |W1| x."""
    model, x = seeded(Net, torch.relu), torch.tensor([[1.0, 2.0, 3.0]])
    w1, w2 = model.first.weight.abs(), model.second.weight.abs()
    scores = synflow_scores(model, {"x": x})
    torch.testing.assert_close(scores["first"], w1 * w2.sum(0)[:, None] * x)
    torch.testing.assert_close(scores["second"], w2 * (w1 @ x[0].double())[None])


def test_synflow_is_conserved():
    """The scores of each layer of a network without biases add up to R, also through what is left of the norms."""
    norms = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), nn.RMSNorm(4))
    model = seeded(Net, torch.relu, norms)
    model.middle[0].weight.data.uniform_(-2, 2)
    model.middle[1].running_mean.fill_(3)
    inputs = {"x": torch.ones(2, 3)}
    sums = [score.sum() for score in synflow_scores(model, inputs).values()]
    torch.testing.assert_close(*sums)
    scaled = copy.deepcopy(model)
    scaled.first.weight.data *= 10  # a norm with statistics would hide it
    torch.testing.assert_close(synflow_scores(scaled, inputs)["second"].sum(), 10 * sums[1])


def test_synflow_of_masked_weights_is_zero_and_the_others_know():
    model, inputs = seeded(Net, torch.relu), {"x": torch.ones(1, 3)}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in targeted_weights(model).items()}
    masks["first"][0] = False
    scores = synflow_scores(model, inputs, masks=masks)
    assert not scores["first"][0].any()
    assert not scores["second"][:, 0].any()  # nothing flows in
    assert scores["second"][:, 1:].all()


def test_random_and_magnitude():
    model = seeded(Net)
    again = [random_scores(model, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert again[0]["first"].equal(again[1]["first"])
    assert not again[0]["first"].equal(again[2]["first"])
    assert magnitude_scores(model)["second"].equal(model.second.weight.abs())


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 4, 3, 3)])
def test_norms_without_statistics_are_put_back(shape):
    layers = [nn.LayerNorm(4), nn.RMSNorm(4)] if len(shape) == 3 else [nn.BatchNorm2d(4), nn.GroupNorm(2, 4)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(shape)
    for layer in layers:
        nn.init.uniform_(layer.weight, -1, 1)
    before = model(x)
    product = layers[0].weight.abs() * layers[1].weight.abs()
    with norms_without_statistics(model):
        torch.testing.assert_close(model(x), x * (product if len(shape) == 3 else product[:, None, None]))
    assert model(x).equal(before)
    assert all("forward" not in layer.__dict__ for layer in layers)


# ---- transformers models, all methods


CASES = [(kind, method) for kind in ("vit", "gpt2", "llama", "resnet") for method in NEEDS]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_every_method_keeps_exactly_what_is_asked(kind, method):
    """The same weights each time; and all else of the model stays as it was, its gradients and generators too."""
    kept_share, masks = 0.2, []
    for _ in range(2):
        model, batches, inputs = tiny_model(kind)
        n = sum(weight.numel() for weight in targeted_weights(model).values())
        kept = round(kept_share * n)
        first = next(model.parameters())
        first.grad = torch.ones_like(first)
        next(model.children()).eval()
        before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
        rng = torch.get_rng_state()
        generator = torch.Generator().manual_seed(0)
        masks.append(
            prune_at_start(
                model, method, kept, batches=batches, inputs=inputs, generator=generator
            )
        )  # fmt: skip
        assert torch.get_rng_state().equal(rng)
        assert [m.training for m in model.modules()] == modes
        assert sum(int(m.sum()) for m in masks_of(model).values()) == kept
        assert first.grad.eq(1).all()
        assert all(p.grad is None for p in model.parameters() if p is not first)
        after = remove_pruning(model).state_dict()
        assert after.keys() == before.keys()
        for name, value in before.items():
            mask = masks[-1].get(name.removesuffix(".weight"))
            assert after[name].equal(value if mask is None or not name.endswith(".weight") else value * mask), name
    assert all(mask.equal(masks[1][name]) for name, mask in masks[0].items())


@pytest.mark.parametrize("score", [snip_scores, grasp_scores])
def test_dropout_is_off(score):
    batches = batches_of()
    expected = score(seeded(Net), batches)
    for name, value in score(seeded(Net, dropout=0.5).train(), batches).items():
        torch.testing.assert_close(value, expected[name])


def test_batchnorm_statistics_and_modes_stay():
    model = seeded(Net, middle=nn.BatchNorm1d(4)).eval()
    before = copy.deepcopy(model.state_dict())
    snip_scores(model, batches_of())
    grasp_scores(model, batches_of())
    synflow_scores(model, {"x": torch.ones(1, 3)})
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_a_failing_pass_leaves_the_model_as_it_was():
    model = seeded(Net, middle=nn.LayerNorm(4)).train()
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    for score, argument in ((snip_scores, [{"x": torch.ones(1, 7)}]), (synflow_scores, {"x": torch.ones(1, 7)})):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            score(model, argument)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(module.training and "forward" not in module.__dict__ for module in model.modules())


def test_scoring_works_where_gradients_are_off_and_of_frozen_weights():
    model, batches = seeded(Net), batches_of()
    expected = snip_scores(model, batches)
    model.requires_grad_(False)
    with torch.no_grad():
        assert all(score.equal(expected[name]) for name, score in snip_scores(model, batches).items())
    assert not any(p.requires_grad for p in model.parameters())


def test_synflow_keeps_every_layer_alive_where_one_shot_does_not():
    """Layers far apart in scale: SynFlow's many rounds keep the small one, its purpose."""
    model = seeded(nn.Sequential, *(nn.Linear(16, 16, bias=False) for _ in range(3)))
    model[1].weight.data *= 1e-4
    assert not prune_at_start(copy.deepcopy(model), "magnitude", 40)["1"].any()
    masks = prune_at_start(model, "synflow", 40, inputs={"input": torch.ones(1, 16)})
    assert all(mask.any() for mask in masks.values())
    assert model(torch.ones(1, 16)).any()
