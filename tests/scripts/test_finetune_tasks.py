"""scripts/finetune.py on the other tasks, on streams, and stopping early."""

import pytest
from finetune_runs import history, results

pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("sklearn")


def test_masked_language_modelling(base, finetune, tmp_path):
    finetune(
        tmp_path, base["mlm"] | {"output_dir": "mlm", "num_train_epochs": 20, "ratio": 0.5, "mlm_probability": 0.3}
    )
    validation = history(tmp_path / "mlm", "validation")
    assert validation[-1]["loss"] < 0.95 * validation[0]["loss"]
    assert validation[-1]["perplexity"] > 1


def test_token_classification(base, finetune, tmp_path):
    finetune(tmp_path, base["words"] | {"output_dir": "words", "num_train_epochs": 30, "ratio": 0.5})
    metrics = results(tmp_path / "words")["metrics"]["test"]
    assert metrics["accuracy"] > 0.9
    assert metrics["f1"] > 0.5  # of all entities, so not reached by calling everything O
    assert {"precision", "recall"} <= metrics.keys()


def test_seq2seq_generates(base, finetune, tmp_path):
    arguments = base["seq2seq"] | {"num_train_epochs": 4, "ratio": 0.5, "predict_with_generate": True}
    finetune(tmp_path, arguments | {"output_dir": "out"})
    metrics = results(tmp_path / "out")["metrics"]["test"]
    assert metrics.keys() == {"loss", "perplexity", "bits_per_token", "bleu", "chrf", "exact_match"}
    assert 0 <= metrics["exact_match"] <= 1
    assert history(tmp_path / "out", "validation")[-1]["loss"] < history(tmp_path / "out", "validation")[0]["loss"]


@pytest.mark.parametrize("task", ["text", "lm", "words"])
def test_a_stream_trains_as_the_data_in_memory_do(base, finetune, tmp_path, task):
    """In their own order, over the end of an epoch; also two processes."""
    steps = {"max_train_steps": 12, "streaming": True, "shuffle_buffer_size": 0, "logging_steps": 1, "save_logits": 0}
    arguments = base[task] | steps | {"validation_file": base["text" if task == "text" else "words"]["validation_file"]}
    if task == "lm":
        arguments["validation_file"] = base["lm"]["test_file"]
    finetune(tmp_path, arguments | {"output_dir": "one"})
    half = {"per_device_train_batch_size": arguments["per_device_train_batch_size"] // 2}
    finetune(tmp_path, arguments | half | {"output_dir": "two"}, processes=2)
    losses = [[row["loss"] for row in history(tmp_path / name, "train")] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 12
    assert losses[0][-1] < losses[0][0]


def test_a_stream_that_is_used_up_by_validation_is_refused(base, finetune, tmp_path):
    arguments = base["mlm"] | {"streaming": True, "max_train_steps": 3, "output_dir": "empty"}
    arguments.pop("validation_file")
    assert "the training split has no samples left" in finetune.error(tmp_path, arguments | {"max_eval_samples": 80})


def test_stops_early_and_takes_the_best(base, finetune, tmp_path):
    arguments = base["digits"] | {
        "learning_rate": 0.3, "optimizer": "sgd", "eval_steps": 5, "early_stopping_patience": 2,
        "metric_for_best_model": "accuracy", "max_train_steps": 400, "lr_scheduler_type": "constant",
        "output_dir": "early", "save_total_limit": 1,
    }  # fmt: skip
    finetune(tmp_path, arguments)
    validation = history(tmp_path / "early", "validation")
    accuracies = [row["accuracy"] for row in validation]
    best = accuracies.index(max(accuracies))
    assert len(accuracies) == best + 3
    assert validation[-1]["step"] < 400
    written = results(tmp_path / "early")
    assert written["best_step"] == validation[best]["step"]
    assert written["metrics"]["validation"]["accuracy"] == max(accuracies)
    names = {path.name for path in (tmp_path / "early").glob("checkpoint-*")}
    assert f"checkpoint-{written['best_step']}" in names
    assert len(names) <= 2
