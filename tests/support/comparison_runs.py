"""Runs of scripts/compare.py with models and data that train in a second."""

from studies.comparison import presets as studies
from studies.comparison import tasks
from studies.comparison.presets import Size, make_run
from studies.comparison.training import Run

TINY = {
    "vit": Size(studies._vit(16, 32, 2, 14), 256, 1, 16),
    "convnet": Size((("hidden_sizes", (4, 8)), ("depths", (3, 3)), ("embedding_size", 4)), 256, 1, 16),
    "lm": Size(studies._gpt2(16, 2, 32), 128, 1, 16),
}


def tiny_run(method: str, task: str = "vit", compression: float = 4, **changes) -> Run:
    values = {"compressions": (compression,), "learning_rate": 3e-3, "seed": 0} | changes
    return make_run(task, method, TINY[task], tasks.FASHION_MNIST, **values)
