"""PEFT's own methods on a compressed model: refused where they reach for shared layers, with what to do instead."""

import peft
import pytest
import torch
from checkpoints import equal
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.layers.linear import RPSLinear

REMEDY = r"share one array.*Train it as it is.*mode='delta'.*to_dense"
SHARED = {
    "lora": LoraConfig(target_modules=["q_proj"]),
    "lora by default": LoraConfig(),
    "lora, mixed with the head": LoraConfig(target_modules=["lm_head", "q_proj"]),
    "lora by expression": LoraConfig(target_modules=r".*\.(down|up)_proj"),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "loha": peft.LoHaConfig(target_modules=["q_proj"]),
    # without a word, until it was refused: of a copy of the layer with its array, of no layer at all
    "ln tuning": peft.LNTuningConfig(target_modules=["q_proj"]),
    "osf": peft.OSFConfig(target_modules=["q_proj"]),
}


@pytest.fixture
def model(tiny):
    return get_rps_model(tiny("llama"), RPSConfig(ratio=0.3))


@pytest.mark.parametrize("name", SHARED)
def test_shared_layers_are_refused_before_anything_changes(model, ids, name):
    modules, logits = list(model.modules()), model(ids).logits.detach()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=REMEDY):
        get_peft_model(model, SHARED[name])
    assert list(model.modules()) == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    equal(model(ids).logits.detach(), logits)


def test_all_linear_is_refused_where_it_would_find_what_was_left_dense(tiny):
    """The layers of one block are left dense: PEFT would adapt these and pass by the others."""
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.3, layers_to_transform=[0, 1]))
    with pytest.raises(ValueError, match=rf"target_modules='all-linear' of LORA would pass by.*{REMEDY}"):
        get_peft_model(model, LoraConfig(target_modules="all-linear"))


def test_transformers_add_adapter_is_refused_too(model):
    with pytest.raises(ValueError, match=REMEDY):
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))


def test_a_file_that_names_shared_layers_is_refused(model):
    state = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(8, 48)}
    with pytest.raises(ValueError, match=r"can't adapt 'model\.layers\.0\.self_attn\.q_proj', 1 such"):
        peft.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model, state_dict=state)


def test_dense_layers_are_adapted_as_ever(model, ids):
    logits = model(ids).logits.detach()
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head", "embed_tokens"]))
    equal(adapted(ids).logits.detach(), logits)
    adapted(ids, labels=ids).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora_" in name and ("lm_head" in name or "embed_tokens" in name) for name in trained)


def test_prompt_learning_is_not_refused(model, ids):
    adapted = get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert adapted(ids).logits.shape == (2, 12, 97)


def test_a_class_of_the_user_s_own_is_left_to_it(model, ids):
    """PEFT's experimental way to name a class for a kind of layer; nothing can be merged into a shared weight."""
    config = LoraConfig(target_modules=["q_proj"])
    config._register_custom_module({RPSLinear: LoraLinear})
    logits = model(ids).logits.detach()
    adapted = get_peft_model(model, config)
    equal(adapted(ids).logits.detach(), logits)
    adapted(ids, labels=ids).loss.backward()
    assert all("lora" in name for name, p in adapted.named_parameters() if p.grad is not None)
    with pytest.raises(RuntimeError, match="not stored, so the change would be lost"):
        adapted.merge_and_unload()


def test_the_remedies_help(model, tiny):
    assert get_peft_model(tiny("llama"), RPSConfig(ratio=0.01, mode="delta")).num_parameters() > 0
    get_peft_model(to_dense(model), LoraConfig(target_modules=["q_proj"]))
