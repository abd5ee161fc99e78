"""What rules and optimizers that look at shapes and names make of psi, as docs/training.md says."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_rps import RPSConfig, get_rps_model
from hf_rps.conversion import find_bank


@pytest.fixture
def model(tiny):
    return get_rps_model(tiny(), RPSConfig(ratio=0.3, grad_scaling="norm"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_trainer_gives_psi_weight_decay(tiny, tmp_path, kind):
    """Its rule goes by names and by kinds of layers, not by shapes."""
    model = get_rps_model(tiny(kind), RPSConfig(ratio=0.3))
    trainer = Trainer(model, TrainingArguments(tmp_path, weight_decay=0.1, report_to=[], use_cpu=True))
    trainer.create_optimizer()
    decay = [group["weight_decay"] for group in trainer.optimizer.param_groups
             if any(parameter is find_bank(model).psi for parameter in group["params"])]  # fmt: skip
    assert decay == [0.1]


def test_groups_by_shape_leave_psi_out_and_the_groups_of_the_docs_do_not(model):
    psi = find_bank(model).psi
    assert psi.ndim < 2  # what rules by shape exempt
    decayed = [p for name, p in model.named_parameters() if p.dim() >= 2 or ".rps.psi" in f".{name}"]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 and ".rps.psi" not in f".{name}"]
    assert len(decayed) + len(others) == len(list(model.parameters()))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    before = psi.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(psi.detach(), before * (1 - 0.1 * 0.1))


def test_optimizers_of_matrices_refuse_psi(model):
    with pytest.raises(ValueError, match="only supports 2D"):
        torch.optim.Muon([find_bank(model).psi])
