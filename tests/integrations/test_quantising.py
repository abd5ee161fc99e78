"""Quantisation on top of compression: tools find layers by their class and leave shared ones as they are."""

import pytest
import torch
import transformers
from checkpoints import equal
from torch import nn
from transformers import AutoModelForCausalLM

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.layers.base import RPSLayer

DYNAMIC = torch.ao.nn.quantized.dynamic.Linear


def quantise(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore")
def test_tools_that_look_for_linear_layers_find_only_dense_ones(tiny, ids):
    """As docs/limits.md says; what they leave still computes what it did."""
    model = get_rps_model(tiny(), RPSConfig(ratio=0.3))
    hidden = model.model(ids).last_hidden_state.detach()
    quantised = quantise(model)
    assert isinstance(quantised.lm_head, DYNAMIC)
    assert not any(isinstance(module, DYNAMIC) for module in quantised.model.modules())
    equal(quantised.model(ids).last_hidden_state.detach(), hidden)
    dense = quantise(to_dense(model))  # the remedy
    assert sum(isinstance(module, DYNAMIC) for module in dense.model.modules()) == 21


def test_a_tool_that_is_told_to_take_shared_layers_is_refused(tiny):
    """torchao's ``quantize_`` with a filter of the user's own puts a parameter in the place of ``weight``."""
    model = get_rps_model(tiny(), RPSConfig(ratio=0.3))
    layer = next(module for module in model.modules() if isinstance(module, RPSLayer))
    with pytest.raises(AttributeError, match=r"made from a shared array and can't be replaced.*to_dense"):
        layer.weight = nn.Parameter(torch.zeros(layer.weight_shape))


@pytest.mark.parametrize("config", [RPSConfig(ratio=0.1), transformers.BitsAndBytesConfig(load_in_8bit=True)])
def test_a_compressed_checkpoint_takes_no_other_config(tiny, tmp_path, config):
    get_rps_model(tiny(), RPSConfig(ratio=0.3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"compressed already.*without quantization_config.*to_dense"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
