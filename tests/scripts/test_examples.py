"""The scripts that people copy run, and the adapter comparison counts what it says it counts."""

import re

import pytest
import torch
from forks import forks
from paths import SCRIPTS
from transformers import AutoModelForCausalLM, ByT5Tokenizer, ViTForImageClassification

from hf_rps import size_report


@pytest.mark.parametrize("mode", ["delta", "replace"])
def test_peft_adapter(tiny, tmp_path, mode):
    """The merged model of the example is a plain one that has learnt its text."""
    base = tmp_path / "base"
    tiny(vocab_size=384).save_pretrained(base)
    ByT5Tokenizer(extra_ids=0).save_pretrained(base)
    (tmp_path / "text.txt").write_text("the same line again and again\n" * 64)
    arguments = ["--model_name_or_path", base, "--mode", mode, "--train_file", tmp_path / "text.txt", "--output_dir",
                 tmp_path / "out", "--ratio", 0.1, "--learning_rate", 2e-2, "--max_steps", 40]  # fmt: skip
    child = forks().run(SCRIPTS / "examples" / "peft_adapter.py", arguments, tmp_path)
    assert child.returncode == 0, child.stderr[-3000:]
    ids = torch.tensor([ByT5Tokenizer(extra_ids=0)("the same line again and again").input_ids])
    losses = {}
    for name in ("base", "out/merged"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            losses[name] = model(ids, labels=ids).loss.item()
    assert losses["out/merged"] < losses["base"] - 0.5  # embeddings and head are frozen


def test_trainer(tmp_path):
    """The example learns, keeps its best checkpoint, and its model loads small, in another process."""
    script, model = SCRIPTS / "examples" / "trainer.py", tmp_path / "out" / "model"
    child = forks().run(script, [tmp_path / "out"], tmp_path)
    assert child.returncode == 0, child.stderr[-3000:]
    assert float(re.findall(r"'eval_accuracy': '?([\d.]+)", child.stdout)[-1]) > 0.8
    loaded = ViTForImageClassification.from_pretrained(model)
    report = size_report(loaded)
    assert report.m == pytest.approx(0.1 * report.n, rel=0.01)
    assert (model / "model.safetensors").stat().st_size < 0.25 * report.dense_bytes


@pytest.mark.parametrize("method", ["RPS", "RPS-folded", "LoRA", "VeRA", "UniLoRA", "UniLoRA-all"])
def test_adapters_of_the_comparison_have_equal_budgets(method):
    """On an encoder of MiniLM's shape, but one head and small."""
    from peft import get_peft_model
    from transformers import BertConfig, BertModel

    from studies.adapters import adapter_config

    config = BertConfig(hidden_size=48, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4)
    for budget in (576, 1152):
        encoder = BertModel(config)
        model = get_peft_model(encoder, adapter_config(method, budget, encoder))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == budget
