"""Adapters of learned maps with the rest: heads, biases, dtypes, other classes, Trainer, transformers' own adapters."""

import pytest
import torch
from codebook_adapters import IDS, array, compressed, config, step, trained
from peft import PeftModel, get_peft_model
from peft_adapters import equal, logits
from sentences import TEXTS, sentence_transformer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

from hf_rps import get_rps_config, get_rps_model, to_dense
from hf_rps.conversion import find_bank, shared_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a saved base."""
    folder = tmp_path_factory.mktemp("base")
    compressed().save_pretrained(folder)
    return folder


def test_heads_and_biases_are_trained_and_saved(tmp_path):
    def make():
        return compressed("bert", AutoModelForSequenceClassification)

    model = get_peft_model(make(), config(task_type="SEQ_CLS", bias="rps_only"))
    layers = shared_layers(model)
    biases = [f"{name}.bias" for name in layers]
    others = [name for name in trained(model) if name not in biases]
    assert set(biases) <= set(trained(model))
    assert all("classifier.modules_to_save.default" in n or "rps_banks.default" in n for n in others)
    assert len(others) == 3
    outputs = step(model, labels=torch.tensor([0, 1]))
    model.save_pretrained(tmp_path)
    equal(logits(PeftModel.from_pretrained(make(), tmp_path).eval(), IDS), outputs)


def test_an_adapter_of_the_base_model_serves_under_a_head(tmp_path):
    """The head's class lacks the pooler, whose codebooks are in the array all the same."""
    compressed("bert", AutoModel).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), config())
    model(IDS).last_hidden_state.square().sum().backward()
    with torch.no_grad():
        array(model).sub_(array(model).grad, alpha=1e-3)
    model.save_pretrained(tmp_path / "task")
    headed = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    headed = PeftModel.from_pretrained(headed, tmp_path / "task", is_trainable=True)
    equal(headed.base_model.model.bert(IDS).last_hidden_state, model(IDS).last_hidden_state)
    before = array(headed).detach().clone()
    step(headed)
    assert not torch.equal(array(headed), before)


def test_half_precision(folder, tmp_path):
    """As PEFT does, the adapter of a bfloat16 base is float32; merged it computes the same."""

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    model = get_peft_model(load(), config())
    assert array(model).dtype == torch.float32
    outputs = step(model)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    assert find_bank(merged).psi.dtype == torch.bfloat16
    equal(logits(merged, IDS), outputs)
    equal(logits(PeftModel.from_pretrained(load(), tmp_path), IDS), outputs)


def test_trainer_resumes(folder, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 97, (16, 12))]

    def trainer():
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config(task_type="CAUSAL_LM"))
        return Trainer(model, arguments, train_dataset=rows)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    equal(array(resumed.model), array(whole.model))
    assert not torch.equal(array(resumed.model), find_bank(resumed.model).psi)


def test_convolutions_and_transformers_own_adapters(tmp_path):
    sizes = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3)
    x = torch.randn(2, 3, 32, 32)
    get_rps_model(ResNetForImageClassification(sizes).eval(), config()).save_pretrained(tmp_path / "base")
    model = ResNetForImageClassification.from_pretrained(tmp_path / "base")
    expected = model(x).logits
    model.add_adapter(config(), "a")
    equal(model(x).logits, expected)
    with torch.no_grad():
        array(model, "a").mul_(1.2)
    outputs = model(x).logits
    model.save_pretrained(tmp_path / "task")
    again = ResNetForImageClassification.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "task"), "other")
    equal(again(x).logits, outputs)
    again.disable_adapters()
    equal(again(x).logits, expected)
    model.delete_adapter("a")
    model.save_pretrained(tmp_path / "again")  # the base, as there is no adapter left
    equal(ResNetForImageClassification.from_pretrained(tmp_path / "again")(x).logits, expected)
    get_rps_model(to_dense(model), config(bits=2))  # another base in the same object
    expected = model(x).logits
    assert not torch.equal(expected, outputs)
    model.add_adapter(config(), "a")
    equal(model(x).logits, expected)
    assert array(model, "a").shape == find_bank(model).psi.shape


def test_what_is_left_out_follows_from_the_base(tmp_path):
    """One config serves bases of other bits; what is recorded is the base's."""
    settings = config()
    for options in ({"bits": 2}, {"bits": 3, "group_size": 24, "init_std": 0.5}):
        base = compressed(**options)
        model = get_peft_model(base, settings)
        model.save_pretrained(tmp_path)
        found = type(settings).from_pretrained(tmp_path)
        assert {name: getattr(found, name) for name in options} == options
        assert found.fingerprint == find_bank(model).weight_map.fingerprint
        assert found.learned == get_rps_config(base).learned
        PeftModel.from_pretrained(compressed(**options), tmp_path)
    get_peft_model(compressed(bits=2), config(bits=2, target_modules=r".*_proj"))
    get_peft_model(compressed(bits=2), get_rps_config(compressed(bits=2)))


def test_sentence_transformers(tmp_path):
    from sentence_transformers import SentenceTransformer

    model = sentence_transformer(compressed("bert", AutoModel), tmp_path / "base")
    plain = model.encode(TEXTS, convert_to_tensor=True)
    model.add_adapter(config())
    with torch.no_grad():
        array(model).mul_(1.3)
    expected = model.encode(TEXTS, convert_to_tensor=True)
    assert not torch.equal(expected, plain)
    model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    equal(again.encode(TEXTS, convert_to_tensor=True), expected)
