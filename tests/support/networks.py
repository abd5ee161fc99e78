"""Small networks of every kind of layer over one bank, and the same by definition."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_rps.layers.convolution import RPSConv
from hf_rps.layers.kinds import kind_of
from hf_rps.mappings import definition
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.psi.bank import Bank

KINDS = {
    "linear": {"kind": "linear"},
    "linear without bias": {"kind": "linear", "bias": False},
    "Conv1D": {"kind": "conv1d"},
    "many short runs": {"kind": "linear", "ratio": 0.004},
    "runs shorter than a row": {"kind": "linear", "ratio": 0.0007},
    "ratio 1": {"kind": "linear", "ratio": 1.0},
    "block sharing": {"kind": "linear", "sharing": "block"},
    "module sharing": {"kind": "linear", "sharing": "module"},
    "no sign": {"kind": "linear", "sign": "none"},
    "sign an element": {"kind": "linear", "sign": "element"},
    "roast": {"kind": "linear", "mapping": "roast"},
    "hash": {"kind": "linear", "mapping": "hash", "sign": "element"},
    "convolution": {"kind": "convolution"},
    "convolution, no bias, many short runs": {"kind": "convolution", "bias": False, "ratio": 0.02},
    "convolution, hash": {"kind": "convolution", "mapping": "hash", "sign": "element"},
}
SIZES = [16, 40, 24, 16]
CHANNELS = [5, 7, 6, 5]  # of convolutions, which read the inputs (3, 5, 16) as 3 samples of 5 channels


class Network(nn.Module):
    """A few layers over one bank; a forward call is one pass."""

    def __init__(self, kind="linear", bias=True, dtype=torch.float64, grad_scaling="projection", **options):
        super().__init__()
        targets, dense = [], []
        for i, (cols, rows) in enumerate(pairwise(CHANNELS if kind == "convolution" else SIZES)):
            if kind == "convolution":
                layer = nn.Conv1d(cols, rows, kernel_size=3, padding=1, bias=bias)
            else:
                layer = Conv1D(rows, cols) if kind == "conv1d" else nn.Linear(cols, rows, bias=bias)
            targets.append(Target(f"layers.{i}.proj", rows, layer.weight.numel() // rows, 0.1 * (i + 1)))
            dense.append(layer.to(dtype))
        self.bank = Bank(WeightMap(targets, **({"ratio": 0.2} | options)), grad_scaling, dtype=dtype)
        nn.init.normal_(self.bank.psi, std=self.bank.weight_map.init_std)
        self.layers = nn.ModuleList()
        for target, layer in zip(targets, dense, strict=True):
            self.layers.append(kind_of(layer).layer(target.name, self.bank, layer))
        for layer in self.layers:
            if layer.bias is not None:
                nn.init.normal_(layer.bias)
        self.bank.array.passes.watch(self)

    def forward(self, x, checkpointing=None):
        for layer in self.layers:
            if checkpointing is None:
                x = torch.tanh(layer(x))
            else:
                x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=checkpointing)
        return x

    def by_definition(self, x, psi):
        """The same network from psi by slots and signs, one number at a time."""
        for layer in self.layers:
            weight = definition.weight(psi, self.bank.weight_map, layer.name)
            if isinstance(layer, RPSConv):
                x = F.conv1d(x, weight.view(layer.weight.shape), layer.bias, padding=1)
            else:
                x = F.linear(x, weight, layer.bias)
            x = torch.tanh(x)
        return x

    def psi_gradient(self, loss_of):
        """Gradient of ``loss_of(psi)`` divided as ``grad_scaling`` says, by definition."""
        psi = self.bank.psi.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(psi), psi)
        gamma = torch.from_numpy(definition.gamma(self.bank.weight_map)).to(psi)
        divisor = {"projection": gamma, "norm": gamma.sqrt(), "none": torch.ones_like(gamma)}[self.bank.grad_scaling]
        return gradient / divisor.masked_fill(divisor == 0, 1)


def inputs(dtype=torch.float64):
    return torch.randn(3, 5, SIZES[0], dtype=dtype, requires_grad=True)
