"""scripts/compress_encoder.py: the corpus, the scores and the smaller students; and, slowly, a whole small study."""

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
from hf_rps import RPSConfig
from hf_rps.targets import find_targets
from studies import corpus as _corpus
from studies.encoder import stages as compress_encoder

CONFIG = RPSConfig(exclude_modules=["pooler.dense"])


def encoder(layers=6, width=64):
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=4,
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


@pytest.mark.slow
def test_a_whole_study_and_again(tmp_path):
    """Corpus, students, learning rates, runs, evaluation and report; the second time nothing is trained."""
    encoder(layers=2).save_pretrained(tmp_path / "encoder")
    make_tokenizer(tmp_path / "encoder", ["the quick brown fox jumps over the lazy dog"] * 5)
    command = [sys.executable, SCRIPTS / "compress_encoder.py", "--model", "encoder", "--output_dir", "out", "--ratios",
               "0.5", "--steps", "6", "--grid", "1e-3", "1e-4", "--grid_steps", "2", "--max_length", "16",
               "--base_model", "user/encoder"]  # fmt: skip
    printed = []
    for _ in range(2):
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env={**ENVIRONMENT, "HOME": str(tmp_path), "PATH": ""},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout)
    table = (tmp_path / "out" / "report" / "table.md").read_text()
    assert table.count("\n") == 6  # head, rule, teacher and three methods
    assert "done: rps-0.5" in printed[0]
    assert "done:" not in printed[1]
    assert table in printed[1]
    assert "import hf_rps" in (tmp_path / "out" / "report" / "minilm-rps-0.5.md").read_text()
    assert (tmp_path / "out" / "report" / "distillation.png").stat().st_size > 10_000
