"""Bad input ends in a ValueError that names field or module, value and remedy, and leaves the model as it was."""

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank
from hf_rps.initial import all_finite


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("ratio", v) for v in (0, -0.1, 1.5, float("nan"), float("inf"), True, "0.1")),
        *(("seed", v) for v in (1.5, True, None, "1")),
        *(("target_modules", v) for v in ([], "", [1], 3)),
        ("exclude_modules", []),
        *(("layers_to_transform", v) for v in (-1, [0, -2], "1", [True])),
        ("modules_to_save", "classifier"),
        ("sharing", "layer"),
        ("mapping", "random"),
        ("sign", True),
        ("grad_scaling", None),
        *(("init_std", v) for v in (0, -1.0, float("nan"), True)),
        *(("init_weights", v) for v in ("lora", 2, None)),
    ],
)
def test_config_fields(field, value):
    with pytest.raises(ValueError, match=f"{field}=") as error:
        RPSConfig(**{field: value})
    assert repr(value) in str(error.value)
    assert "expected" in str(error.value)


def snapshot(model):
    """All that a refused conversion must leave alone: tensors, modules, config and hooks."""
    modules = [(name, type(module), list(module._forward_hooks)) for name, module in model.named_modules()]
    marks = [hasattr(getattr(model, "config", None), "quantization_config"), model.__dict__.get("hf_quantizer")]
    return {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}, modules, marks


def refuses(model, config, *parts):
    tensors, modules, marks = snapshot(model)
    with pytest.raises(ValueError) as error:
        get_rps_model(model, config)
    for part in parts:
        assert part in str(error.value)
    after, modules_after, marks_after = snapshot(model)
    assert (modules_after, marks_after) == (modules, marks)
    assert after.keys() == tensors.keys()
    for name, (tensor, value) in tensors.items():
        assert after[name][0].data_ptr() == tensor.data_ptr()
        if not tensor.is_meta:
            torch.testing.assert_close(tensor, value, rtol=0, atol=0, equal_nan=True)


def test_targets_that_match_nothing(tiny):
    refuses(tiny("llama"), RPSConfig(target_modules=["query"]), "target_modules=['query']", "'q_proj'")
    refuses(tiny("llama"), RPSConfig(layers_to_transform=7), "layers_to_transform=7")
    refuses(tiny("llama"), RPSConfig(exclude_modules=".*"), "exclude_modules='.*'")


def test_targets_that_can_not_be_shared(tiny):
    refuses(tiny("llama"), RPSConfig(target_modules=["input_layernorm"]), "LlamaRMSNorm", "exclude_modules")


def test_tied_targets(tiny):
    refuses(tiny("gpt2"), RPSConfig(target_modules=["lm_head"]), "lm_head", "tied")


def test_not_a_config_and_not_a_model(tiny):
    refuses(tiny("llama"), {"ratio": 0.1}, "RPSConfig", "dict")
    with pytest.raises(ValueError, match="str"):
        get_rps_model("bert-base-uncased", RPSConfig())


def test_already_compressed(tiny):
    model = get_rps_model(tiny("llama"), RPSConfig())
    psi = find_bank(model).psi.clone()
    refuses(model, RPSConfig(), "already compressed", "to_dense")
    assert torch.equal(find_bank(model).psi, psi)
    with pytest.raises(ValueError, match="not compressed"):
        to_dense(tiny("llama"))


def test_values_that_are_not_finite(tiny):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    refuses(model, RPSConfig(), "model.layers.1.mlp.up_proj", "not finite", "exclude_modules")


def test_integer_weights(tiny):
    model = tiny("llama")
    layer = model.model.layers[2].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight, dtype=torch.int8), requires_grad=False)
    refuses(model, RPSConfig(), "model.layers.2.mlp.up_proj", "torch.int8", "unquantised")


def test_quantised_models(tiny):
    class Quantizer:
        quantization_config = BitsAndBytesConfig(load_in_8bit=True)

    model = tiny("llama")
    model.hf_quantizer = Quantizer()
    refuses(model, RPSConfig(), "bitsandbytes", "quantization_config")


def test_packed_weights(tiny):
    class QuantLinear(nn.Module):  # the shape of a GPTQ layer
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))

    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = QuantLinear()
    refuses(model, RPSConfig(), "model.layers.0.mlp.up_proj", "QuantLinear")


def test_meta_weights(tiny):
    with torch.device("meta"):
        model = tiny("llama")
    refuses(model, RPSConfig(), "meta device", "model.layers.0")


def test_models_spread_over_devices(tiny):
    model = tiny("llama")
    model.hf_device_map = {"model": 0, "lm_head": 1}
    refuses(model, RPSConfig(), "device_map", "['0', '1']")


def test_peft_models(tiny):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    refuses(model, RPSConfig(), "PEFT", "merge_and_unload")


def test_containers_and_name_clashes(tiny):
    stack = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    refuses(stack, RPSConfig(ratio=0.5), "Sequential", "wrap")
    assert all(isinstance(layer, nn.Linear) for layer in stack)
    model = tiny("llama")
    model.model.rps = nn.Identity()
    refuses(model, RPSConfig(), "'rps'")
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_number_that_is_not_finite_is_found(dtype, value, place):
    numbers = torch.randn(1000).to(dtype)
    assert all_finite(numbers)
    assert all_finite(torch.full((3, 3), torch.finfo(dtype).max, dtype=dtype))
    numbers[place] = value
    assert not all_finite(numbers)
    assert not all_finite(numbers.view(10, 100).t())
