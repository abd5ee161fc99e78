"""A copy of the model that others load by its name: never the dense model in the place of the compressed one.

TRL's DPO, KTO, GRPO and RLOO trainers load their reference model this way where they are given none.
"""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank

LOG_2 = 0.6931  # DPO's loss where policy and reference are the same


def as_trl_does(model):
    """``create_model_from_path(get_config_model_id(model.config))`` of trl 1.16: the reference model."""
    name = getattr(model.config, "_name_or_path", "")
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    architecture = getattr(transformers, config.architectures[0])
    kept = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation, "device_map": None}
    return architecture.from_pretrained(name, **kept)


@torch.no_grad()
def dpo_loss(policy, reference, ids):
    """-log sigmoid(0.1 * (log-ratio of the chosen text minus that of the rejected one))."""
    ratios = []
    for model in (policy, reference):
        log_probs = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))
        ratios.append(log_probs[0] - log_probs[1])
    return -F.logsigmoid(0.1 * (ratios[0] - ratios[1])).item()


@pytest.fixture
def dense(tiny, tmp_path):
    """A model loaded from a checkpoint that names it, and large enough weights for a loss that tells models apart."""
    model = tiny("llama", initializer_range=0.3)
    model.save_pretrained(tmp_path / "dense")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


def test_a_model_compressed_in_memory_has_no_name_to_load(dense, ids):
    """The dense checkpoint's name would give a reference that computes something else, without a word."""
    model = get_rps_model(dense, RPSConfig(ratio=0.3))
    for one in (model, model.base_model):
        assert one.name_or_path == one.config.name_or_path == one.config._name_or_path == ""
    with pytest.raises(OSError, match="Repo id must"):
        as_trl_does(model)
    assert dpo_loss(model, copy.deepcopy(model), ids) == pytest.approx(LOG_2, abs=1e-4)  # what the docs say to pass


def test_the_dense_model_would_be_a_wrong_reference(dense, ids):
    reference = copy.deepcopy(dense)
    assert abs(dpo_loss(get_rps_model(dense, RPSConfig(ratio=0.3)), reference, ids) - LOG_2) > 0.01


def test_a_dense_checkpoint_compressed_while_loading_has_none_either(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=RPSConfig(ratio=0.3))
    assert model.config._name_or_path == model.name_or_path == ""


def test_a_compressed_checkpoint_s_own_name_is_kept(dense, ids, tmp_path):
    get_rps_model(dense, RPSConfig(ratio=0.3)).save_pretrained(tmp_path / "compressed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert model.config._name_or_path == model.name_or_path == str(tmp_path / "compressed")
    reference = as_trl_does(model)
    assert find_bank(reference) is not None
    assert dpo_loss(model, reference, ids) == pytest.approx(LOG_2, abs=1e-4)


def test_making_the_model_dense_again_does_not_bring_the_name_back(dense, ids):
    """Its weights are no longer those of the checkpoint."""
    original = copy.deepcopy(dense)
    model = to_dense(get_rps_model(dense, RPSConfig(ratio=0.3)))
    assert abs(dpo_loss(model, original, ids) - LOG_2) > 0.01
    assert model.config._name_or_path == model.name_or_path == ""


def test_models_inside_have_no_name_either():
    """An encoder that was loaded from its own checkpoint is compressed with the model that it is part of."""
    vit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    encoder = transformers.ViTConfig(**vit, image_size=32, patch_size=8)
    decoder = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = transformers.VisionEncoderDecoderModel(config)
    model.encoder.config.name_or_path = model.encoder.name_or_path = "some/vit"
    get_rps_model(model, RPSConfig(ratio=0.3))
    assert model.encoder.config.name_or_path == model.encoder.name_or_path == ""


def test_other_readers_of_the_name_find_none(dense):
    """PEFT records it as the base of an adapter, and takes '' for none, as of a model made from a config."""
    model = get_rps_model(dense, RPSConfig(ratio=0.3))
    adapted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert not adapted.peft_config["default"].base_model_name_or_path
