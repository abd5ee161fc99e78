"""The model card: it says the import first, its sizes are true, and what is not known is left out."""

import json
from pathlib import Path

import pytest
import transformers
from huggingface_hub import ModelCard
from paths import ROOT
from peft import get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_rps import RPSConfig, get_rps_model, size_report, to_dense
from hf_rps.integrations import model_card
from hf_rps.integrations.model_card import REPOSITORY, TAGS, with_note, write_model_card


@pytest.fixture
def folder(tiny, tmp_path):
    """The folder of a compressed classifier."""
    model = get_rps_model(tiny("bert", AutoModelForSequenceClassification), RPSConfig(ratio=0.1))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_of_a_learned_map(tiny, tmp_path):
    """Its bits are there, and nothing that has no meaning for it."""
    get_rps_model(tiny("llama"), RPSConfig(mapping="codebook", bits=3)).save_pretrained(tmp_path)
    text = write_model_card(tmp_path).text
    assert "are codes of 3 bits for" in text
    assert "`RPSConfig(mapping='codebook', bits=3, grad_scaling='projection')`" in text
    assert "fine-tunable sketches" in text
    assert "STABLE-RPS" not in text
    get_rps_model(tiny("llama"), RPSConfig(mapping="codebook", bits=2, tile=2)).save_pretrained(tmp_path)
    assert "are codes of 2 bits per 2 weights for" in write_model_card(tmp_path).text


def snippet(card):
    return card.text.partition("```python\n")[2].partition("```")[0]


def sizes(card):
    """The numbers of the table of sizes, by row."""
    rows = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    return {row[0]: [int(cell.replace(",", "")) for cell in row[1:3]] for row in rows if row[0] in
            ("shared weights", "all numbers", "bytes of the weights")}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "auto_class", "task"),
    [
        ("bert", AutoModelForSequenceClassification, "text-classification"),
        ("bert", AutoModelForMaskedLM, "fill-mask"),
        ("bert", AutoModel, "feature-extraction"),
        ("gpt2", AutoModelForCausalLM, "text-generation"),
        ("llama", AutoModelForSequenceClassification, "text-classification"),
    ],
)
def test_the_first_lines_load_the_model(tiny, tmp_path, kind, auto_class, task):
    model = get_rps_model(tiny(kind, auto_class), RPSConfig(ratio=0.1))
    model.save_pretrained(tmp_path)
    card = write_model_card(tmp_path)
    assert "`hf_rps`" in card.text.strip().splitlines()[0]
    assert snippet(card).startswith("import hf_rps\n")
    found = {}
    exec(snippet(card).replace(REPOSITORY, str(tmp_path)), found)
    assert type(found["model"]) is type(model)
    assert card.data.pipeline_tag == task
    assert card.data.tags == [*TAGS]
    assert str(ModelCard.load(tmp_path / "README.md")) == str(card)


@pytest.mark.parametrize("options", [{"ratio": 0.1}, {"mapping": "codebook", "bits": 2}], ids=["drawn", "learned"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_the_sizes_are_those_of_the_files(tiny, tmp_path, shard, options):
    dense = tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    model = get_rps_model(dense, RPSConfig(**options))
    report = size_report(model)
    model.save_pretrained(tmp_path / "small", max_shard_size=shard)
    found = sizes(write_model_card(tmp_path / "small"))
    assert found["shared weights"] == [report.n, report.m]
    assert found["all numbers"] == [report.dense_parameters, report.parameters]
    dense_bytes, stored = found["bytes of the weights"]
    assert stored == sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert dense_bytes == pytest.approx((tmp_path / "dense" / "model.safetensors").stat().st_size, rel=0.02)


def test_modules_that_the_class_does_not_have_are_not_counted_as_saved(folder, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(folder)  # without the pooler
    model.save_pretrained(tmp_path / "masked")
    found = sizes(write_model_card(tmp_path / "masked"))
    assert found["all numbers"][0] == size_report(to_dense(model)).parameters


def test_results_go_to_the_table_and_to_the_metadata(folder):
    card = write_model_card(
        folder, model_name="small", dataset="sk/digits", metrics={"test_accuracy": 0.98765, "f1": 1}
    )
    assert "| test_accuracy | 0.9877 |" in card.text
    assert card.data.datasets == "sk/digits"
    assert card.data.metrics == ["accuracy", "f1"]
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in results] == [
        ("accuracy", "test_accuracy", 0.98765), ("f1", "f1", 1.0)]  # fmt: skip
    assert {(r.task_type, r.dataset_name) for r in results} == {("text-classification", "sk/digits")}


def test_results_that_can_not_be_compared_stay_out_of_the_metadata(folder):
    card = write_model_card(folder, dataset="my digits", metrics={"loss": float("nan"), "accuracy": 0.5})
    assert "| loss | nan |" in card.text
    assert [(r.metric_type, r.dataset_type) for r in card.data.eval_results] == [("accuracy", "my-digits")]
    assert write_model_card(folder, metrics={"accuracy": 0.5}).data.eval_results is None


def test_what_is_not_known_is_left_out(folder):
    (folder / "curve.png").write_bytes(b"")
    bare = write_model_card(folder).text
    full = write_model_card(
        folder, base_model="bert-base-uncased", teacher="user/large", command='train --text "{{ x }}"',
        learning_curve="curve.png", versions={"datasets": "4.0"}, metrics={"loss": 1.0}, license="mit",
    )  # fmt: skip
    for part in ("base model: bert-base-uncased", "teacher: user/large", 'train --text "{{ x }}"', "](curve.png)",
                 "datasets 4.0", "## Results"):  # fmt: skip
        assert part in full.text
        assert part not in bare
    assert "\n\n\n" not in bare + full.text
    assert "None" not in bare + full.text
    assert (full.data.base_model, full.data.license) == ("bert-base-uncased", "mit")
    assert "RPSConfig(ratio=0.1, seed=0," in bare
    assert transformers.__version__ in bare


def test_local_paths_are_not_told(folder, tmp_path):
    (tmp_path / "teacher").mkdir()
    card = write_model_card(folder, base_model=str(tmp_path / "teacher"), teacher=str(tmp_path / "teacher"))
    assert str(tmp_path) not in str(card)
    assert "- teacher: teacher" in card.text
    assert card.data.base_model is None


def test_a_dense_model_has_a_card_without_the_import(tiny, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    card = write_model_card(tmp_path, model_name="plain")
    assert card.text.startswith("\n# plain")
    assert "import hf_rps" not in card.text
    assert "RPS" not in card.text
    assert card.data.tags is None
    assert snippet(card).startswith("from transformers import AutoModelForCausalLM\n")


@pytest.mark.parametrize("text", ["# Mine\r\n\r\nText.", "---\r\nlicense: mit # why\r\n---\r\n# Mine\r\n", ""])
def test_the_note_changes_nothing_else_and_comes_once(text):
    noted = with_note(text, "**import hf_rps**")
    assert noted.replace("\n**import hf_rps**\n\n", "") == text
    assert with_note(noted, "**import hf_rps**") == noted


def test_the_note_is_added_if_the_import_comes_late():
    text = "# Mine\n" + "\nlong story\n" * 20 + "import hf_rps\n"
    assert with_note(text, "import hf_rps").startswith("\nimport hf_rps\n\n# Mine")


def test_an_adapter_saved_twice_keeps_its_tags(tiny, tmp_path):
    model = get_peft_model(tiny(), RPSConfig(ratio=0.01, mode="delta"))
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert set(TAGS) < set(ModelCard.load(tmp_path / "README.md").data.tags)


def test_model_tags_come_with_compression_and_go_with_it(tiny, tmp_path):
    model = tiny("bert", AutoModelForSequenceClassification)
    model.add_model_tags("mine")
    get_rps_model(model, RPSConfig(ratio=0.1))
    model.save_pretrained(tmp_path)
    assert model.model_tags == ["mine", *TAGS]
    assert model.bert.model_tags == [*TAGS]
    assert AutoModel.from_pretrained(tmp_path).model_tags == [*TAGS]
    assert type(model).model_tags is None
    to_dense(model)
    assert model.model_tags == ["mine"]
    assert model.bert.model_tags is None


def test_trainers_card_can_have_the_tags(tiny, tmp_path):
    model = get_rps_model(tiny(), RPSConfig(ratio=0.1))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none"))
    trainer.create_model_card(tags=list(model.model_tags))  # as Trainer.push_to_hub calls it
    assert set(TAGS) < set(ModelCard.load(tmp_path / "README.md").data.tags)


def test_the_template_is_one_file_and_is_installed():
    template = Path(model_card.__file__).with_name("model_card_template.md")
    assert (ROOT / "model_cards" / "template.md").resolve() == template
    assert '"hf_rps.integrations" = ["*.md"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"learning_curve": "none.png"}, ValueError, "save the image there first"),
        ({"metrics": {"accuracy": "0.9"}}, TypeError, r"metrics\['accuracy'\] must be a number, got '0.9'"),
        ({"metrics": {"report": {"f1": 1}}}, TypeError, "must be a number"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folder, arguments, error, words):
    with pytest.raises(error, match=words):
        write_model_card(folder, **arguments)
    assert not (folder / "README.md").exists()


def test_a_folder_that_is_no_model_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        write_model_card(tmp_path / "empty")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["modules"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="restore the one that save_pretrained wrote"):
        write_model_card(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        write_model_card(folder)


def test_damaged_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        write_model_card(folder)
