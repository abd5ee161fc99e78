"""Pareto-continuity: is a model that stores as many numbers as the dense one the dense one?"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from studies.comparison.methods import METHODS, dense_model
from studies.comparison.presets import RATES, Preset, make_run
from studies.comparison.report import markdown, score_text, unit
from studies.comparison.runner import Runner, load
from studies.comparison.tasks import FASHION_MNIST, TASKS, Data
from studies.comparison.training import Run, train

SHARING_METHODS = tuple(name for name, method in METHODS.items() if method.kind in ("rps", "mapping"))
_TRAJECTORY_STEPS, _TRAJECTORY_ROWS = 30, 64  # steps, and rows of a batch


def continuity(runner: Runner, task: str, preset: Preset, dataset: str = FASHION_MNIST) -> list[dict]:
    """Is a model that stores as many numbers as the dense one the dense one? Plain SGD, the same rate for all.

    Returns:
        A row per method: "method"; "logits", the largest difference of a logit from the dense model's before training,
        over the largest logit; "loss", the largest relative difference of the loss over 30 steps in float64 from the
        same weights; "test", the test scores of whole runs over the seeds.
    """
    settings = {"compressions": (1,), "optimizer": "sgd", "learning_rate": RATES["sgd"][1]}
    names = ("dense", *SHARING_METHODS)
    runs = [
        make_run(task, name, preset.short[task], dataset, seed=seed, **settings)
        for name in names
        for seed in preset.seeds
    ]
    found = iter(runner(runs, f"{task}: no compression"))
    scores = {name: [next(found)[0]["test"] for _ in preset.seeds] for name in names}
    data = load(runs[0], runner.environment)
    rows = min(_TRAJECTORY_ROWS, runs[0].train_size // _TRAJECTORY_STEPS)
    size = dataclasses.replace(preset.short[task], train_size=_TRAJECTORY_STEPS * rows, batch_size=rows, epochs=1)
    traces = {
        name: _trace(make_run(task, name, size, dataset, seed=preset.seeds[0], **settings), data) for name in names
    }
    logits, losses = traces["dense"]
    return [
        {
            "task": task,
            "method": name,
            "logits": ((traces[name][0] - logits).abs().max() / logits.abs().max()).item(),
            "loss": ((traces[name][1] - losses) / losses).abs().max().item(),
            "test": scores[name],
        }
        for name in names
    ]


def _trace(run: Run, data: Data) -> tuple[Tensor, Tensor]:
    """Logits of the first rows before training, and the loss of every step, in float64."""
    dense = dense_model(run, data)
    dense.model.double()
    model, _ = METHODS[run.method].build(dense, 1, run, data)
    split = {name: t.double() if t.is_floating_point() else t for name, t in data.train.items()}
    with torch.no_grad():
        logits = model.eval()(**{name: tensor[:4] for name, tensor in split.items()}).logits
    losses: list[Tensor] = []
    train(model, run, split, on_step=lambda step, loss: losses.append(loss))
    return logits, torch.stack(losses)


def continuity_table(rows: list[dict]) -> str:
    """How far each kind of sharing is from the dense model when it stores as many numbers."""
    task = rows[0]["task"]
    lines = [
        [METHODS[row["method"]].title, f"{row['logits']:.1e}", f"{row['loss']:.1e}", score_text(task, row["test"])]
        for row in rows
    ]
    header = [
        f"{TASKS[task].title} at 1×, SGD", "logits at the start, relative difference from dense",
        "loss over 30 steps in float64, largest relative difference", unit(task),
    ]  # fmt: skip
    return markdown(header, lines)
