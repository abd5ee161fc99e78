"""scripts/compress_encoder.py: the corpus, the scores and the smaller students; and, slowly, a whole small study."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from finetune_runs import ENVIRONMENT, make_tokenizer
from paths import SCRIPTS
from transformers import BertConfig, BertModel

pytest.importorskip("datasets")
from hf_rps import RPSConfig, get_rps_model, size_report
from hf_rps.conversion import find_bank
from hf_rps.targets import find_targets
from studies import corpus as _corpus
from studies.encoder import quantised, students
from studies.encoder import stages as compress_encoder
from studies.encoder.arguments import Arguments

CONFIG = RPSConfig(exclude_modules=["pooler.dense"])


def encoder(layers=6, width=64, hidden=32):
    torch.manual_seed(0)
    config = BertConfig(hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=4,
                        vocab_size=259)  # fmt: skip
    return BertModel(config).eval()


def count(model):
    return sum(candidate.weight.numel() for candidate in find_targets(model, CONFIG))


def test_texts_of_a_source():
    source = '"""Return the first value of them all."""\n# A comment that says why this is so.\nx = [1,\n     2]\n'
    assert list(_corpus.texts_of_source(source)) == [
        ("sentence", "Return the first value of them all."),
        ("code", "x = [1, 2]"),
        ("sentence", "A comment that says why this is so."),
    ]


def test_no_text_and_no_file_is_in_two_splits(tmp_path, monkeypatch):
    files = [(f"file{i}", [("sentence", f"This sentence is number {i} of file {'abcdefghij'[j] * (i + 1)}.")
                           for j in range(5)]) for i in range(60)]  # fmt: skip
    monkeypatch.setattr(_corpus, "documents", lambda: iter(files))
    _corpus.write_corpus(tmp_path)
    of = {text: name for name, texts in files for _, text in texts}
    seen = {}
    for split in ("train", "validation", "test"):
        rows = [json.loads(line)["text"] for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        seen[split] = {of[text] for text in rows}
        assert rows
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_scores():
    torch.manual_seed(0)
    student, teacher = (F.normalize(torch.randn(40, 8), dim=-1) for _ in range(2))
    found = compress_encoder.score(student, teacher, k=10)
    common = []
    for i in range(40):
        near = [sorted((j for j in range(40) if j != i), key=lambda j: -(x[i] @ x[j]))[:10] for x in (student, teacher)]
        common.append(len(set(near[0]) & set(near[1])) / 10)
    assert found["recall_at_10"] == pytest.approx(sum(common) / 40, abs=1e-4)
    assert found["cosine"] == pytest.approx((student * teacher).sum(-1).mean().item(), abs=1e-4)
    assert compress_encoder.score(teacher, teacher) == {"cosine": 1.0, "cosine_p5": 1.0, "recall_at_10": 1.0}


@pytest.mark.parametrize(("ratio", "layers"), [(0.5, 3), (0.25, 2), (0.1, 1)])
def test_smaller_students_have_the_bytes_of_the_ratio(ratio, layers):
    teacher = encoder()
    student = compress_encoder.smaller_student(teacher, ratio, CONFIG)
    assert student.config.num_hidden_layers == layers
    assert count(student) == pytest.approx(ratio * count(teacher), rel=0.02)
    assert student(torch.arange(5)[None]).last_hidden_state.shape == (1, 5, 32)


def test_a_student_as_large_as_the_teacher_is_the_teacher():
    teacher, ids = encoder(), torch.arange(7)[None]
    student = compress_encoder.smaller_student(teacher, 1.0, CONFIG).eval()
    torch.testing.assert_close(student(ids).last_hidden_state, teacher(ids).last_hidden_state)


def wide():
    return encoder(layers=2, hidden=64, width=128)  # what bitsandbytes lays out for a CPU comes in blocks of 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    wide().save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize(("method", "group", "bits"), [("nf4", None, 4), ("int8", None, 8), ("int4", 32, 5)])
def test_what_is_learned_around_a_quantised_model(folder, method, group, bits):
    """The dense student computes what the quantised layers do, and they take over what it learns but for weights."""
    pytest.importorskip("torchao" if method == "int4" else "bitsandbytes")
    ids = torch.arange(24).view(2, 12)
    names = [target.name for target in find_targets(wide(), CONFIG)]
    model = quantised.quantised(str(folder), method, group, CONFIG)
    assert quantised.quantised_bytes(model, names) * 8 / count(wide()) >= bits
    start = quantised.dense_student(wide(), model, CONFIG)
    expected = model(ids).last_hidden_state
    torch.testing.assert_close(start(ids).last_hidden_state, expected, rtol=0.05, atol=0.05)
    assert not torch.equal(start.encoder.layer[0].output.dense.weight, wide().encoder.layer[0].output.dense.weight)
    trained = copy.deepcopy(start)
    for name, parameter in trained.named_parameters():
        if name.removesuffix(".weight") not in names:
            parameter.add_(0.3 * torch.randn_like(parameter))
    around = quantised.put_around(quantised.quantised(str(folder), method, group, CONFIG), trained, start, CONFIG)
    found = around(ids).last_hidden_state
    torch.testing.assert_close(found, trained(ids).last_hidden_state, rtol=0.1, atol=0.1)
    assert (found - expected).abs().mean() > 0.1
    trained.encoder.layer[1].output.dense.weight.mul_(2)
    with pytest.raises(ValueError, match="was trained, and can't be that of a quantised model"):
        quantised.put_around(around, trained, start, CONFIG)


def test_codebooks_are_judged_as_they_are_counted():
    model = get_rps_model(encoder(layers=2), RPSConfig(mapping="codebook", bits=2, exclude_modules=["pooler.dense"]))
    codes, books = size_report(model).code_bytes, size_report(model).codebook_bytes
    sizes = students.stored_bytes(model, students.Student("codebook", 2), CONFIG, 10**6)
    n = size_report(model).n
    assert sizes == {"weights": n, "target_bytes": codes + books // 2, "file_bytes": 10**6 - books // 2}
    psi = find_bank(model).psi.clone()
    rounded = find_bank(students.round_codebooks(model)).psi
    assert not torch.equal(rounded, psi)
    assert torch.equal(rounded, psi.half().float())


def test_students_by_name():
    for name in students.STUDENTS:
        assert str(students.Student.parse(name)) == name
    for name in ("codebook", "codebook-5", "nf4-64", "rps-2", "int4-x", "other"):
        with pytest.raises(ValueError, match="is none of nf4, int8"):
            students.Student.parse(name)
    found = Arguments(learning_rates=["codebook=3e-4", "codebook-2=1e-3"])
    rates = {name: found.known_rate(students.Student.parse(name)) for name in ("codebook-2", "codebook-3", "nf4")}
    assert rates == {"codebook-2": 1e-3, "codebook-3": 3e-4, "nf4": None}
    with pytest.raises(ValueError, match="--learning_rates: 'other' is none of"):
        Arguments(learning_rates=["other=1"])


@pytest.mark.slow
def test_a_whole_study_and_again(tmp_path):
    """Corpus, students, learning rates, runs, evaluation and report; the second time nothing is trained."""
    encoder(layers=2).save_pretrained(tmp_path / "encoder")
    make_tokenizer(tmp_path / "encoder", ["the quick brown fox jumps over the lazy dog"] * 5)
    chosen = ["rps-0.5", "smaller-0.5", "magnitude-0.5", "codebook-2", "codebook+embeddings-2", "int8"]
    command = [sys.executable, SCRIPTS / "compress_encoder.py", "--model", "encoder", "--output_dir", "out",
               "--students", *chosen, "--steps", "6", "--grid", "1e-3", "1e-4", "--grid_steps", "2", "--max_length",
               "16", "--base_model", "user/encoder"]  # fmt: skip
    printed = []
    for _ in range(2):
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env={**ENVIRONMENT, "HOME": str(tmp_path), "PATH": ""},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout)
    table = (tmp_path / "out" / "report" / "table.md").read_text()
    assert table.count("\n") == 9  # head, rule, teacher and six students
    assert "done: rps-0.5" in printed[0]
    assert "done:" not in printed[1]
    assert table in printed[1]
    assert "import hf_rps" in (tmp_path / "out" / "report" / "minilm-rps-0.5.md").read_text()
    assert (tmp_path / "out" / "report" / "distillation.png").stat().st_size > 10_000
