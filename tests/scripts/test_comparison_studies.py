"""The comparison of scripts/compare.py: its cache, and the whole way from data to tables."""

import dataclasses
import json

import pytest
from comparison_runs import TINY, tiny_run
from hypothesis import given
from hypothesis import strategies as st

from studies.comparison import cli as compare
from studies.comparison import folding, learning_rates, stability
from studies.comparison import presets as studies
from studies.comparison.runner import Environment, Runner
from studies.comparison.training import Run


@pytest.fixture
def tiny_presets(monkeypatch):
    """Both presets with models and data that train in a second."""
    preset = dataclasses.replace(studies.PRESETS["quick"], sizes=TINY, short=TINY, seeds=(0, 1))
    for grids in ("_LAW_RATES", "_FOLDED_RATES"):
        first = {arm: rates[:3] for arm, rates in getattr(learning_rates, grids).items()}
        monkeypatch.setattr(learning_rates, grids, first)
    monkeypatch.setitem(compare.PRESETS, "quick", preset)
    return preset


# ---- the cache


def test_runs_are_not_repeated(images, tmp_path, monkeypatch):
    runner = Runner(Environment(tmp_path, images, 2, 1, "cpu"))
    runs = [tiny_run("rps", seed=seed) for seed in (0, 1, 0)]
    first = runner(runs)
    assert first[0] == first[2]
    lines = runner.file.read_text().splitlines()
    assert len(lines) == 2
    # a line that was cut short by a kill is run again, and what comes after it is on a line of its own
    runner.file.write_text(lines[0] + "\n" + lines[1][:40])
    again = Runner(runner.environment)
    known = json.loads(lines[0])["key"]
    assert [run.key for run in again.missing(runs)] == [run.key for run in runs if run.key != known][:1]
    second = again(runs)
    assert [result["test"] for (result,) in first] == [result["test"] for (result,) in second]
    third = Runner(runner.environment)
    assert third.missing(runs) == []
    monkeypatch.setattr("studies.comparison.runner.ProcessPoolExecutor", None)  # nothing may be started
    assert third(runs) == second


@given(st.sampled_from([f.name for f in dataclasses.fields(Run)]))
def test_every_setting_is_in_the_key(name):
    run = tiny_run("rps")
    value = getattr(run, name)
    other = (
        (*value, 3) if isinstance(value, tuple) else f"{value}x" if isinstance(value, (str, type(None))) else value + 1
    )
    assert dataclasses.replace(run, **{name: other}).key != run.key


# ---- from runs to tables


def test_the_script_from_data_to_tables(images, tmp_path, tiny_presets, capsys):
    flags = ["--methods", "dense", "rps", "roast", "magnitude", "ltr", "low-rank", "--compressions", "1", "4",
             "--learning_rates", "0.003", "0.01", "--seeds", "0", "1", "--fashion_mnist_dir", str(images),
             "--output_dir", str(tmp_path), "--workers", "1"]  # fmt: skip
    compare.main(flags)
    table = (tmp_path / "main-vit.md").read_text()
    assert table in capsys.readouterr().out
    lines = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in lines[0][1:]] == ["1×", "4×"]
    titles = [line[0].strip() for line in lines[2:]]
    assert titles == ["RPS", "ROAST", "MAG", "lottery tickets, rewound", "low-rank factors"]
    assert "as dense" in lines[titles.index("MAG") + 2][1]
    rows = [json.loads(line) for line in (tmp_path / "main-vit.jsonl").read_text().splitlines()]
    assert {(row["method"], row["compression"]) for row in rows} == {
        ("dense", 1), ("rps", 1), ("rps", 4), ("roast", 1), ("roast", 4), ("magnitude", 4), ("ltr", 4),
        ("low-rank", 1), ("low-rank", 4),
    }  # fmt: skip
    # the rate is picked on the validation split with the first seed; the cell is the test score of both seeds
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    found = {
        (run["method"], result["compression"], run["learning_rate"], run["seed"]): result
        for run, results in ((record["run"], record["results"]) for record in records)
        for result in results
    }
    for row in rows:
        cell = (row["method"], row["compression"])
        best = max((0.003, 0.01), key=lambda rate, cell=cell: found[(*cell, rate, 0)]["validation"])
        assert row["learning_rate"] == best
        assert row["test"] == [found[(*cell, best, seed)]["test"] for seed in (0, 1)]
    assert (tmp_path / "main-vit.png").stat().st_size > 10_000
    before = (tmp_path / "runs.jsonl").read_text()
    compare.main(flags)
    assert (tmp_path / "runs.jsonl").read_text() == before


def test_stability_law_and_continuity_from_data_to_tables(images, tmp_path, tiny_presets, monkeypatch):
    """With STABLE-RPS and SGD the score is the same for every C; at 1x RPS is the dense model, ROAST is not."""
    monkeypatch.setattr(stability, "INIT_STDS", (1e-3, 1e-1))
    monkeypatch.setattr(stability, "RATES", {"adamw": (3e-3,), "sgd": (0.01, 0.1)})
    compare.main(["--studies", "stability", "learning-rate", "continuity", "folded-rates", "--seeds", "0",
                  "--fashion_mnist_dir", str(images), "--output_dir", str(tmp_path), "--workers", "1"])  # fmt: skip
    rows = {name: [json.loads(line) for line in (tmp_path / f"{name}-vit.jsonl").read_text().splitlines()]
            for name in ("stability", "learning-rate", "continuity", "folded-rates", "folded-stability")}  # fmt: skip
    assert {row["method"] for name in ("folded-rates", "folded-stability") for row in rows[name]} == {"fold-full"}
    sgd = [row for row in rows["stability"] if (row["method"], row["optimizer"]) == ("rps", "sgd")]
    by_rate = {rate: [row["test"] for row in sgd if row["learning_rate"] == rate] for rate in (0.01, 0.1)}
    assert all(scores[0] == pytest.approx(scores[1], abs=0.011) for scores in by_rate.values())  # 2 images of 200
    continuity = {row["method"]: row for row in rows["continuity"]}
    for name in ("rps", "rps-element", "rps-module"):
        assert continuity[name]["logits"] < 1e-6
        assert continuity[name]["loss"] < 1e-6
    for name in ("roast", "roast-scaled", "hashednets"):
        assert continuity[name]["logits"] > 0.1
        assert continuity[name]["loss"] > 1e-3
    assert len(rows["learning-rate"]) == 4 * 4 * 3
    for name in ("stability-vit.png", "learning-rate-vit.png", "learning-rate-vit.md", "continuity-vit.md"):
        assert (tmp_path / name).stat().st_size > 100


def test_forms_and_folds_from_data_to_tables(images, tmp_path, tiny_presets, monkeypatch):
    monkeypatch.setattr(folding, "FOLD_COMPRESSIONS", (2, 10))
    compare.main(["--studies", "forms", "folds", "--methods", "dense", "form-one", "form-orthogonal",
                  "--learning_rates", "0.003", "0.01", "--fashion_mnist_dir", str(images),
                  "--output_dir", str(tmp_path), "--workers", "1"])  # fmt: skip
    rows = {name: [json.loads(line) for line in (tmp_path / f"{name}-vit.jsonl").read_text().splitlines()]
            for name in ("forms", "folds")}  # fmt: skip
    assert [(row["method"], row["longer"]) for row in rows["forms"]] == [
        (method, longer) for longer in (1, 4) for method in ("dense", "form-one", "form-orthogonal")
    ]
    dense, one, orthogonal = (row["flops"] for row in rows["forms"][:3])
    assert one < orthogonal < dense
    cells = [(row["compression"], row["fold"]) for row in rows["folds"][1:]]
    assert cells == [(2, 1), (2, 2), (10, 1), (10, 2), (10, 4), (10, 8), (10, 10)]
    assert rows["folds"][2]["flops"] < rows["folds"][1]["flops"] == rows["folds"][0]["flops"]
    table = (tmp_path / "folds-vit.md").read_text().splitlines()
    assert table[2].startswith("| 2× |")
    assert table[2].count("(") == 2  # the cells that there are
    assert (tmp_path / "folds-vit.png").stat().st_size > 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "snap"], "--methods: 'snap' is not one of dense, rps"),
        (["--studies", "all"], "--studies: 'all' is not one of main"),
        (["--compressions", "0.5"], "--compressions: 0.5 is below 1"),
        (["--workers", "0"], "--workers 0"),
        (["--device", "tpu"], "--device 'tpu' can't be used here"),
    ],
)
def test_bad_flags(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare.main([*flags, "--output_dir", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
