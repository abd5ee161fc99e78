"""The comparison of scripts/compare.py: its data, its training, its budgets, its cache and what it concludes."""

import dataclasses
import gzip
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.comparison import cli as compare
from studies.comparison import learning_rates, main_table, methods, report, stability, tasks
from studies.comparison import presets as studies
from studies.comparison.methods import METHODS
from studies.comparison.presets import Size, make_run
from studies.comparison.runner import Environment, Runner
from studies.comparison.training import Run, train

TINY = {
    "vit": Size(studies._vit(16, 32, 2, 14), 256, 1, 16),
    "convnet": Size((("hidden_sizes", (4, 8)), ("depths", (3, 3)), ("embedding_size", 4)), 256, 1, 16),
    "lm": Size(studies._gpt2(16, 2, 32), 128, 1, 16),
}


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(head + array.tobytes())


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder in the form of Fashion-MNIST's: ten classes, each a bright square at a place of its own, with noise."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("train", 800), ("t10k", 200)):
        labels = random.integers(0, 10, count).astype(np.uint8)
        pixels = random.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[7 * row : 7 * row + 7, 7 * column : 7 * column + 7] += 180
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture
def data(images):
    return tasks.load_images(tasks.FASHION_MNIST, images, 256)


@pytest.fixture
def tiny_presets(monkeypatch):
    """Both presets with models and data that train in a second."""
    preset = dataclasses.replace(studies.PRESETS["quick"], sizes=TINY, short=TINY, seeds=(0, 1))
    law_rates = {arm: rates[:3] for arm, rates in learning_rates._LAW_RATES.items()}
    monkeypatch.setattr(learning_rates, "_LAW_RATES", law_rates)
    monkeypatch.setitem(compare.PRESETS, "quick", preset)
    return preset


def tiny_run(method: str, task: str = "vit", compression: float = 4, **changes) -> Run:
    values = {"compressions": (compression,), "learning_rate": 3e-3, "seed": 0} | changes
    return make_run(task, method, TINY[task], tasks.FASHION_MNIST, **values)


# ---- data and scores


def test_images(images, data):
    pixels = data.train["pixel_values"]
    assert pixels.shape == (256, 1, 28, 28)
    assert pixels.mean().abs() < 1e-5
    assert (pixels.std() - 1).abs() < 1e-3
    assert len(data.validation["labels"]) == 80
    with gzip.open(images / "t10k-labels-idx1-ubyte.gz") as file:
        assert data.test["labels"].tolist() == list(file.read()[8:])  # in the file's order
    with pytest.raises(ValueError, match="--train_size 800: fashion-mnist has 720 images"):
        tasks.load_images(tasks.FASHION_MNIST, images, 800)
    with pytest.raises(FileNotFoundError, match="install Debian's package dataset-fashion-mnist"):
        tasks.load_images(tasks.FASHION_MNIST, images / "none", 8)


def test_a_folder_of_images(tmp_path):
    """--image_dataset takes what finetune.py takes: here a folder with a subfolder a class."""
    from PIL import Image

    for split, count in (("train", 20), ("test", 5)):
        for label in ("cat", "dog"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                shade = (10 * i, 200, 0) if label == "cat" else (0, 10 * i, 200)
                Image.new("RGB", (32, 32), shade).save(folder / f"{i}.png")
    loaded = tasks.load_images(str(tmp_path), Path("unused"), 24)
    assert loaded.train["pixel_values"].shape == (24, 3, 32, 32)
    assert sorted(loaded.test["labels"].tolist()) == [0] * 5 + [1] * 5
    assert 0 < loaded.train["labels"].float().mean() < 1  # sorted by class in the folder, mixed here
    config = tasks.make_config("convnet", {}, loaded)
    assert (config.num_channels, config.num_labels) == (3, 2)


def test_text_has_each_file_in_one_split():
    loaded = tasks.load_text(32, 128)
    assert {name: tuple(split["input_ids"].shape) for name, split in loaded._asdict().items()} == {
        "train": (128, 32),
        "validation": (500, 32),
        "test": (1500, 32),
    }
    rows = [{bytes(row.tolist()) for row in split["input_ids"]} for split in loaded]
    # licence headers and blank lines are in many files; sequences as such are not
    assert all(len(a & b) <= 0.02 * min(len(a), len(b)) for a, b in itertools.combinations(rows, 2))
    with pytest.raises(ValueError, match="this Python's text has"):
        tasks.load_text(32, 10**9)


@pytest.mark.parametrize("name", studies.PRESETS)
def test_there_is_as_much_text_as_a_preset_asks_for(name):
    for sizes in (studies.PRESETS[name].sizes, studies.PRESETS[name].short):
        length = dict(sizes["lm"].model)["n_positions"]
        assert len(tasks.load_text(length, sizes["lm"].train_size).train["labels"]) == sizes["lm"].train_size


def test_scores_by_their_definitions(data):
    torch.manual_seed(0)
    model = tasks.TASKS["vit"].build(tasks.make_config("vit", dict(TINY["vit"].model), data)).eval()
    with torch.no_grad():
        right = [model(pixels[None]).logits.argmax().item() == label
                 for pixels, label in zip(*data.test.values(), strict=True)]  # fmt: skip
    assert tasks.accuracy(model, data.test) == sum(right) / len(right)
    text = tasks.load_text(32, 128)
    config = tasks.make_config("lm", dict(TINY["lm"].model), text)
    model = tasks.TASKS["lm"].build(config).eval()
    with torch.no_grad():
        nats = [model(input_ids=row[None], labels=row[None]).loss.item() for row in text.validation["input_ids"][:7]]
    few = {name: tensor[:7] for name, tensor in text.validation.items()}
    assert tasks.bits_per_byte(model, few) == pytest.approx(np.mean(nats) / math.log(2), abs=1e-5)
    assert tasks.TASKS["lm"].chance(config) == 8


# ---- training


class Recorder(torch.nn.Module):
    """Notes what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, labels):
        self.seen.append(labels.tolist())
        return transformers.utils.ModelOutput(loss=self.weight * 1.0)


def test_a_rewound_training_goes_on_with_the_batches_and_rates_that_were_left():
    run = dataclasses.replace(tiny_run("dense", optimizer="sgd"), train_size=20, batch_size=4, epochs=2)
    split = {"labels": torch.arange(20)}
    whole, rest = Recorder(), Recorder()
    rates = {}
    for name, model, first in (("whole", whole, 0), ("rest", rest, 3)):
        weights = []
        train(model, run, split, first, lambda step, loss, w=weights, m=model: w.append(m.weight.item()))
        rates[name] = weights
    assert len(whole.seen) == run.steps == 10
    assert sorted(itertools.chain(*whole.seen[:5])) == list(range(20))
    assert whole.seen[:5] != whole.seen[5:]
    assert rest.seen == whole.seen[3:]
    # without momentum's memory the first step after rewinding is the schedule's rate at that step
    lengths = transformers.get_cosine_schedule_with_warmup
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=run.learning_rate)
    schedule = lengths(optimizer, 1, 10)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert rates["rest"][0] == pytest.approx(-1.9 * schedule.get_last_lr()[0])  # Nesterov: 1 + 0.9 at the first step


def test_divergence_counts_as_a_guess(data):
    run = tiny_run("rps", optimizer="sgd", learning_rate=1e30)
    (result,) = methods.execute(run, data, torch.device("cpu"))
    assert result["diverged"]
    assert result["test"] == 0.1


# ---- budgets


@pytest.mark.parametrize("task", list(tasks.TASKS))
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.build is not None])
def test_what_is_stored(task, method, data, monkeypatch):
    """Numbers in all are those of the model that is trained, but for weights that are held at zero."""
    monkeypatch.setattr("studies.methods.at_start.SYNFLOW_ROUNDS", 5)
    data = tasks.load_text(32, 128) if task == "lm" else data
    run = tiny_run(method, task, compression=2)
    dense = methods.dense_model(run, data)
    total = dense.n + dense.rest
    assert total == sum(p.numel() for p in dense.model.parameters())
    compression = 1 if method == "dense" else 2
    model, stored = METHODS[method].build(dense, compression, run, data)
    nonzero = sum(int((m.weight_mask if hasattr(m, "weight_mask") else p).count_nonzero())
                  for m in model.modules() for name, p in m._parameters.items()
                  if p is not None and name == "weight_orig")  # fmt: skip
    others = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("weight_orig"))
    assert stored.numbers == nonzero + others
    budget = dense.rest + dense.n / compression
    assert stored.numbers == pytest.approx(budget, rel=0.25 if METHODS[method].kind == "smaller" else 0.01)
    mask = math.ceil(dense.n / 8) if METHODS[method].kind == "start" else 0
    assert stored.bytes == 4 * stored.numbers + mask
    batch = {name: tensor[:2] for name, tensor in data.train.items()}
    assert torch.isfinite(model(**batch).loss)


def test_a_budget_out_of_reach_is_a_result(data):
    (result,) = methods.execute(tiny_run("low-rank", compression=100), data, torch.device("cpu"))
    assert "smallest ratio that can be reached" in result["unreachable"]


def test_lottery_tickets_are_one_chain(data, monkeypatch):
    """Trainings of 1, 0.8, 0.64, 0.512, 0.5, 0.4, ... of the weights; those of 1/2 and 1/4 are scored."""
    trained = []
    original = methods.train

    def spy(model, run, split, first_step=0, on_step=None):
        dense = [m for m in model.modules() if hasattr(m, "weight_mask")]
        kept = sum(int(m.weight_mask.sum()) for m in dense)
        trained.append((first_step, kept))
        return original(model, run, split, first_step, on_step)

    monkeypatch.setattr(methods, "train", spy)
    results = methods.execute(tiny_run("ltr", compressions=(2, 4)), data, torch.device("cpu"))
    n = methods.dense_model(tiny_run("ltr"), data).n
    densities = [0.8, 0.64, 0.512, 0.5, 0.4, 0.32, 0.256, 0.25]
    assert trained == [(0, 0), *((2, round(d * n)) for d in densities)]  # 16 steps, rewound to the second
    assert [(r["compression"], r["trainings"]) for r in results] == [(2, 5), (4, 9)]
    assert [r["numbers"] - results[1]["numbers"] for r in results] == [round(n / 2) - round(n / 4), 0]


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
    compare.main(["--studies", "stability", "learning-rate", "continuity", "--seeds", "0",
                  "--fashion_mnist_dir", str(images), "--output_dir", str(tmp_path), "--workers", "1"])  # fmt: skip
    rows = {name: [json.loads(line) for line in (tmp_path / f"{name}-vit.jsonl").read_text().splitlines()]
            for name in ("stability", "learning-rate", "continuity")}  # fmt: skip
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


# ---- what is concluded


@given(st.floats(-6.5, -2.5), st.floats(0.05, 2), st.booleans(), st.floats(-7, -3), st.integers(4, 7))
def test_peak_of_a_parabola(top, bend, higher, first, count):
    """Exact for a parabola over the logarithm of evenly spaced rates; the end of the grid where the top is beyond."""
    logs = first + 0.7 * np.arange(count)
    scores = (-1 if higher else 1) * bend * (logs - top) ** 2
    found = math.log(learning_rates.peak(list(np.exp(logs)), list(scores), higher))
    if logs[0] + 0.36 < top < logs[-1] - 0.36:
        assert found == pytest.approx(top, abs=1e-6)
    else:
        assert logs[0] - 1e-9 <= found <= logs[-1] + 1e-9


@settings(deadline=None)
@given(st.floats(-0.6, 0.6), st.floats(-6, -4))
def test_law_finds_its_exponent(exponent, best):
    rates = [math.exp(x) for x in np.arange(-11, 0, 0.7)]
    rows = [
        {"task": "vit", "optimizer": "adamw", "init_exponent": 0.5, "compression": c, "learning_rate": rate,
         "validation": [1 - 0.05 * (math.log(rate) - best - shift - exponent * math.log(c)) ** 2
                        for shift in (-0.1, 0.1)]}
        for c in (1, 4, 20) for rate in rates
    ]  # fmt: skip
    (fit,) = learning_rates.law_fits(rows)
    assert fit["exponent"] == pytest.approx(exponent, abs=1e-6)
    assert fit["best"][1] == pytest.approx(math.exp(best), rel=1e-6)
    assert fit["error"] > 0


def test_tables_mark_the_best_the_edges_and_the_unreachable():
    common = {"task": "lm", "numbers": 10, "bytes": 40, "diverged": 0, "validation": [1.0, 1.0]}
    rows = [
        common | {"method": "dense", "compression": 1, "learning_rate": 0.01, "at_edge": False, "test": [2.0, 2.2]},
        common | {"method": "rps", "compression": 10, "learning_rate": 0.01, "at_edge": False, "test": [2.5, 2.5]},
        common | {"method": "snip", "compression": 10, "learning_rate": 0.1, "at_edge": True, "test": [3.0, 3.2]},
        {"task": "lm", "method": "depth", "compression": 10, "unreachable": "why"},
    ]
    table = main_table.compare_table(rows)
    assert "| RPS | **2.500 ± 0.000** at 0.01 |" in table  # fewer bits are better
    assert "| SNIP | 3.100 ± 0.141 at 0.1\\* |" in table
    assert "| smaller dense, depth | can't reach |" in table
    assert "Dense: 2.100 ± 0.141 at 0.01, 10 numbers, 40 bytes." in table


def test_the_page_is_filled_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n")
    assert report.fill(page, "one", "| new \\1 |\n")
    assert report.fill(page, "two", "x\n")
    assert not report.fill(page, "three", "y\n")
    assert page.read_text() == "a\n<!-- one -->\n| new \\1 |\n<!-- end -->\nb\n<!-- two -->\nx\n<!-- end -->\n"


def test_the_page_has_a_place_for_every_table():
    page = report.PAGE.read_text()
    for name in ("main", "storage", "learning-rate", "continuity"):
        assert f"<!-- {name}-vit -->" in page
        assert f"<!-- {name}-convnet -->" in page
    assert "<!-- stability-vit -->" in page
    assert "<!-- theory -->" in page
