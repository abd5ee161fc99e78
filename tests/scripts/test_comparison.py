"""The comparison of scripts/compare.py: its data, its scores, its training and its budgets."""

import dataclasses
import gzip
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from comparison_runs import TINY, tiny_run

from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products.base import products_of
from studies.comparison import methods, tasks
from studies.comparison import presets as studies
from studies.comparison.methods import METHODS
from studies.comparison.training import train
from studies.methods import input_folds


@pytest.fixture
def data(images):
    return tasks.load_images(tasks.FASHION_MNIST, images, 256)


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
    compression = {"dense": 1, "fold-4": 4, "fold-8": 8}.get(method, 2)
    run = tiny_run(method, task, compression=compression)
    dense = methods.dense_model(run, data)
    total = dense.n + dense.rest
    assert total == sum(p.numel() for p in dense.model.parameters())
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
    (result,) = methods.execute(tiny_run("fold-4", compression=3), data, torch.device("cpu"))
    assert "a fold of 4" in result["unreachable"]


def test_forms_of_folding_are_what_they_say(data):
    """The same numbers and starts for all; the definition of each, the product that trains, and no trace afterwards."""
    before = WeightMap.fold_of
    for name in input_folds.FORMS:
        with input_folds.form(name):
            weight_map = WeightMap([Target("a.q", 40, 24, 0.1), Target("c", 16, 54, 0.1, 9)], ratio=0.1, input_fold=5)
            for target in weight_map.targets:
                matrix, psi = weight_map.matrix(target.name), torch.randn(weight_map.m, dtype=torch.float64)
                x = torch.randn(3, target.in_features, dtype=torch.float64)
                torch.testing.assert_close(matrix.linear(x, psi), x @ matrix.weight(psi).t())
                (folded, _) = products_of(matrix)
                fold = folded.input_fold
                torch.testing.assert_close(folded.linear(fold.fold(x), psi, None), x @ matrix.weight(psi).t())
                y = torch.randn(3, *fold.fold(x).shape[1:], dtype=torch.float64)
                torch.testing.assert_close((fold.unfold(y) * x).sum(), (fold.fold(x) * y).sum())
        blocks = {"half": 2, "double": 10, "one": 1}.get(name, 5)
        assert fold.coefficients.shape == (blocks, 5, 2)
        gram = np.einsum("jtb,jsb->bts", fold.coefficients, fold.coefficients) / blocks
        assert np.allclose(gram, np.eye(5)) == (name not in ("signs", "half", "one"))
    assert WeightMap.fold_of is before


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
