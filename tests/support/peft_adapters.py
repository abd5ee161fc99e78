"""Models with an RPS adapter, and what tests look at in them."""

import torch

from hf_rps import RPSConfig
from hf_rps.integrations.peft.layers import DeltaLinear, ReplaceLinear

MODES = ["delta", "replace"]


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def config(mode, **changes):
    """An adapter that does something from the start."""
    return RPSConfig(**{"ratio": 0.2, "mode": mode, "init_weights": False} | changes)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def psi(model, adapter="default"):
    return next(p for name, p in model.named_parameters() if f"rps.rps_banks.{adapter}.psi_" in name)


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (DeltaLinear, ReplaceLinear))}
