"""A toy mapping, a toy kind of layer and a toy product, registered from outside the library, and a model with them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_rps.layers import kinds
from hf_rps.layers.base import RPSLayer
from hf_rps.mappings import table
from hf_rps.mappings.base import Mapping, SharedMatrix
from hf_rps.products import base as products

# ---- a mapping: one class for the group, one for a matrix


class Additive(Mapping):
    """Every matrix has a number per row and one per column of its own."""

    name = "additive"
    help = "a number per row plus one per column"

    def __init__(self, spans, ratio, key, base):
        self.n, self.base = spans[-1].stop, base
        self.starts, self.m = {}, 0
        for span in spans:
            self.starts[span] = base + self.m
            self.m += span.rows + span.cols

    def matrix(self, span, scale, signs):
        return AdditiveMatrix(span.rows, span.cols, self.starts[span], torch.from_numpy(signs) * scale)


class AdditiveMatrix(SharedMatrix):
    def __init__(self, rows, cols, start, factor):
        self.rows, self.cols, self.start, self.factor = rows, cols, start, factor

    def weight(self, psi):
        rows, cols = psi[self.start : self.start + self.rows + self.cols].split([self.rows, self.cols])
        return ((rows[:, None] + cols) * self.factor.to(psi.device)).to(psi.dtype)


# ---- a kind of layer: one class for the kind, one for what stands in


class Gate(nn.Module):
    """x K with K (in, out)."""

    def __init__(self, size):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(size, size) / size**0.5)

    def forward(self, x):
        return x @ self.kernel


class RPSGate(RPSLayer):
    def __init__(self, name, bank, dense, parameter):
        super().__init__(name, bank, dense, parameter)
        self.weight_shape = (self.shared.target.in_features, self.shared.target.out_features)

    def as_stored(self, weight):
        return weight.t()

    def forward(self, x):
        return self.shared.linear(x, None, x.dtype)


class GateKind(kinds.LayerKind):
    noun, layer, parameters = "gates", RPSGate, ("kernel",)

    def matches(self, module):
        return isinstance(module, Gate)

    def matrix(self, weight):
        return weight.t()


# ---- a product: one class


class Threefold(products.Made):
    """For three tokens only."""

    calls = 0

    def fits(self, x):
        return x.shape[:-1] == (3,)

    def linear(self, x, psi, bias):
        Threefold.calls += 1
        return super().linear(x, psi, bias)

    def gradients(self, gy, x, psi, needs_x, into):
        Threefold.calls += 1
        return super().gradients(gy, x, psi, needs_x, into)


def register():
    table.register(Additive)
    kinds.register(GateKind())
    products.register(Threefold)


# ---- a model with all of them


class NetConfig(PreTrainedConfig):
    model_type = "toy"


class Net(PreTrainedModel):
    config_class = NetConfig

    def __init__(self, config):
        super().__init__(config)
        self.gate, self.inner, self.outer = Gate(12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.post_init()

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)) * torch.sigmoid(self.gate(x)))
