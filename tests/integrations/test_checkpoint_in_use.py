"""A loaded checkpoint under other heads, generate, pipelines, gradient checkpointing, Trainer, and made dense."""

import copy
import gc
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from checkpoints import equal
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank
from hf_rps.layers.linear import RPSLinear


def test_head_to_base_to_head(saved, ids, tmp_path):
    model, folder = saved
    base = AutoModel.from_pretrained(folder)
    equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    equal(back.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    model.model.save_pretrained(tmp_path / "part")
    equal(AutoModel.from_pretrained(tmp_path / "part")(ids).last_hidden_state, base(ids).last_hidden_state)


def test_a_head_class_without_the_pooler_and_its_own_checkpoint(tiny, ids, tmp_path):
    model = get_rps_model(tiny("bert", AutoModelForSequenceClassification), RPSConfig(ratio=0.2))
    model.save_pretrained(tmp_path / "a")
    masked = AutoModelForMaskedLM.from_pretrained(tmp_path / "a")
    equal(masked.bert(ids).last_hidden_state, model.bert(ids).last_hidden_state)
    masked.save_pretrained(tmp_path / "b")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "b")
    equal(again(ids).logits, masked(ids).logits)
    pooled = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    equal(pooled.bert.pooler.dense.dense_weight(), model.bert.pooler.dense.dense_weight())  # psi still holds it
    equal(pooled.bert(ids).last_hidden_state, model.bert(ids).last_hidden_state)


def test_explicit_targets_in_a_head(tiny, ids, tmp_path):
    model = tiny("bert", AutoModelForMaskedLM)
    get_rps_model(model, RPSConfig(ratio=0.2, target_modules=["query", "transform.dense"]))
    assert isinstance(model.cls.predictions.transform.dense, RPSLinear)
    model.save_pretrained(tmp_path)
    equal(AutoModelForMaskedLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_generate_with_a_cache(saved, ids):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    tokens = loaded.generate(ids, **options)
    equal(tokens, to_dense(copy.deepcopy(model)).generate(ids, **options))
    equal(tokens, loaded.generate(ids, use_cache=False, **options))


def test_pipeline(saved):
    from transformers import ByT5Tokenizer

    model, folder = saved
    tokenizer = ByT5Tokenizer(extra_ids=0)
    model = get_rps_model(to_dense(model), RPSConfig(ratio=0.5))
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert pipeline("text-generation", model=str(folder), max_new_tokens=3)("hello")[0]["generated_text"].startswith(
        "hello"
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(saved, ids, reentrant):
    _, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder).train()
    loaded(ids, labels=ids).loss.backward()
    expected = find_bank(loaded).psi.grad.clone()
    loaded.zero_grad()
    loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        loaded.enable_input_require_grads()
    loaded(ids, labels=ids).loss.backward()
    torch.testing.assert_close(find_bank(loaded).psi.grad, expected)


def test_dense_checkpoint_with_a_quantization_config(tiny, ids, tmp_path):
    dense = tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=RPSConfig(ratio=1))
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=RPSConfig(ratio=0.1))
    assert find_bank(model).weight_map.ratio == 0.1
    model.save_pretrained(tmp_path / "small")
    equal(AutoModelForCausalLM.from_pretrained(tmp_path / "small")(ids).logits, model(ids).logits)
    assert model.train()(ids, labels=ids).loss.requires_grad


def test_dequantize_is_to_dense(saved, ids):
    model, folder = saved
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert find_bank(dense) is None
    torch.testing.assert_close(dense(ids).logits, model(ids).logits)
    dense.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("come_by", ["converted", "loaded", "converted on load", "copied", "pickled"])
def test_a_dense_model_again_bears_no_mark(saved, tiny, tmp_path, come_by):
    """to_dense leaves what was there before, however the compressed model came about, and it can be compressed anew."""
    model, folder = saved
    untouched = {name for name in tiny("llama").__dict__ if not name.startswith("__")}
    if come_by == "converted on load":
        tiny("llama").save_pretrained(tmp_path / "dense")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=RPSConfig(ratio=0.1))
    elif come_by == "loaded":
        model = AutoModelForCausalLM.from_pretrained(folder)
    elif come_by != "converted":
        model = {"copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}[come_by](model)
    marked = {"hf_quantizer", "quantization_method", "is_quantized", "gather_sharded_state_dict_for_save"}
    for one in (model, model.base_model):
        assert marked <= one.__dict__.keys()
    to_dense(model)
    for one in (model, model.base_model):
        assert not marked & one.__dict__.keys()
        assert not any("rps" in str(value) for value in (one.__dict__.keys() - untouched, one.model_tags))
        assert not hasattr(one.config, "quantization_config")
    again = get_rps_model(model, RPSConfig(ratio=0.2, seed=5))
    again.save_pretrained(tmp_path / "again")
    assert find_bank(AutoModelForCausalLM.from_pretrained(tmp_path / "again")).weight_map.seed == 5


def trainer(model, folder, **options):
    data = [{"input_ids": torch.arange(i, i + 8) % 97, "labels": torch.arange(i, i + 8) % 97} for i in range(16)]
    arguments = {"per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True,
                 "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2,
                 "logging_steps": 100}  # fmt: skip
    return Trainer(
        model, TrainingArguments(str(folder), **(arguments | options)), train_dataset=data, eval_dataset=data
    )


def test_trainer_resumes(tiny, tmp_path):
    full = trainer(get_rps_model(tiny("llama"), RPSConfig(ratio=0.2)), tmp_path / "full", max_steps=6)
    full.train()
    trainer(get_rps_model(tiny("llama"), RPSConfig(ratio=0.2)), tmp_path / "part", max_steps=4).train()
    resumed = trainer(get_rps_model(tiny("llama"), RPSConfig(ratio=0.2)), tmp_path / "part", max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(resumed.model.state_dict(), full.model.state_dict(), rtol=1e-4, atol=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "checkpoint-6")
    equal(loaded.state_dict(), full.model.state_dict())


def test_trainer_loads_the_best_model(tiny, tmp_path):
    run = trainer(get_rps_model(tiny("llama"), RPSConfig(ratio=0.2)), tmp_path, max_steps=6, eval_strategy="steps",
                  eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss")  # fmt: skip
    run.train()
    best = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    equal(best.state_dict(), run.model.state_dict())
    assert isinstance(run.model.model.layers[0].mlp.up_proj, RPSLinear)


def test_a_model_from_a_gguf_file_is_float(tiny, ids, tmp_path):
    """transformers calls it quantised, though it has dequantised every tensor while loading."""
    model = tiny("llama")
    method = SimpleNamespace(quant_method="gguf")
    model.hf_quantizer = SimpleNamespace(quantization_config=method)
    model.is_quantized, model.config.quantization_config = True, method
    expected = model(ids).logits
    get_rps_model(model, RPSConfig(ratio=1))
    torch.testing.assert_close(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "small")
    equal(AutoModelForCausalLM.from_pretrained(tmp_path / "small")(ids).logits, model(ids).logits)
    to_dense(model).save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(ids).logits, expected)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="other"))
    with pytest.raises(ValueError, match="is quantised with other"):
        get_rps_model(model, RPSConfig(ratio=1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_base_whose_head_is_gone_is_copied(tiny, ids, copied):
    """The hooks that open a pass were put on both."""
    base = get_rps_model(tiny("llama"), RPSConfig(ratio=0.25)).model
    gc.collect()
    twin = copied(base)
    equal(twin(ids).last_hidden_state, base(ids).last_hidden_state)
    twin(ids).last_hidden_state.sum().backward()
    assert find_bank(twin).psi.grad is not None
    assert find_bank(base).psi.grad is None
    assert not to_dense(twin)._forward_hooks


def test_an_output_head_that_was_untied_is_saved(tiny, ids, tmp_path):
    """Equal to the embeddings still, but by the config it is not tied to them when it is loaded."""
    model = get_rps_model(tiny("gpt2"), RPSConfig(ratio=0.25))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight
    equal(loaded(ids).logits, model(ids).logits)


def test_a_compressed_head_that_the_class_ties(ids, tmp_path):
    """T5 says that its head is tied whatever its config says; one that was untied by hand is loaded as it was."""
    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
    get_rps_model(model, RPSConfig(ratio=0.5, target_modules=["lm_head", "q"]))
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    for name in ("once", "again"):
        model.save_pretrained(tmp_path / name)
        model = T5ForConditionalGeneration.from_pretrained(tmp_path / name)
        equal(model(input_ids=ids, decoder_input_ids=ids).logits, expected)
