"""add_weighted_adapter: sums of adapters of one map are sums of their arrays."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_adapters import MODES, config, equal, layers, logits

from hf_rps import RPSConfig


def psi_of(model, adapter):
    """Of whoever holds it."""
    return next(layer.shared[adapter].source.psi for layer in layers(model).values() if adapter in layer.shared)


def with_two(tiny, mode, **changes):
    """Adapters a and b of one config with different arrays."""
    torch.manual_seed(1)
    model = get_peft_model(tiny(), config(mode), adapter_name="a").eval()
    model.add_adapter("b", config(mode) if not changes else config(mode, **changes))
    with torch.no_grad():
        psi_of(model, "b").normal_(std=0.1)
    return model


@pytest.mark.parametrize("mode", MODES)
def test_the_weights_are_the_weighted_sum(tiny, ids, mode):
    model = with_two(tiny, mode)
    active = logits(model, ids)
    model.add_weighted_adapter(["a", "b"], [0.75, -0.5], "sum")
    equal(logits(model, ids), active)  # which adapter is active has not changed
    assert psi_of(model, "a").requires_grad
    assert not psi_of(model, "sum").requires_grad
    torch.testing.assert_close(psi_of(model, "sum"), 0.75 * psi_of(model, "a") - 0.5 * psi_of(model, "b"))
    for layer in layers(model).values():
        a, b, both = (layer.shared[name].dense().detach() for name in ("a", "b", "sum"))
        torch.testing.assert_close(both, 0.75 * a - 0.5 * b)


def test_a_sum_of_deltas_computes_what_both_together_compute(tiny, ids):
    model = with_two(tiny, "delta")
    model.base_model.set_adapter(["a", "b"])
    both = logits(model, ids)
    model.add_weighted_adapter(["a", "b"], [1, 1], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, ids), both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_it_trains_saves_and_loads_as_any_adapter(tiny, ids, tmp_path, mode):
    model = with_two(tiny, mode)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    model.set_adapter("mean")
    model(input_ids=ids, labels=ids).loss.backward()
    assert psi_of(model, "mean").grad.abs().sum() > 0
    assert psi_of(model, "a").grad is None
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "mean").eval()
    equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("mode", MODES)
def test_adapters_that_were_loaded(tiny, ids, tmp_path, mode):
    """Their configs record the map; they are averaged with each other and on top of themselves."""
    model = with_two(tiny, mode)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "a", adapter_name="a").eval()
    loaded.load_adapter(tmp_path / "b", adapter_name="b")
    loaded.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    equal(psi_of(loaded, "mean").detach(), (0.5 * psi_of(model, "a") + 0.5 * psi_of(model, "b")).detach())
    assert not any("rps_map" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize("changes", [{"seed": 1}, {"ratio": 0.1}, {"target_modules": ["up_proj"]}, {"init_std": 0.5}])
def test_different_maps_are_refused(tiny, ids, changes):
    model = with_two(tiny, "delta", **changes)
    before, names = logits(model, ids), list(model.state_dict())
    with pytest.raises(ValueError, match=r"'a' and 'b' have different maps.*Train both with one config"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    assert sorted(model.peft_config) == ["a", "b"]
    assert list(model.state_dict()) == names
    equal(logits(model, ids), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b"], [0.5, 0.5], "mean", "svd"), "combination_type='svd'.*'linear'"),
        ((["a", "b"], [0.5], "mean"), "weights a number for each"),
        (([], [], "mean"), "weights a number for each"),
        ((["a", "c"], [0.5, 0.5], "mean"), r"no adapter 'c'; this model has \['a', 'b'\]"),
        ((["a", "b"], [0.5, 0.5], "b"), "an adapter 'b' already"),
        ((["a", "b"], [0.5, float("nan")], "mean"), "must be finite"),
    ],
)
def test_bad_arguments_are_refused(tiny, arguments, message):
    model = with_two(tiny, "delta")
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert sorted(model.peft_config) == ["a", "b"]


def test_modules_trained_in_full_are_refused(tiny):
    model = get_peft_model(tiny(), RPSConfig(ratio=0.1, mode="delta", modules_to_save=["lm_head"]), adapter_name="a")
    model.add_adapter("b", RPSConfig(ratio=0.1, mode="delta", modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"\['a', 'b'\] have copies of 'lm_head'"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
