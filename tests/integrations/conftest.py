"""A saved model that several files of tests start from."""

import pytest
import torch

from hf_rps import RPSConfig, get_rps_model
from hf_rps.conversion import find_bank


@pytest.fixture
def saved(tiny, tmp_path):
    """A compressed Llama that was trained a little, and the folder it was saved to."""
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.1, seed=3))
    with torch.no_grad():
        find_bank(model).psi.mul_(1.5)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"
