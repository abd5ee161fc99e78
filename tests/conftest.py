"""Shared by all tests: no network, one thread, no progress bars, and the tiny models that most tests use."""

import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import forks
import numpy as np
import pytest
import torch
import transformers
from tiny_configs import tiny_config

pytest.register_assert_rewrite("conversion_checks", "model_outputs", "resumed_runs")
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


def pytest_sessionfinish():
    forks.close()


@pytest.fixture(autouse=True)
def seeded():
    """Seeds the global generators: what a test draws does not depend on which tests its worker ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (what transformers masks by)
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    """``tiny("llama", auto_class=..., **changes)``: a randomly initialised model, the same at every call."""

    def make(kind="llama", auto_class=transformers.AutoModelForCausalLM, **changes):
        torch.manual_seed(0)
        return auto_class.from_config(tiny_config(kind, **changes)).eval()

    return make


@pytest.fixture
def ids():
    """Token ids (2, 9) for any of the tiny models."""
    return torch.arange(18).view(2, 9) * 5 % 97


@pytest.fixture(scope="session")
def finetune():
    """``finetune(folder, arguments)``: a run of scripts/finetune.py in a process of its own; see finetune_runs.py."""
    from finetune_runs import Finetune

    return Finetune()
