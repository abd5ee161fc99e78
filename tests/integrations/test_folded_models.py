"""Models whose inputs are folded: saved, loaded, trained, made dense, and as adapters."""

import copy
import json

import pytest
import torch
import transformers
from checkpoints import equal
from peft import PeftModel, get_peft_model
from peft_adapters import MODES
from tiny_configs import tiny_config
from torch import nn

from hf_rps import RPSConfig, get_rps_config, get_rps_model, size_report, to_dense
from hf_rps.conversion import find_bank
from hf_rps.mappings.input_fold import FoldedMatrix

RESNET = transformers.ResNetConfig(
    embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=7, layer_type="basic"
)
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(tiny_config("llama")),
    "gpt2": lambda: transformers.GPT2LMHeadModel(tiny_config("gpt2")),
    "bert": lambda: transformers.BertForSequenceClassification(tiny_config("bert")),
    "resnet": lambda: transformers.ResNetForImageClassification(RESNET),
}


def logits(model, ids):
    if isinstance(model, transformers.ResNetForImageClassification):
        return model(pixel_values=torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).logits
    return model(input_ids=ids).logits


@pytest.mark.parametrize("fold", [4, "full"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_saved_and_loaded_and_made_dense(name, fold, ids, tmp_path):
    torch.manual_seed(0)
    model = get_rps_model(MODELS[name]().eval(), RPSConfig(ratio=0.1, input_fold=fold))
    assert all(isinstance(m, FoldedMatrix) for m in find_bank(model).array.matrices.values())
    report = size_report(model)
    assert report.m == pytest.approx(0.1 * report.n, rel=0.01)
    assert report.multiplications < report.dense_multiplications * 0.6
    with torch.no_grad():
        find_bank(model).psi.mul_(1.5)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert recorded["input_fold"] == fold
    loaded = type(model).from_pretrained(tmp_path)
    equal(logits(loaded, ids), expected)
    torch.testing.assert_close(logits(to_dense(loaded), ids), expected)


def test_a_changed_fold_is_refused(ids, tmp_path):
    get_rps_model(MODELS["llama"](), RPSConfig(ratio=0.1, input_fold=4)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["input_fold"] = 5
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"fingerprint|checkpoint's m"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_recorded_config_gives_the_same_folds(ids):
    one = get_rps_model(MODELS["llama"]().eval(), RPSConfig(ratio=0.1, input_fold="full"))
    two = get_rps_model(MODELS["llama"]().eval(), get_rps_config(one))
    two.load_state_dict(one.state_dict())
    equal(logits(two, ids), logits(one, ids))


def test_at_ratio_one_nothing_changes(ids):
    dense = MODELS["gpt2"]().eval()
    model = get_rps_model(copy.deepcopy(dense), RPSConfig(ratio=1, input_fold="full"))
    torch.testing.assert_close(logits(model, ids), logits(dense, ids))


@pytest.mark.parametrize("mode", MODES)
def test_adapters(mode, ids, tmp_path):
    base = MODELS["llama"]().eval()
    config = RPSConfig(ratio=0.05, mode=mode, input_fold=16, init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model(input_ids=ids.repeat(4, 8), labels=ids.repeat(4, 8)).loss.backward()  # many tokens: not by a sum of weights
    gradient = model.base_model.model.rps.rps_banks["default"].psi.grad
    assert gradient.norm() > 0
    model.save_pretrained(tmp_path)
    expected = logits(model, ids)
    equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval(), ids), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), expected)


def test_a_model_learns(ids):
    """A few steps fit a batch, with few tokens and with many."""
    torch.manual_seed(0)
    model = get_rps_model(MODELS["gpt2"](), RPSConfig(ratio=0.25, input_fold=4, grad_scaling="norm"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
