"""Distillation with scripts/finetune.py: the terms of the loss against plain formulas, and whole runs."""

import pydoc_data.topics

import pytest
import torch
import torch.nn.functional as F
from finetune_runs import DIGITS, history, results
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, ByT5Tokenizer

pytest.importorskip("datasets")
from finetuning import objective as _objective
from finetuning.arguments.training import DistillationArguments
from finetuning.batches import COUNT, NUMBERS
from finetuning.tasks import TASKS


def terms(task, student, teacher, batch, **weights):
    """The objective's loss, its sums divided by its counts."""
    args = DistillationArguments(teacher="teacher", **weights)
    objective = _objective.Objective(TASKS[task], args, teacher)
    batch = batch | {COUNT: len(batch["input_ids"]), NUMBERS: []}
    counts = objective.counts(batch)
    return (objective(student, batch, counts) / torch.tensor(counts).clamp(min=1)).sum()


@pytest.fixture
def two(tiny):
    """A causal language model and its teacher, of one shape."""
    teacher = tiny("llama", attn_implementation="eager")
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(teacher.config, attn_implementation="eager").eval(), teacher


def test_logits_of_a_language_model(two, ids):
    student, teacher = two
    batch, t = {"input_ids": ids, "labels": ids}, 3.0
    logits, targets = (model(ids).logits[:, :-1] for model in two)
    divergence = (
        (targets / t).softmax(-1) * ((targets / t).log_softmax(-1) - (logits / t).log_softmax(-1))
    ).sum(-1).mean() * t**2  # fmt: skip
    expected = 0.3 * divergence + 0.7 * F.cross_entropy(logits.transpose(1, 2), ids[:, 1:])
    found = terms("causal-lm", student, teacher, batch, distill_alpha=0.3, distill_temperature=t)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_hidden_states_and_attention_weights(two, ids):
    student, teacher = two
    options = {"output_hidden_states": True, "output_attentions": True}
    ours, theirs = (model(ids, **options) for model in two)
    hidden = torch.stack([F.mse_loss(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True)])
    attention = torch.stack(
        [(a - b).square().sum(-1).mean() for a, b in zip(ours.attentions, theirs.attentions, strict=True)]
    )
    batch = {"input_ids": ids, "labels": ids}
    weights = {"distill_alpha": 0.0, "distill_hidden_states": 2.0, "distill_attentions": 5.0}
    expected = ours.logits.new_tensor(student(**batch).loss.item()) + 2 * hidden.mean() + 5 * attention.mean()
    assert terms("causal-lm", student, teacher, batch, **weights).item() == pytest.approx(expected.item(), rel=1e-5)


def test_embeddings_ignore_padding():
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    student, teacher = BertModel(config).eval(), BertModel(config).eval()
    ids = torch.arange(12).view(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3])}
    loss, rows = terms("feature-extraction", student, teacher, batch), []
    for row, length in ((0, 6), (1, 3)):
        ours, theirs = (model(ids[row : row + 1, :length]).last_hidden_state[0] for model in (student, teacher))
        rows.append((length, F.mse_loss(ours, theirs), 1 - F.cosine_similarity(ours.mean(0), theirs.mean(0), dim=0)))
    expected = sum(n * mse for n, mse, _ in rows) / 9 + sum(cosine for _, _, cosine in rows) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_shallower_student_learns_from_layers_at_its_depth():
    student, teacher = (tuple(torch.tensor(float(i)) for i in range(n)) for n in (4, 7))
    assert [(int(s), int(t)) for s, t in _objective._matched(student, teacher)] == [(0, 0), (1, 2), (2, 4), (3, 6)]


def test_a_batch_without_labels_has_a_gradient_of_zero(tiny, ids):
    """As a process for which nothing is left at the end of an epoch needs it."""
    model = tiny("llama")
    objective = _objective.Objective(TASKS["causal-lm"], DistillationArguments())
    for count, labels in ((0, ids), (2, torch.full_like(ids, -100))):
        batch = {"input_ids": ids, "labels": labels, COUNT: count, NUMBERS: []}
        counts = objective.counts(batch)
        assert counts[0] == 0
        objective(model, batch, counts).sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        assert any(p.grad is not None for p in model.parameters())


# ---- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with texts, a small encoder and a tokenizer."""
    folder = tmp_path_factory.mktemp("distillation")
    lines = [line.strip() for text in pydoc_data.topics.topics.values() for line in text.splitlines()]
    (folder / "texts.txt").write_text("\n".join(line for line in lines if len(line) > 30)[:20000])
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                        vocab_size=259, hidden_dropout_prob=0, attention_probs_dropout_prob=0)  # fmt: skip
    BertModel(config).save_pretrained(folder / "encoder")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "encoder")
    return folder


EMBED = {
    "task": "feature-extraction", "model_name_or_path": "encoder", "teacher": "encoder", "train_file": "texts.txt",
    "max_length": 40, "logging_steps": 1, "report_to": "none", "max_eval_samples": 40,
}  # fmt: skip


def test_an_uncompressed_student_has_nothing_to_learn(finetune, folder):
    """At ratio 1 the compressed model is its teacher."""
    weights = {"distill_hidden_states": 1, "distill_attentions": 1}
    finetune(folder, EMBED | weights | {"ratio": 1, "max_train_steps": 1, "output_dir": "same"})
    assert history(folder / "same", "train")[0]["loss"] < 1e-5


def test_a_compressed_encoder_comes_closer_to_its_teacher(finetune, folder):
    arguments = EMBED | {"ratio": 0.5, "num_train_epochs": 4, "learning_rate": 2e-3, "group_by_length": True}
    finetune(folder, arguments | {"output_dir": "embed"})
    losses = [row["loss"] for row in history(folder / "embed", "validation")]
    assert losses[-1] < 0.7 * losses[0]
    assert 0 < results(folder / "embed")["metrics"]["validation"]["cosine"] <= 1
    student = AutoModel.from_pretrained(folder / "embed" / "model")
    assert student(torch.arange(5)[None]).last_hidden_state.shape == (1, 5, 32)


def test_two_processes_distil_as_one(finetune, folder):
    arguments = EMBED | {"ratio": 0.5, "distill_hidden_states": 1, "max_train_steps": 5, "max_train_samples": 70}
    arguments["per_device_train_batch_size"] = 16
    finetune(folder, arguments | {"output_dir": "one"})
    finetune(folder, arguments | {"output_dir": "two", "per_device_train_batch_size": 8}, processes=2)
    losses = [[row["loss"] for row in history(folder / name, "train")] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5)


def test_a_classifier_learns_from_another(finetune, folder):
    """A student that sees no label (alpha 1) beats chance by far."""
    digits = DIGITS | {"learning_rate": 5e-3, "num_train_epochs": 4}
    finetune(folder, digits | {"mode": "dense", "output_dir": "teacher"})
    finetune(folder, digits | {"teacher": "teacher/model", "distill_alpha": 1, "ratio": 0.5, "output_dir": "taught"})
    assert results(folder / "teacher")["metrics"]["test"]["accuracy"] > 0.6
    assert results(folder / "taught")["metrics"]["test"]["accuracy"] > 0.4
    assert "teacher: model" in (folder / "taught" / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "wide"}, "the teacher 'wide' has hidden_size=48 and the model 32"),
        ({"teacher": "wide", "distill_attentions": 1}, "take a teacher of the same hidden_size"),
    ],
)
def test_refuses_teachers_that_do_not_fit(finetune, folder, change, message):
    if not (folder / "wide").exists():
        BertModel(
            BertConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=259)
        ).save_pretrained(folder / "wide")
    assert message in finetune.error(folder, EMBED | change | {"output_dir": "refused"})
    assert not (folder / "refused").exists()


def test_refuses_a_teacher_of_other_classes():
    student = BertConfig(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ValueError, match="orders its classes as"):
        _objective.check_classes("teacher", student, BertConfig(id2label={0: "b", 1: "a"}, label2id={"b": 0, "a": 1}))
    _objective.check_classes("teacher", student, BertConfig(num_labels=2))  # LABEL_0, LABEL_1: without names
