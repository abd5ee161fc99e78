"""Models that are compressed with a learned map, saved as the base of adapters, and what tests look at in these."""

import torch
from peft_adapters import logits
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM

from hf_rps import RPSConfig, get_rps_model

IDS = torch.arange(18).view(2, 9) * 5 % 97


def config(**changes):
    return RPSConfig(mapping="codebook", **changes)


def compressed(kind="llama", auto_class=AutoModelForCausalLM, seed=0, **options):
    """The same at every call; 3 bits, which is not the default."""
    torch.manual_seed(seed)
    model = auto_class.from_config(tiny_config(kind)).eval()
    return get_rps_model(model, config(**({"bits": 3} | options)))


def array(model, adapter="default"):
    """That of an adapter."""
    return next(p for name, p in model.named_parameters() if f"rps_banks.{adapter}.psi_" in name)


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def step(model, **arguments):
    """One of AdamW, on whatever is trained; the outputs after it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=IDS, **({"labels": IDS} | arguments)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return logits(model, IDS)
