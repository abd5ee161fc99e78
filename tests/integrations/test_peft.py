"""RPS as a PEFT method: its registration, its config, and what is refused before anything changes."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft_adapters import MODES, config, equal, layers, logits
from torch import nn

from hf_rps import RPSConfig, get_rps_model, size_report, to_dense
from hf_rps.integrations.peft import model as rps_peft
from hf_rps.integrations.peft import peft_type

# ---- registration and config


def test_the_enumeration_is_extended_once():
    assert PeftType.RPS.value == "RPS"
    assert PeftType("RPS") is PeftType.RPS
    assert isinstance(PeftType.RPS, PeftType)
    assert [str(member) for member in PeftType].count("PeftType.RPS") == 1
    before = list(PeftType)
    peft_type.extend(PeftType, "RPS")
    rps_peft.register()
    assert list(PeftType) == before
    assert pickle.loads(pickle.dumps(PeftType.RPS)) is PeftType.RPS
    assert copy.deepcopy(PeftType.RPS) is PeftType.RPS
    assert json.dumps({"type": PeftType.RPS}) == '{"type": "RPS"}'


def test_one_config_serves_several_models(tiny, ids, tmp_path):
    """Nothing of the first model is left in the config: not its targets, not its map."""
    settings = config("delta")
    before = settings.to_dict()
    small = get_peft_model(tiny(num_hidden_layers=1), settings)
    large = get_peft_model(tiny(num_hidden_layers=3), settings)
    assert {name: getattr(settings, name) for name in before} == before
    assert len(layers(large)) == 3 * len(layers(small))
    for name, model in (("small", small), ("large", large)):
        model.save_pretrained(tmp_path / name)
    again = PeftModel.from_pretrained(tiny(num_hidden_layers=1), tmp_path / "small")
    equal(logits(again, ids), logits(small.eval(), ids))


@pytest.mark.parametrize("field", ["mode", "bias"])
def test_bad_fields(field):
    with pytest.raises(ValueError, match=f"{field}='no'.*expected one of"):
        RPSConfig(**{field: "no"})


def test_bad_init_of_a_delta():
    with pytest.raises(ValueError, match=r"init_weights='project'.*True or False with mode='delta'"):
        RPSConfig(mode="delta", init_weights="project")


# ---- bad input


def snapshot(model):
    return {name: (type(module), id(module)) for name, module in model.named_modules()}, {
        name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()
    }


def unchanged(model, before):
    modules, parameters = before
    assert snapshot(model)[0] == modules
    for name, p in model.named_parameters():
        assert p.requires_grad == parameters[name][1]
        equal(p, parameters[name][0])


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (None, {"target_modules": ["embed_tokens"]}, "matches 'model.embed_tokens', which is a Embedding"),
        (None, {"target_modules": ["nothing"]}, "nothing"),
        (None, {"exclude_modules": r".*"}, "no module of LlamaForCausalLM is left"),
        ("nan", {}, "'model.layers.0.mlp.up_proj' holds values that are not finite"),
        ("meta", {}, "meta device"),
        ("name", {}, "attribute 'rps' of its own"),
        ("compressed", {}, "is compressed already"),
    ],
)
def test_a_refused_config_changes_nothing(tiny, spoil, settings, message):
    model = tiny()
    if spoil == "nan":
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    if spoil == "meta":
        model.model.layers[0].mlp.up_proj.to("meta")
    if spoil == "name":
        model.rps = nn.Linear(2, 2)
    if spoil == "compressed":
        get_rps_model(model, RPSConfig(ratio=0.5))
    modules = snapshot(model)[0]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config("delta", **settings))
    assert snapshot(model)[0] == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("mode", MODES)
def test_modes_and_methods_do_not_mix(tiny, ids, mode):
    model = get_peft_model(tiny(), config(mode)).eval()
    expected = logits(model, ids)
    other = "delta" if mode == "replace" else "replace"
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"carries the adapter 'default' of mode='{mode}'"):
        model.add_adapter("other", config(other))
    unchanged(model, before)
    with pytest.raises(ValueError, match=r"LORA|same type"):
        model.add_adapter("other", LoraConfig(target_modules=["up_proj"]))
    assert set(model.peft_config) == {"default"}
    equal(logits(model, ids), expected)


def test_replace_mode_says_what_it_cannot_do(tiny, ids):
    model = get_peft_model(tiny(), config("replace")).eval()
    with model.disable_adapter(), pytest.raises(ValueError, match="no model without them to run"):
        logits(model, ids)
    assert logits(model, ids).isfinite().all()
    with pytest.raises(ValueError, match="nothing to unload to; merge_and_unload"):
        model.unload()
    assert logits(model, ids).isfinite().all()
    model.add_adapter("other", config("replace"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="only one RPS adapter can replace a weight"):
        logits(model, ids)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.delete_adapter("other")
    with pytest.raises(ValueError, match=r"freed.*load one"):
        logits(model.base_model.model, ids)
    with pytest.raises(ValueError, match="nothing to start from"):
        model.add_adapter("third", config("replace"))


def test_a_deleted_replacement_can_be_loaded_again(tiny, ids, tmp_path):
    model = get_peft_model(tiny(), config("replace")).eval()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    equal(logits(model, ids), expected)


def test_files_of_different_adapters_do_not_load_together(tiny, tmp_path):
    """Same size, other seed: only the map's name in the file tells."""
    for seed in (0, 1):
        get_peft_model(tiny(), config("delta", seed=seed)).save_pretrained(tmp_path / str(seed))
    (tmp_path / "0" / "adapter_config.json").write_text((tmp_path / "1" / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="are of different adapters"):
        PeftModel.from_pretrained(tiny(), tmp_path / "0")
    with pytest.raises(ValueError, match="are of different adapters"):
        tiny().load_adapter(str(tmp_path / "0"))
    other = get_peft_model(tiny(), config("delta", seed=1))
    with pytest.raises(ValueError, match="read in the wrong places"):
        set_peft_model_state_dict(other, get_peft_model_state_dict(get_peft_model(tiny(), config("delta"))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "'model.layers.2.self_attn.q_proj', but LlamaForCausalLM has no such"),
        ({"intermediate_size": 96}, r"shape \(104, 48\), but in LlamaForCausalLM it has shape \(96, 48\)"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_of_another_model(tiny, tmp_path, mode, changes, message):
    get_peft_model(tiny(), config(mode)).save_pretrained(tmp_path)
    model = tiny(**changes)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, tmp_path)
    unchanged(model, before)


def test_an_edited_config(tiny, tmp_path):
    get_peft_model(tiny(), config("delta")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"seed": 5}))
    with pytest.raises(ValueError, match=r"records the map .* seed=5.* restore its adapter_config.json"):
        PeftModel.from_pretrained(tiny(), tmp_path)
    file.write_text(json.dumps(fields | {"modules": ["nonsense"]}))
    with pytest.raises(ValueError, match="'nonsense' is not of the form"):
        PeftModel.from_pretrained(tiny(), tmp_path)


def test_a_compressed_model_is_not_made_by_the_wrong_door(tiny):
    with pytest.raises(ValueError, match=r"mode='delta'.*get_peft_model"):
        get_rps_model(tiny(), RPSConfig(mode="delta"))
    model = get_peft_model(tiny(), config("replace"))
    with pytest.raises(ValueError, match=r"carries PEFT adapters.*merge_and_unload"):
        get_rps_model(model.base_model.model, RPSConfig())
    with pytest.raises(ValueError, match=r"carries PEFT adapters.*merge_and_unload"):
        to_dense(model)
    with pytest.raises(ValueError, match=r"carries PEFT adapters.*print_trainable_parameters"):
        size_report(model)


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_per_sample_is_refused(tiny, ids, mode):
    """PEFT passes over it without a word."""
    model = get_peft_model(tiny(), config(mode))
    with pytest.raises(ValueError, match=r"adapter_names=\['default', 'default'\].*set_adapter"):
        model(input_ids=ids, adapter_names=["default", "default"])
    with pytest.raises(ValueError, match="a batch reads one RPS adapter"):
        model.generate(input_ids=ids, adapter_names=["default", "default"], max_new_tokens=1)


def test_data_parallel_is_refused(tiny):
    layer = next(iter(layers(get_peft_model(tiny(), config("delta"))).values()))
    with pytest.raises(RuntimeError, match="one process per GPU"):
        layer._replicate_for_data_parallel()
