"""PEFT's own methods on a compressed model: LoRA learns beside shared weights; the others are refused where they reach
for shared layers, with what to do instead."""

import warnings

import peft
import pytest
import torch
from checkpoints import equal
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank
from hf_rps.layers.linear import RPSLinear

REMEDY = r"share one array.*Train it as it is.*mode='delta'.*to_dense"
SHARED = {
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
    with pytest.raises(ValueError, match=rf"target_modules='all-linear' of LOHA would pass by.*{REMEDY}"):
        get_peft_model(model, peft.LoHaConfig(target_modules="all-linear"))


def test_transformers_add_adapter_is_refused_too(model):
    with pytest.raises(ValueError, match=REMEDY):
        model.add_adapter(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


def test_a_file_that_names_shared_layers_is_refused(model):
    state = {"model.layers.0.self_attn.q_proj.hada_w1_a": torch.zeros(8, 48)}
    with pytest.raises(ValueError, match=r"can't adapt 'model\.layers\.0\.self_attn\.q_proj', 1 such"):
        peft.inject_adapter_in_model(peft.LoHaConfig(target_modules=["q_proj"]), model, state_dict=state)


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
    assert type(adapted.base_model.model.model.layers[0].self_attn.q_proj) is LoraLinear
    equal(adapted(ids).logits.detach(), logits)
    with pytest.raises(RuntimeError, match="not stored, so the change would be lost"):
        adapted.merge_and_unload()


# ---- LoRA beside shared weights


BASES = {
    "drawn": {"ratio": 0.3},
    "folded input": {"ratio": 0.3, "input_fold": 2},
    "learned": {"mapping": "codebook", "bits": 3},
}
LORA = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "by default": {},
    "the dense head, too": {"target_modules": ["lm_head", "q_proj"]},
    "expression": {"target_modules": r".*\.(down|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "rslora, gaussian": {"target_modules": ["v_proj"], "use_rslora": True, "init_lora_weights": "gaussian"},
}


def near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def trained(model, ids, steps=4):
    """Logits after a few steps of what is trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()(ids).logits.detach()


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_lora_learns_beside_a_frozen_array(tiny, ids, tmp_path, base, name):
    """It starts where its base is, changes nothing of it, and goes with its files onto the base again."""
    model = get_rps_model(tiny("llama"), RPSConfig(**base)).eval()
    model.save_pretrained(tmp_path / "base")
    before, psi = model(ids).logits.detach(), find_bank(model).psi.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unsupported layer type")
        adapted = get_peft_model(model, LoraConfig(r=4, **LORA[name]))
    near(adapted.eval()(ids).logits.detach(), before)
    learning = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert learning
    assert all(".lora_" in n for n in learning)
    after = trained(adapted, ids)
    assert (after - before).abs().max() > 1e-2
    assert find_bank(model).psi.equal(psi)
    with adapted.disable_adapter():
        equal(adapted(ids).logits.detach(), before)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    near(again(ids).logits.detach(), after)
    near(again.unload()(ids).logits.detach(), before)


def test_all_linear_is_all_but_the_head(tiny):
    """Those that are shared and those that were left dense, as in the dense model."""
    expected = get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear"))
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.3, layers_to_transform=[0, 1]))
    found = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert set(found.targeted_module_names) == set(expected.targeted_module_names)
    tied = tiny("llama", tie_word_embeddings=True)
    tied = get_peft_model(
        get_rps_model(tied, RPSConfig(share_embeddings=True)), LoraConfig(target_modules="all-linear")
    )
    assert set(tied.targeted_module_names) == set(expected.targeted_module_names)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_is_merged_where_weights_are_their_own(tiny, ids, tmp_path, kind):
    """GPT-2's layers store their weights transposed."""
    model = get_rps_model(tiny(kind), RPSConfig(ratio=0.3))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    after, modules = trained(adapted, ids), list(adapted.modules())
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match=r"can't be merged into.*to_dense"):
            merge()
    assert list(adapted.modules()) == modules
    near(adapted(ids).logits.detach(), after)
    adapted.save_pretrained(tmp_path)
    dense = PeftModel.from_pretrained(to_dense(adapted.unload()), tmp_path).merge_and_unload()
    near(dense.eval()(ids).logits.detach(), after)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_lora_that_changes_its_base_is_refused(model, ids, init):
    modules = list(model.modules())
    with pytest.raises(ValueError, match=rf"init_lora_weights='{init}' changes the weights of the base"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=init))
    assert list(model.modules()) == modules


def test_several_adapters_and_transformers_own_way(tiny, ids, tmp_path):
    model = get_rps_model(tiny("llama"), RPSConfig(mapping="codebook", bits=4)).eval()
    before = model(ids).logits.detach()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="one")
    one = trained(adapted, ids)
    adapted.add_adapter("two", LoraConfig(r=3, target_modules=["q_proj", "o_proj"]))
    adapted.set_adapter("two")
    equal(adapted.eval()(ids).logits.detach(), before)
    adapted.set_adapter("one")
    equal(adapted(ids).logits.detach(), one)
    model = get_rps_model(tiny("llama"), RPSConfig(mapping="codebook", bits=4))
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    near(model.eval()(ids).logits.detach(), before)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_remedies_help(model, tiny):
    assert get_peft_model(tiny("llama"), RPSConfig(ratio=0.01, mode="delta")).num_parameters() > 0
    get_peft_model(to_dense(model), LoraConfig(target_modules=["q_proj"]))
