"""resize_token_embeddings: as ever with a dense output head, refused before anything changes with a shared one."""

import copy
import pickle

import pytest
import torch
import transformers
from checkpoints import equal
from transformers import AutoModelForCausalLM

from hf_rps import RPSConfig, get_rps_model, to_dense

SHARED_HEAD = {"target_modules": ["q_proj", "down_proj", "lm_head"]}


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("size", [130, 50])
def test_with_a_dense_head_it_resizes_as_the_dense_model_does(tiny, ids, tmp_path, size):
    """At ratio 1 a compressed model computes what the dense one computes, after the resizing, too."""
    dense, model = tiny("llama"), get_rps_model(tiny("llama"), RPSConfig(ratio=1))
    for one in (dense, model):
        torch.manual_seed(5)
        one.resize_token_embeddings(size)
    ids = ids % 50
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
    assert logits.shape[-1] == model.config.vocab_size == size
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("arguments", [{"new_num_tokens": 130}, {"new_num_tokens": 50}, {"pad_to_multiple_of": 8}])
def test_with_a_shared_head_it_is_refused_before_anything_changes(tiny, ids, tmp_path, loaded, arguments):
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.3, **SHARED_HEAD))
    if loaded:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before, modules, logits = weights(model), list(model.modules()), model(ids).logits.detach()
    with pytest.raises(ValueError, match=r"'lm_head'.* has a shared weight of 97 rows.* before get_rps_model"):
        model.resize_token_embeddings(**arguments)
    assert model.config.vocab_size == 97
    assert list(model.modules()) == modules
    for name, tensor in weights(model).items():
        equal(tensor, before[name])
    equal(model(ids).logits.detach(), logits)


def test_with_a_shared_head_what_changes_nothing_is_allowed(tiny):
    """Scripts resize to the tokenizer's length whether or not it is another, or ask for the embedding this way."""
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.3, **SHARED_HEAD))
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.resize_token_embeddings(97).weight.shape[0] == 97
    assert model.resize_token_embeddings(97, pad_to_multiple_of=97).weight.shape[0] == 97


def test_a_copy_resizes_itself(tiny):
    """Neither the original nor nothing: what a marked model carries does not hold the model."""
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.3))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in copies:
        one.resize_token_embeddings(110)
        assert one.get_input_embeddings().num_embeddings == one.lm_head.out_features == 110
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 97


def test_the_remedy_helps(tiny, ids):
    model = to_dense(get_rps_model(tiny("llama"), RPSConfig(ratio=0.3, **SHARED_HEAD)))
    assert "_resize_token_embeddings" not in vars(model)
    model.resize_token_embeddings(110)
    assert get_rps_model(model, RPSConfig(ratio=0.3, **SHARED_HEAD))(ids).logits.shape[-1] == 110


def test_a_subclass_with_a_resizing_of_its_own_keeps_it():
    """Marian's takes other arguments, and resizes the decoder's embedding, too."""
    config = transformers.MarianConfig(
        vocab_size=97, decoder_vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=96,
        decoder_start_token_id=96,
    )  # fmt: skip
    model = get_rps_model(transformers.MarianMTModel(config).eval(), RPSConfig(ratio=0.3))
    model.resize_token_embeddings(110)
    ids = torch.arange(8).view(1, 8) + 100
    assert model(input_ids=ids, decoder_input_ids=ids).logits.shape[-1] == 110
