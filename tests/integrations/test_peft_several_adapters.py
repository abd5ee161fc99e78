"""Several RPS adapters on one model, with PEFT and with transformers' own adapters."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from peft_adapters import MODES, config, equal, layers, logits, psi
from torch import nn

from hf_rps import RPSConfig


@pytest.mark.parametrize("mode", MODES)
def test_two_adapters(tiny, ids, mode):
    alone = {}
    torch.manual_seed(1)
    model = get_peft_model(tiny(), config(mode), adapter_name="a").eval()
    alone["a"] = logits(model, ids)
    model.add_adapter("b", config(mode, seed=1, ratio=0.1))
    assert psi(model, "a").requires_grad
    assert not psi(model, "b").requires_grad
    equal(logits(model, ids), alone["a"])
    model.set_adapter("b")
    assert not psi(model, "a").requires_grad
    alone["b"] = logits(model, ids)
    assert not torch.equal(alone["a"], alone["b"])
    model(input_ids=ids, labels=ids).loss.backward()
    assert psi(model, "a").grad is None
    assert psi(model, "b").grad.abs().sum() > 0
    if mode == "delta":
        model.base_model.set_adapter(["a", "b"])
        both = logits(model, ids)
        weights = tiny()
        for name, layer in layers(model).items():
            name = name.removeprefix("base_model.model.")
            weights.get_parameter(f"{name}.weight").data += layer.get_delta_weight("a") + layer.get_delta_weight("b")
        torch.testing.assert_close(both, logits(weights, ids), rtol=1e-4, atol=1e-5)
    model.delete_adapter("b")
    model.set_adapter("a")
    equal(logits(model, ids), alone["a"])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_second_replacement_starts_from_the_first(tiny, ids, kind):
    """Projected from the weights that the model has: with the same map, the same array."""
    model = get_peft_model(tiny(kind), RPSConfig(ratio=0.2), adapter_name="a").eval()
    model.add_adapter("b", RPSConfig(ratio=0.2))
    torch.testing.assert_close(psi(model, "b"), psi(model, "a"))


def test_replacements_of_different_layers(tiny, ids):
    """A layer that not every adapter replaces keeps its dense weight; one that lost it says so."""
    model = get_peft_model(tiny(), config("replace", target_modules=["up_proj"]), adapter_name="a").eval()
    model.add_adapter("b", config("replace", target_modules=["down_proj"]))
    assert layers(model)["base_model.model.model.layers.0.mlp.down_proj"].base_layer.weight is not None
    logits(model, ids)
    model.set_adapter("b")
    with pytest.raises(ValueError, match=r"freed.*\['a'\] none is active; activate one"):
        logits(model, ids)
    model.base_model.set_adapter(["a", "b"])
    assert logits(model, ids).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_transformers_own_adapters(tiny, ids, tmp_path, mode):
    model = tiny()
    model.add_adapter(config(mode), "a")
    (trained,) = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == f"rps.rps_banks.a.{model.rps.rps_banks['a'].psi_name}"
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "a")
    model.add_adapter(config(mode, seed=1), "b")
    other = logits(model, ids)
    assert model.active_adapters() == ["b"]
    model.set_adapter("a")
    equal(logits(model, ids), expected)
    model.delete_adapter("b")
    again = tiny()
    info = again.load_adapter(str(tmp_path / "a"))
    assert not info.missing_keys
    assert not info.unexpected_keys
    equal(logits(again, ids), expected)
    assert not any("rps_map" in name for name, _ in again.named_parameters())
    again.load_adapter(str(tmp_path / "a"), "second")
    again.set_adapter("second")
    equal(logits(again, ids), expected)
    assert not torch.equal(expected, other)
    if mode == "delta":
        again.disable_adapters()
        equal(logits(again, ids), logits(tiny(), ids))
        again.enable_adapters()
        equal(logits(again, ids), expected)
        model.delete_adapter("a")
        equal(logits(model, ids), logits(tiny(), ids))


class LookAlike(nn.Module):
    """A linear layer by what it computes, not by its class."""

    def __init__(self, size):
        super().__init__()
        self.in_features = self.out_features = size
        self.weight, self.bias = nn.Parameter(torch.randn(size, size)), nn.Parameter(torch.randn(size))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def test_a_second_adapter_on_layers_of_any_class():
    """Whose weight the first one has freed."""
    wrapped = get_peft_model(nn.Sequential(LookAlike(8), nn.Linear(8, 8)), RPSConfig(ratio=1.0))
    x = torch.randn(3, 8)
    expected = wrapped(x)
    wrapped.add_adapter("second", RPSConfig(ratio=1.0, seed=1))
    wrapped.set_adapter("second")
    torch.testing.assert_close(wrapped(x), expected)
