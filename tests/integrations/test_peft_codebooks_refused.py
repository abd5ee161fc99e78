"""What an adapter of a learned map can't be put on, or loaded on: refused, with what to do, before anything changes."""

import json

import pytest
import torch
from codebook_adapters import IDS, array, compressed, config, step
from peft import LoHaConfig, PeftModel, get_peft_model
from peft_adapters import equal, logits
from tiny_configs import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from hf_rps import RPSConfig, get_rps_model, to_dense


def dense(seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config("llama")).eval()


def state(model):
    return {name: (type(module), id(module)) for name, module in model.named_modules()}, {
        name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()
    }


def unchanged(model, before):
    modules, parameters = before
    now = state(model)
    assert now[0] == modules
    assert now[1].keys() == parameters.keys()
    for name, (requires_grad, tensor) in parameters.items():
        assert now[1][name][0] == requires_grad
        equal(now[1][name][1], tensor)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (dense, config(), r"is dense.*Make the base first.*get_rps_model\(model, RPSConfig\(mapping='codebook'\)"),
        (lambda: get_rps_model(dense(), RPSConfig(ratio=0.3)), config(), "compressed already.*mapping='fold'"),
        (compressed, RPSConfig(mode="delta", ratio=0.1), r"any change.*get_peft_model\(model, RPSConfig\(mapping='co"),
        (compressed, RPSConfig(), r"mode='replace', mapping='fold'\) is for dense weights.*get_peft_model"),
        (compressed, config(bits=4), r"bits=4.*has bits=3.*Leave bits out"),
        (compressed, config(group_size=8), r"group_size=8.*has group_size=None"),
        (compressed, config(seed=1), r"seed=1.*has seed=0"),
        (compressed, config(init_std=0.5), r"init_std=0.5.*has init_std=0\.\d+"),
        (compressed, config(target_modules=["q_proj"]), r"all 21 compressed layers.*down_proj.*left out"),
        (compressed, config(target_modules=r".*(_proj|lm_head)"), r"'lm_head' is not compressed \(modules_to_save"),
        (compressed, config(exclude_modules=["q_proj"]), "leave exclude_modules out"),
        (compressed, config(layers_to_transform=[0]), "leave layers_to_transform out"),
        (compressed, config(modules_to_save=["mlp"]), r"matches 'model.layers.0.mlp'.*gate_proj' is compressed"),
        (lambda: nn.ModuleList([compressed(), compressed()]), config(), r"holds 2 shared arrays, in .* by itself"),
    ],
)  # fmt: skip
def test_configs_and_models(make, settings, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, settings)
    unchanged(model, before)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The folder of an adapter of ``compressed()``."""
    folder = tmp_path_factory.mktemp("task")
    model = get_peft_model(compressed(), config())
    step(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compressed(seed=1), "belong to the codes of the map .* has the map .* stand for other weights"),
        (lambda: compressed(bits=4), "belong to the codes of the map .* has the map"),
        (dense, "records the learned map .* is dense"),
    ],
)
def test_another_base(task, make, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, task)
    unchanged(model, before)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(task))
    unchanged(model, before)


def test_a_config_of_another_adapter(task, tmp_path):
    """The config fits this base, the file is another's: its tensors tell."""
    get_peft_model(compressed(seed=1), config()).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes((task / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="are of different adapters"):
        PeftModel.from_pretrained(compressed(seed=1), tmp_path)
    with pytest.raises(ValueError, match="are of different adapters"):
        compressed(seed=1).load_adapter(str(tmp_path))
    edited = json.loads((task / "adapter_config.json").read_text()) | {"bits": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=r"bits=2.*has bits=3"):
        PeftModel.from_pretrained(compressed(), tmp_path)


def test_one_adapter_at_a_time():
    model = get_peft_model(compressed(), config(), adapter_name="a")
    model.add_adapter("b", config())
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"one adapter at a time.*add_weighted_adapter"):
        logits(model, IDS)
    with pytest.raises(ValueError, match="codebooks of one adapter"):
        model.merge_adapter()
    model.set_adapter("b")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="additionally"), pytest.raises(ValueError, match=r"\['b', 'a'\]; merge one"):
        model.merge_adapter(["a"])
    assert model.get_model_status().merged_adapters == ["b"]


def test_a_broken_adapter_is_not_merged():
    model = get_peft_model(compressed(), config())
    with torch.no_grad():
        array(model)[3] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == []


def test_what_is_inside_is_not_saved_or_taken_apart_by_itself(tmp_path):
    model = get_peft_model(compressed(), config())
    inner = model.base_model.model
    with pytest.raises(ValueError, match=r"read the codebooks of the adapters \['default'\].*merge_and_unload"):
        inner.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"read the codebooks of the adapters \['default'\].*merge_and_unload"):
        to_dense(inner.model)
    with pytest.raises(ValueError, match=r"the adapters \['default'\] of a model around it"):
        get_peft_model(inner.model, config())


@pytest.mark.parametrize("saved", [None, ["q_proj"]])
def test_other_methods_name_the_adapter_that_there_is(saved):
    model = compressed()
    before = state(model)
    targets = ["lm_head" if saved else "q_proj"]
    message = "modules_to_save=.* is compressed" if saved else r"get_peft_model\(model, RPSConfig\(mapping='codebook'\)"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoHaConfig(target_modules=targets, modules_to_save=saved))
    unchanged(model, before)
