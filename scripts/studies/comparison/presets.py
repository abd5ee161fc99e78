"""How much work a comparison is: sizes of models and data for two CPU cores or a GPU, and grids of learning rates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from studies.comparison.methods import METHODS
from studies.comparison.tasks import CPYTHON, TASKS
from studies.comparison.training import Run

# factors of about 3, from the rate at which a dense model hardly learns to that at which it diverges
RATES = {"adamw": (1e-3, 3e-3, 1e-2, 3e-2), "sgd": (0.01, 0.03, 0.1, 0.3)}


@dataclass(frozen=True)
class Size:
    """How large the work of a task is: the model's config, and what it is trained on for how long."""

    model: tuple[tuple[str, float], ...]
    train_size: int
    epochs: float
    batch_size: int


@dataclass(frozen=True)
class Preset:
    """A size for every task, and which cells are filled.

    Attributes:
        sizes: By task. ``short``: the same for the sweeps over learning rates, which need hundreds of runs.
        tasks, compressions, seeds: Of the main table.
        law_compressions, stability_seeds: Of the other studies.
    """

    sizes: dict[str, Size]
    short: dict[str, Size]
    tasks: tuple[str, ...]
    compressions: tuple[float, ...]
    seeds: tuple[int, ...]
    law_compressions: tuple[float, ...]
    stability_seeds: tuple[int, ...]


# Weights start at std 1 / sqrt(hidden size) as linear layers usually do. transformers' default 0.02 is made for hidden
# sizes near 1,000; these small models learn slowly from it (the quick ViT: 72 % test accuracy instead of 82 %).


def _vit(hidden: int, mlp: int, layers: int, patch: int) -> tuple[tuple[str, float], ...]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    return (*zip(names, (hidden, mlp, layers, 4, patch), strict=True), ("initializer_range", hidden**-0.5))


def _gpt2(hidden: int, layers: int, tokens: int) -> tuple[tuple[str, float], ...]:
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": tokens}
    return tuple((sizes | {"initializer_range": hidden**-0.5}).items())


_QUICK_VIT, _QUICK_LM = _vit(64, 256, 3, 7), _gpt2(64, 3, 64)
_FULL_VIT, _FULL_LM = _vit(128, 512, 6, 4), _gpt2(256, 6, 256)
PRESETS = {
    # two cores, under 30 minutes for the main table of the ViT; many small steps learn more in this time than few
    "quick": Preset(
        sizes={
            "vit": Size(_QUICK_VIT, 16_000, 1, 32),
            "convnet": Size((), 16_000, 1, 32),
            "lm": Size(_QUICK_LM, 4000, 1, 8),
        },
        short={
            "vit": Size(_QUICK_VIT, 8000, 1, 32),
            "convnet": Size((), 8000, 1, 32),
            "lm": Size(_QUICK_LM, 2000, 1, 8),
        },
        tasks=("vit",),
        compressions=(10, 50),
        seeds=(0, 1, 2),
        law_compressions=(1, 4, 20, 100),
        stability_seeds=(0,),
    ),
    # a GPU, every cell
    "full": Preset(
        sizes={
            "vit": Size(_FULL_VIT, 55_000, 20, 128),
            "convnet": Size((), 55_000, 20, 128),
            "lm": Size(_FULL_LM, 30_000, 10, 32),
        },
        short={
            "vit": Size(_FULL_VIT, 20_000, 4, 128),
            "convnet": Size((), 20_000, 4, 128),
            "lm": Size(_FULL_LM, 20_000, 1, 32),
        },
        tasks=("vit", "convnet", "lm"),
        compressions=(1, 2, 5, 10, 20, 50, 100),
        seeds=(0, 1, 2),
        law_compressions=(1, 2, 5, 10, 20, 50, 100),
        stability_seeds=(0, 1, 2),
    ),
}


def make_run(task: str, method: str, size: Size, dataset: str, **settings) -> Run:
    """A run of ``method`` on a task of ``size``; text tasks have data of their own."""
    if settings.get("init_std") is None:
        settings.setdefault("init_exponent", METHODS[method].init_exponent)
    return Run(
        task=task,
        method=method,
        optimizer=settings.pop("optimizer", TASKS[task].optimizer),
        dataset=CPYTHON if task == "lm" else dataset,
        **dataclasses.asdict(size) | {"model": size.model},
        **settings,
    )
