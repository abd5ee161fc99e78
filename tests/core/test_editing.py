"""Tools that edit or draw a layer's weight end in an error with a remedy, and leave the layer as it was."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers import AutoModel

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank
from hf_rps.layers.initialisers import is_initialiser


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 6), nn.Linear(6, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.b(self.a(x)))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(8, 6, kernel_size=1)

    def forward(self, x):
        return self.a(x[:, :, None])


@pytest.fixture(params=[Net, ConvNet])
def net(request):
    return get_rps_model(request.param(), RPSConfig(ratio=0.5))


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


EDITS = {
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Double()),
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "l1": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "random": lambda layer: prune.random_unstructured(layer, "weight", amount=0.5),
    "structured": lambda layer: prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0),
    "identity": lambda layer: prune.identity(layer, "weight"),
    "mask": lambda layer: prune.custom_from_mask(layer, "weight", torch.ones(layer.weight.shape)),
    "global": lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.5),
    "delete": lambda layer: delattr(layer, "weight"),
    "register": lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(layer.weight.shape))),
    "functional_call": lambda layer: torch.func.functional_call(layer, {"weight": torch.zeros(layer.weight.shape)}, ()),
    "reset_parameters": lambda layer: layer.reset_parameters(),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", EDITS)
def test_edits_of_the_weight_are_refused_and_leave_nothing_behind(net, name):
    x, layer = torch.randn(2, 8), net.a
    before, state = net(x), {key: type(value) for key, value in layer.__dict__.items()}
    with pytest.raises((RuntimeError, ValueError, AttributeError), match=r"hf_rps\.to_dense"):
        EDITS[name](layer)
    assert {key: type(value) for key, value in layer.__dict__.items()} == state
    assert list(layer._parameters) == ["bias"]
    left = (layer._forward_pre_hooks, layer._buffers, layer._modules, layer._state_dict_hooks)
    assert not any(left)
    assert torch.equal(net(x), before)


def test_after_to_dense_all_of_it_works(net):
    dense = to_dense(net).a
    prune.l1_unstructured(dense, "weight", amount=0.5)
    assert (dense.weight == 0).sum() == dense.weight.numel() // 2


def test_a_bias_is_an_ordinary_parameter(net):
    prune.l1_unstructured(net.a, "bias", amount=0.5)
    assert (net.a.bias == 0).sum() == 3
    prune.remove(net.a, "bias")
    assert list(net.a._parameters) == ["bias"]
    x = torch.randn(2, 8)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
        with pytest.raises(KeyError, match="other"):
            twin.a._parameters["other"]
        with pytest.raises(RuntimeError, match=r"hf_rps\.to_dense"):
            spectral_norm(twin.a)
    changed = torch.func.functional_call(net, {"a.bias": torch.zeros(6)}, (x,))
    with torch.no_grad():
        net.a.bias.zero_()
    torch.testing.assert_close(changed, net(x))


# ---- model.apply


def guarded(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)


def by_data(module):
    if type(module) is nn.Linear:
        module.weight.data = torch.zeros_like(module.weight)


def by_attribute(module):
    if type(module) is nn.Linear:
        module.weight = nn.Parameter(torch.zeros(6, 8))


def all_parameters(module):
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02)


def by_getattr(module):
    for name in ("weight", "bias"):
        if isinstance(module, nn.Linear):
            nn.init.zeros_(getattr(module, name))


def reset(module):
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def calls_another(module, then=None):
    guarded(module)


def init_weights(module):
    """By its name; what it calls is out of sight."""


class Initialiser:
    def __init__(self):
        self.std = 0.02

    def __call__(self, module):
        self.draw(module)

    def draw(self, module):
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=self.std)

    def method(self, module):
        self.draw(module)


def around(function):
    return lambda module: function(module)


DRAWS = {
    f.__name__: f
    for f in (guarded, by_data, by_attribute, all_parameters, by_getattr, reset, calls_another, init_weights)
} | {
    "lambda": lambda module: nn.init.normal_(module.weight) if isinstance(module, nn.Linear) else None,
    "partial": functools.partial(calls_another, then=None),
    "object": Initialiser(),
    "method": Initialiser().method,
    "closure": around(guarded),
}


@pytest.mark.parametrize("name", DRAWS)
def test_initialisers_are_told(net, name):
    before = find_bank(net).psi.clone()
    with pytest.raises(RuntimeError, match=r"would not initialise 'a'.*to_dense.*init_weights=False"):
        net.apply(DRAWS[name])
    assert torch.equal(find_bank(net).psi, before)


def count(module, seen):
    seen.append(module.weight.norm().item() if isinstance(getattr(module, "weight", None), torch.Tensor) else 0)


def dropout(module):
    if isinstance(module, nn.Dropout):
        module.p = 0.0


def _init_hooks(module):
    module.hooks = []


def test_other_uses_of_apply_go_on_working(tiny):
    model = get_rps_model(tiny("bert", AutoModel), RPSConfig(ratio=0.25))
    seen = []
    for function in (functools.partial(count, seen=seen), dropout, _init_hooks, lambda module: module.eval()):
        assert model.apply(function) is model
    assert len(seen) == len(list(model.modules()))
    query = model.encoder.layer[0].attention.self.query
    assert query.dense_weight().norm().item() in seen
    assert query.hooks == []
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert not is_initialiser(functools.partial(model._set_gradient_checkpointing, value=True))
    assert not is_initialiser(torch.nn.Module.train)


def test_transformers_initialiser_is_told_and_its_loading_goes_on(tiny, tmp_path):
    model = get_rps_model(tiny("bert", AutoModel), RPSConfig(ratio=0.25))
    with pytest.raises(RuntimeError, match=r"_init_weights\) would not initialise"):
        model.apply(model._init_weights)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    loaded.init_weights()  # its own walk, which spares what was loaded
    assert torch.equal(find_bank(loaded).psi, find_bank(model).psi)
