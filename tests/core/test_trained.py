"""Whether weights are trained is told by their numbers, so the same weights start the same, whatever way they came."""

import copy

import pytest
import torch
from networks import Network
from peft import get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from hf_rps import RPSConfig, get_rps_model, size_report, to_dense
from hf_rps.conversion import find_bank
from hf_rps.targets import find_targets
from hf_rps.trained import SIDE, looks_trained, score

INITIALISERS = {
    "normal": lambda w: nn.init.normal_(w, std=0.02),
    "truncated normal": lambda w: nn.init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04),
    "uniform": nn.init.kaiming_uniform_,
    "far from zero": lambda w: nn.init.uniform_(w, 1.0, 1.1),
    "two values": lambda w: w.bernoulli_().mul_(2).sub_(1),
    "heavy tails": lambda w: w.exponential_().pow_(2),
    "orthogonal": nn.init.orthogonal_,
    "identity": nn.init.eye_,
    "constant": lambda w: nn.init.constant_(w, 0.3),
    "zero": nn.init.zeros_,
    "tiny": lambda w: nn.init.normal_(w, std=1e-12),
}


def by_rows(weight):
    return weight.normal_().mul_(torch.rand(len(weight), 1) + 0.5)


@pytest.mark.parametrize("shape", [(2, 2), (8, 8), (64, 9), (3, 200), (300, 500), (1, 40), (40, 1)])
@pytest.mark.parametrize("name", INITIALISERS)
@torch.no_grad()
def test_no_initialiser_looks_trained(name, shape):
    assert not any(looks_trained(INITIALISERS[name](torch.empty(shape))) for _ in range(20))


@torch.no_grad()
def test_the_score_is_as_often_high_as_chance_has_it():
    """Four normal scores, of which the largest counts: above 2 with a probability of 1 - 0.97725**4 = 0.088."""
    for draw in (lambda: torch.randn(24, 40), lambda: torch.rand(24, 40) - 0.5):
        scores = torch.tensor([score(draw()) for _ in range(1000)])
        assert (scores > 2).float().mean().item() == pytest.approx(0.088, abs=0.03)
        assert scores.max() < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rows_or_columns_that_differ_look_trained(dtype):
    sizes = by_rows(torch.empty(64, 64))
    means = torch.randn(64, 64) + torch.randn(64, 1) / 2
    for weight in (sizes, sizes.t(), means, means.t(), by_rows(torch.empty(2000, 700)), by_rows(torch.empty(16, 300))):
        assert looks_trained(weight.to(dtype))


@torch.no_grad()
def test_a_large_weight_is_sampled_all_over():
    weight = torch.randn(4 * SIDE, 3 * SIDE)
    weight[-SIDE:] *= 2  # a quarter, at the end
    assert looks_trained(weight)


def test_fresh_models_do_not_look_trained(tiny):
    for kind in ("llama", "gpt2", "bert"):
        targets = find_targets(tiny(kind), RPSConfig())
        assert not any(looks_trained(candidate.weight) for candidate in targets)


def trained(model, ids, steps=150):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_training_is_seen_and_the_way_weights_came_is_not(tiny, ids, tmp_path):
    """Trained here, copied, filled from a state dict or loaded: one start, and bit for bit the same array."""
    random, model = tiny("gpt2"), trained(tiny("gpt2"), ids)
    expected = {}
    for dense, how in ((random, "rescale"), (model, "project")):
        dense.save_pretrained(tmp_path / how)
        filled = tiny("gpt2")
        filled.load_state_dict(dense.state_dict())
        ways = {
            "as it is": copy.deepcopy(dense),
            "loaded": AutoModelForCausalLM.from_pretrained(tmp_path / how),
            "copy of it": copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / how)),
            "state dict": filled,
        }
        expected[how] = find_bank(get_rps_model(copy.deepcopy(dense), RPSConfig(init_weights=how))).psi
        for way, twin in ways.items():
            bank = find_bank(get_rps_model(twin, RPSConfig()))
            assert bank.array.started == how, way
            assert torch.equal(bank.psi, expected[how]), way


@torch.no_grad()
def test_the_majority_of_the_weights_decides(tiny):
    for count, how in ((1, "rescale"), (2, "project")):
        model = tiny("llama")  # three blocks of one size
        for block in model.model.layers[:count]:
            for layer in block.modules():
                if isinstance(layer, nn.Linear):
                    by_rows(layer.weight)
        assert find_bank(get_rps_model(model, RPSConfig())).array.started == how


def test_the_start_is_logged_and_reported(tiny, caplog, tmp_path):
    with caplog.at_level("INFO", logger="hf_rps.initial"):
        model = get_rps_model(tiny("bert", AutoModel), RPSConfig())
    (record,) = caplog.records
    assert "0 % of the targeted weights look trained" in record.message
    assert "init_weights='rescale'" in record.message
    assert "'project'" in record.message
    assert size_report(model).init_weights == size_report(copy.deepcopy(model)).init_weights == "rescale"
    assert str(size_report(model)).endswith("\ninit_weights: rescale")
    model.save_pretrained(tmp_path)
    loaded = size_report(AutoModel.from_pretrained(tmp_path))
    assert loaded.init_weights is None
    assert "init_weights" not in str(loaded)
    assert size_report(to_dense(model)).init_weights is None
    for how in ("project", False):
        report = size_report(get_rps_model(tiny("bert", AutoModel), RPSConfig(init_weights=how)))
        assert report.init_weights == how
        assert str(report).endswith(f"\ninit_weights: {how}")


def test_the_weight_of_an_earlier_adapter_counts_as_trained(tiny):
    """At ratio 1 its weights are those of the random model, and adding an adapter to it still projects."""
    model = get_peft_model(tiny("gpt2"), RPSConfig(ratio=1))
    model.add_adapter("second", RPSConfig(ratio=0.5, seed=1))
    banks = model.base_model.model.rps.rps_banks
    assert banks["default"].array.started == "rescale"
    assert banks["second"].array.started == "project"


def test_a_bank_that_nobody_filled_has_no_start():
    assert Network().bank.array.started is None
