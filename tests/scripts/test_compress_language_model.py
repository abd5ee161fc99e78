"""scripts/compress_language_model.py: texts, losses, rows, and a whole small study."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from finetune_runs import make_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("bitsandbytes")
from studies.comparison.report import fill
from studies.language_model import data, report, rows, scores, training, tuning
from studies.language_model.arguments import Arguments
from studies.language_model.rows import Row
from studies.language_model.runs import Run, Runs
from studies.language_model.study import Study

DEVICE = os.environ.get("HF_RPS_TEST_DEVICE", "cpu")
TORCHAO = "torchao:bits=4,group_size=32"
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def model(vocabulary=400):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config).eval()


# ---- texts


def test_batches_go_through_all_rows_before_any_comes_again():
    rows = torch.arange(5)[:, None]
    found = data.batches(rows, 2, 5)
    assert found.shape == (5, 2, 1)
    assert sorted(found.flatten()[:5].tolist()) == sorted(found.flatten()[5:].tolist()) == list(range(5))
    assert not torch.equal(data.batches(rows, 2, 5, seed=1), data.batches(rows, 2, 5, seed=2))


def test_choices_are_what_follows_and_passages_of_other_topics():
    topics = [torch.arange(100) + 100 * i for i in range(5)]
    for choice in data.make_choices(topics, 20):
        own, *others = (end[0] // 100 for end in choice.continuations)
        assert choice.continuations[0][0] == choice.context[-1] + 1
        assert own == choice.context[0] // 100
        assert len({own, *others}) == 4
    with pytest.raises(ValueError, match="at least 4 topics"):
        data.make_choices(topics[:3])


# ---- losses


@pytest.mark.parametrize("count", [3, 2 * training.CHUNK + 1])
def test_divergence_is_its_definition(count):
    torch.manual_seed(0)
    hidden, teacher, head = torch.randn(count, 8, requires_grad=True), torch.randn(count, 8), torch.randn(31, 8)
    other = hidden.detach().clone().requires_grad_()
    loss = training.divergence(hidden, teacher, head)
    plain = training.divergence_by_definition(other, teacher, head, head)
    torch.testing.assert_close(loss, plain)
    (3 * loss).backward()
    (3 * plain).backward()
    torch.testing.assert_close(hidden.grad, other.grad)
    assert training.divergence(teacher, teacher, head).item() == pytest.approx(0, abs=1e-6)


def test_next_token_is_the_models_own_loss():
    dense, ids = model(), torch.randint(0, 400, (3, 150))
    hidden = dense.model(input_ids=ids).last_hidden_state
    loss = training.next_token(hidden.flatten(0, 1), ids, dense.lm_head.weight.detach())
    plain = dense(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, plain)
    found = torch.autograd.grad(loss, hidden)[0]
    logits = F.linear(hidden[:, :-1], dense.lm_head.weight.detach()).flatten(0, 1)
    torch.testing.assert_close(found, torch.autograd.grad(F.cross_entropy(logits, ids[:, 1:].flatten()), hidden)[0])


def test_perplexity_and_accuracy_by_their_definitions(tmp_path):
    make_tokenizer(tmp_path, ["the quick brown fox jumps over the lazy dog"] * 5)
    tokenizer, dense = AutoTokenizer.from_pretrained(tmp_path), model(300)
    ids = torch.randint(5, 40, (3, 20))
    with torch.no_grad(), scores.arithmetic(torch.device("cpu")):
        plain = math.exp(sum(dense(input_ids=i[None], labels=i[None]).loss.item() for i in ids) / 3)
    assert scores.perplexity(dense, ids) == pytest.approx(plain, rel=2e-3)
    choices = data.make_choices([torch.randint(5, 40, (60,)) for _ in range(4)], 30)
    right = 0
    for choice in choices:
        found = []
        for end in choice.continuations:
            with torch.no_grad(), scores.arithmetic(torch.device("cpu")):
                logits = dense(input_ids=torch.tensor([choice.context + end])).logits[0].float().log_softmax(-1)
            total = sum(logits[len(choice.context) - 1 + i, token].item() for i, token in enumerate(end))
            found.append(total / len(tokenizer.decode(end).encode()))
        right += max(found) == found[0]
    assert scores.accuracy(dense, tokenizer, choices) == pytest.approx(right / 30, abs=0.04)


# ---- rows


@pytest.mark.parametrize(("name", "bits"), [
    ("bitsandbytes:format=nf4", 4.5), ("bitsandbytes:format=int8", 8 + 32 / 71.1),
    pytest.param(TORCHAO, 4.75, marks=needs_torchao),
])  # fmt: skip
def test_rounded_weights_are_near_and_few(name, bits):
    dense, rounded = model(), model()
    assert Row.parse(name).apply(rounded, None) == pytest.approx(bits, rel=0.01)
    before, after = (m.model.layers[1].mlp.up_proj.weight[0].detach() for m in (dense, rounded))
    assert 0 < (after - before).norm() / before.norm() < 0.2
    most = 2 ** round(bits - 0.5) * (1 if "int8" in name else 2)  # a row of 64: two groups of 32, one block of 64
    assert len(after.unique()) <= most
    assert torch.equal(dense.lm_head.weight, rounded.lm_head.weight)


def test_what_a_model_writes_is_drawn_once_and_for_all():
    dense = model()
    state = torch.random.get_rng_state()
    written = rows.written_by(dense, 3, 20)
    assert written.shape == (3, 20)
    assert len(written[:, 1:].unique()) > 30
    assert torch.equal(written, rows.written_by(dense, 3, 20))
    assert torch.equal(state, torch.random.get_rng_state())


def test_each_calibration_gives_another_map():
    train, code = torch.randint(0, 400, (2, 30, 10))
    texts = SimpleNamespace(calibration=torch.randint(0, 400, (4, 20)), train=train, code=code)
    made = []
    for name in ("documentation", "mixed", "long", "task"):
        compressed = model()
        Row.parse(f"codebook:bits=2,calibration={name}").apply(compressed, texts)
        made.append(compressed.model.layers[0].mlp.up_proj.weight + 0)
    assert not any(one.equal(other) for one, other in itertools.combinations(made, 2))


def test_rows_that_are_none_are_refused():
    with pytest.raises(ValueError, match="none of the methods"):
        Row.parse("gptq:bits=3")
    with pytest.raises(ValueError, match="write name=value"):
        Row.parse("codebook:3")
    with pytest.raises(ValueError, match="calibration='own'"):
        Row.parse("codebook:bits=4,calibration=own").apply(
            model(), SimpleNamespace(calibration=torch.zeros(1, 4, dtype=torch.int64))
        )
    with pytest.raises(ValueError, match="bits=5"):
        Row.parse("codebook:bits=5").apply(model(), SimpleNamespace(calibration=torch.zeros(1, 4, dtype=torch.int64)))
    with pytest.raises(ValueError, match="--stages"):
        Arguments("model", stages=["distil"])


# ---- runs


def test_runs_are_done_once_and_a_cut_line_is_done_again(tmp_path):
    file, first, second = tmp_path / "runs.jsonl", Run("rates", "a", 3, 1e-3), Run("rates", "b", 3, 1e-3)
    runs = Runs(file)
    runs(first, lambda: {"x": 1})
    runs(second, lambda: {"x": 2})
    file.write_text(file.read_text()[:-5])
    again = Runs(file)
    assert again(first, lambda: pytest.fail("it is done")) == {"x": 1}
    assert again(second, lambda: {"x": 3}) == {"x": 3}
    assert Runs(file).of("rates", "b") == {second: {"x": 3}}


# ---- a whole study


def test_a_whole_study_and_again(tmp_path, monkeypatch):
    """All stages on a tiny model; the second time nothing is trained; the tables can be filled into a page."""
    monkeypatch.setattr(data, "MOST_CHARACTERS", 60_000)
    for method, rates in tuning.TUNED.items():
        monkeypatch.setitem(tuning.TUNED, method, rates[:1])
    make_tokenizer(tmp_path / "model", ["the quick brown fox jumps over the lazy dog"] * 5)
    model().save_pretrained(tmp_path / "model")
    arguments = Arguments(
        str(tmp_path / "model"), output_dir=str(tmp_path / "out"), grid=[1e-3, 1e-2], grid_steps=2,
        rows=["dense", "codebook:bits=2", "bitsandbytes:format=nf4"], steps=3, batch_size=2, base_model="user/tiny",
        finetune_row="codebook:bits=2", finetune_steps=2, seeds=[0, 1], device=DEVICE,
    )  # fmt: skip
    study = Study(arguments)
    study.__dict__["texts"] = shortened(study.texts)
    everything(study)
    text, lines = report.report(study), study.runs.file.read_text()
    again = Study(arguments)
    again.__dict__["dense"] = lambda: pytest.fail("all is done")
    everything(again)
    assert report.report(again) == text
    assert study.runs.file.read_text() == lines
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in report.TABLES))
    assert all(fill(page, name, table) for name, table in report.tables(study.runs).items())
    assert page.read_text().count("codebooks, 2 bits") >= 4
    (run,) = study.runs.of("distilled", "codebook:bits=2")
    loaded = AutoModelForCausalLM.from_pretrained(study.folder(run), dtype=torch.float32)
    judged = scores.perplexity(loaded, study.texts.held_out)
    assert judged == pytest.approx(study.runs.results[run]["perplexity"], rel=0.01)
    card = (tmp_path / "out" / "report" / "tiny-codebook-bits2.md").read_text()
    assert "import hf_rps" in card
    assert "user/tiny" in card
    assert (tmp_path / "out" / "report" / report.PLOT).stat().st_size > 10_000
    memory = {run.row: result["memory"] for run, result in study.runs.of("finetuned").items()}
    assert memory["full"] > memory["lora"] > memory["qlora"]


def shortened(texts):
    return dataclasses.replace(texts, **{
        field.name: getattr(texts, field.name)[:4] for field in dataclasses.fields(texts) if field.name != "other_name"
    })  # fmt: skip


def everything(study):
    rows = study.arguments.parsed_rows
    for row in rows:
        study.untrained(row)
    for row in rows[1:]:
        for rate in study.arguments.grid:
            study.rate(row, rate)
        study.distilled(row)
    study.arithmetic(rows[1], steps=2)
    for method in study.arguments.methods:
        study.finetuned(method)


def test_what_is_trained_and_its_memory():
    dense = model()
    n, per_rank, others = tuning.sizes(dense)
    shapes = [m.weight.shape for name, m in dense.named_modules() if name.endswith("proj")]
    assert n == sum(a * b for a, b in shapes)
    assert per_rank == sum(a + b for a, b in shapes)
    assert others == dense.lm_head.weight.numel()
    wanted = n * 4.5 / 8 + 2 * others + 16 * 3 * per_rank
    tuned, memory = tuning.prepare("qlora", dense, tuning.Memory(wanted, 0))
    assert isinstance(tuned, PeftModel)
    assert memory.trained == 3 * per_rank
    norms = sum(p.numel() for p in dense.parameters() if p.dim() == 1)
    assert memory.bytes == pytest.approx(wanted + 2 * norms)
    training.learn(plain := model())
    assert {name.rsplit(".", 2)[-2] for name, p in plain.named_parameters() if p.requires_grad} == {
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip


def test_the_page_has_the_tables_of_its_rows(tmp_path):
    """docs/language_model.md is what the committed rows give."""
    page = tmp_path / "page.md"
    page.write_text(report.PAGE.read_text())
    for name, table in report.tables(Runs(report.DATA / "runs.jsonl")).items():
        assert fill(page, name, table), name
    assert page.read_text() == report.PAGE.read_text()
    for line in (report.DATA / "runs.jsonl").read_text().splitlines():
        assert "/tmp" not in json.dumps(json.loads(line))
