"""An RPS adapter with the rest: Trainer, heads and biases, quantised bases, sentence-transformers, model cards."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_adapters import MODES, config, equal, layers, logits, psi
from safetensors.torch import load_file
from sentences import TEXTS, sentence_transformer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_rps import RPSConfig


@pytest.mark.parametrize("mode", MODES)
def test_trainer_trains_resumes_and_saves(tiny, tmp_path, mode):
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 97, (16, 12))]

    def trainer(folder, **changes):
        arguments = TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=3, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True, **changes,
        )  # fmt: skip
        torch.manual_seed(0)
        return Trainer(
            get_peft_model(tiny(), RPSConfig(ratio=0.2, mode=mode, task_type="CAUSAL_LM")),
            arguments,
            train_dataset=rows,
        )

    whole = trainer(tmp_path / "run")
    start = psi(whole.model).detach().clone()
    whole.train()
    assert not torch.equal(psi(whole.model), start)
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    equal(psi(resumed.model).detach(), psi(whole.model).detach())


def test_classification_head_and_biases_are_saved(tiny, ids, tmp_path):
    def make():
        return tiny("bert", AutoModelForSequenceClassification, num_labels=3)

    settings = config("delta", task_type="SEQ_CLS", bias="rps_only")
    model = get_peft_model(make(), settings).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in saved
    assert sum(key.endswith(".bias") and "classifier" not in key for key in saved) == len(layers(model))
    equal(logits(PeftModel.from_pretrained(make(), tmp_path).eval(), ids), logits(model, ids))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_delta_on_a_quantised_base(tiny, tmp_path, bits):
    """It computes what the dequantised base plus the delta does, trains, reloads and merges; replacing is refused."""
    from transformers import BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    tiny(**sizes).save_pretrained(tmp_path / "base")
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}

    def load():
        quantised = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantised, device_map="cpu", dtype=torch.float32
        )

    ids = torch.arange(80).view(2, 40) * 5 % 97
    model = get_peft_model(load(), config("delta")).eval()
    assert {layer.quantization_backend.backend_name for layer in layers(model).values()} == {f"bnb {bits}bit"}
    dense = tiny(**sizes)
    for name, layer in layers(model).items():
        weight = layer.get_base_weight() + layer.get_delta_weight("default")
        dense.get_parameter(f"{name.removeprefix('base_model.model.')}.weight").data.copy_(weight)
    expected = logits(model, ids)
    torch.testing.assert_close(expected, logits(dense, ids), rtol=0.02, atol=0.02)
    model(input_ids=ids, labels=ids).loss.backward()
    assert psi(model).grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again, ids), expected, rtol=0.01, atol=0.01)
    model.merge_adapter()
    assert (logits(model, ids) - expected).norm() < 0.5 * (logits(load().eval(), ids) - expected).norm()
    with pytest.raises(ValueError, match="RPS shares float weights"):
        get_peft_model(load(), config("replace"))


@pytest.mark.parametrize("mode", MODES)
def test_sentence_transformers(tiny, tmp_path, mode):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    model = sentence_transformer(tiny("bert", AutoModel), tmp_path / "b")
    texts = TEXTS
    plain = model.encode(texts, convert_to_tensor=True)
    model.add_adapter(config(mode))
    expected = model.encode(texts, convert_to_tensor=True)
    assert not torch.equal(expected, plain)
    model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    equal(again.encode(texts, convert_to_tensor=True), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_card_says_the_import(tiny, tmp_path, mode):
    model = get_peft_model(tiny(), config(mode, task_type="CAUSAL_LM"))
    model.add_adapter("other", config(mode))
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        text = (folder / "README.md").read_text()
        assert "import hf_rps" in "\n".join(text.splitlines()[:20])
        assert "library_name: peft" in text
    assert "AutoPeftModelForCausalLM" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import hf_rps") == 1
