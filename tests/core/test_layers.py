"""Conformance of every kind of layer: the fast path against the definition, in all that autograd does."""

import copy
import pickle
import threading
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from ways import read

from hf_rps.layers.convolution import RPSConv
from hf_rps.layers.kinds import kind_of
from hf_rps.layers.linear import RPSLinear
from hf_rps.layers.stand_in import WeightStandIn
from hf_rps.mappings import definition
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products import views
from hf_rps.products.autograd import linear_by_definition
from hf_rps.products.base import Made, choose, products_of
from hf_rps.products.views import Views
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


def ways(options):
    """How the weights of such a network may be read: views of psi, or made for a product."""
    indexed = options.get("mapping", "fold") != "fold" or options.get("sign") == "element"
    return ["made"] if indexed or options["kind"] == "convolution" else ["views", "made"]


@pytest.fixture(params=[(kind, way) for kind, options in KINDS.items() for way in ways(options)], ids=", ".join)
def network(request):
    kind, way = request.param
    torch.manual_seed(0)
    return read(Network(**KINDS[kind]), way)


def is_open(network):
    return getattr(network.bank.array.passes._open_here, "readings", None) is not None


def inputs(dtype=torch.float64):
    return torch.randn(3, 5, SIZES[0], dtype=dtype, requires_grad=True)


def test_forward_and_gradients_follow_the_definition(network):
    x = inputs()
    y = network(x)
    biases = [layer.bias for layer in network.layers if layer.bias is not None]
    torch.testing.assert_close(y, network.by_definition(x, network.bank.psi))
    grad_x, *grad_bias = torch.autograd.grad(y.square().sum(), [x, *biases])
    expected = torch.autograd.grad(
        network.by_definition(x, network.bank.psi).square().sum(),
        [x, *biases],
    )
    torch.testing.assert_close([grad_x, *grad_bias], list(expected))
    network(x).square().sum().backward()
    expected = network.psi_gradient(lambda psi: network.by_definition(x.detach(), psi).square().sum())
    torch.testing.assert_close(network.bank.psi.grad, expected)


@pytest.mark.parametrize("grad_scaling", ["projection", "norm", "none"])
@pytest.mark.parametrize("mapping", ["fold", "hash"])
def test_every_gradient_scaling(grad_scaling, mapping):
    network = Network(grad_scaling=grad_scaling, mapping=mapping)
    x = inputs()
    network(x).square().sum().backward()
    expected = network.psi_gradient(lambda psi: network.by_definition(x.detach(), psi).square().sum())
    torch.testing.assert_close(network.bank.psi.grad, expected)


def test_long_pieces_are_divided_in_place():
    targets = [Target("a", 256, 512, 0.1), Target("b", 512, 256, 0.2)]
    bank = Bank(WeightMap(targets, ratio=0.6), dtype=torch.float64)
    gradient = torch.randn(bank.weight_map.m, dtype=torch.float64)
    divisor = bank.array.divisor
    expected = gradient / divisor.tensor(gradient.device, gradient.dtype)
    divisor.divide_(gradient)
    assert not divisor.kept_tensors(), "the piecewise branch was meant"
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(network, reentrant):
    x = inputs()
    network(x).square().sum().backward()
    expected = network.bank.psi.grad.clone(), x.grad.clone()
    network.zero_grad()
    x.grad = None
    network(x, checkpointing=reentrant).square().sum().backward()
    torch.testing.assert_close((network.bank.psi.grad, x.grad), expected)


def test_accumulation_two_forwards_one_backward_and_a_retained_graph(network):
    a, b = inputs(), inputs()
    expected = network.psi_gradient(
        lambda psi: sum(network.by_definition(x.detach(), psi).square().sum() for x in (a, b))
    )
    (network(a).square().sum() + network(b).square().sum()).backward()
    torch.testing.assert_close(network.bank.psi.grad, expected)
    network.zero_grad()
    network(a).square().sum().backward()
    loss = network(b).square().sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(network.bank.psi.grad, expected)
    network.zero_grad()
    loss.backward(retain_graph=True)
    once = network.bank.psi.grad.clone()
    loss.backward()
    torch.testing.assert_close(network.bank.psi.grad, 2 * once)


def test_layers_outside_a_pass(network):
    x = inputs()
    layer = network.layers[0]
    layer(x).sum().backward()
    layer(x).sum().backward()
    once = network.bank.psi.grad.clone()
    network.zero_grad()
    (layer(x) + layer(x)).sum().backward()
    torch.testing.assert_close(network.bank.psi.grad, once)


def test_an_exception_in_mid_backward_leaves_nothing_behind(network):
    x = inputs()
    network(x).square().sum().backward()
    expected = network.bank.psi.grad.clone()
    network.zero_grad()

    class Interrupted(Exception):
        pass

    def interrupt(gradient):
        if armed:
            raise Interrupted

    armed = True
    h = torch.tanh(network.layers[0](x))
    network.bank.array.passes._open(network, ())
    h = torch.tanh(network.layers[0](x))
    h.register_hook(interrupt)
    for layer in network.layers[1:]:
        h = torch.tanh(layer(h))
    network.bank.array.passes._close(network, (), None)
    loss = h.square().sum()
    with pytest.raises(Interrupted):
        loss.backward(retain_graph=True)
    assert network.bank.psi.grad is None
    armed = False
    loss.backward()  # the same graph again
    torch.testing.assert_close(network.bank.psi.grad, expected)
    network.zero_grad()
    network(x).square().sum().backward()
    torch.testing.assert_close(network.bank.psi.grad, expected)


def test_an_exception_in_forward_closes_the_pass(network):
    with pytest.raises(RuntimeError):
        network(torch.zeros(2, 3, dtype=torch.float64))
    assert not is_open(network)
    network(inputs()).sum().backward()


def test_held_gradients_are_not_overwritten():
    network = Network()
    network(inputs()).sum().backward()
    held = network.bank.psi.grad
    before = held.clone()
    network.zero_grad()
    network(inputs()).sum().backward()
    torch.testing.assert_close(held, before)


def test_frozen_psi_and_frozen_input(network):
    network.bank.psi.requires_grad_(False)
    x = inputs()
    network(x).sum().backward()
    assert x.grad is not None
    assert network.bank.psi.grad is None
    network.bank.psi.requires_grad_(True)
    network(x.detach()).sum().backward()
    assert network.bank.psi.grad is not None


def test_no_grad_and_inference_mode_then_training(network):
    with torch.inference_mode():
        y = network(inputs().detach())
    with torch.no_grad():
        network(inputs())
    assert y.isfinite().all()
    network(inputs()).sum().backward()
    assert network.bank.psi.grad.isfinite().all()


def test_double_backward():
    for options in ({}, {"ratio": 0.004, "bias": False}, {"kind": "conv1d"}, {"kind": "convolution"}):
        torch.manual_seed(0)
        network = Network(grad_scaling="none", **options)
        x = inputs()
        network.bank.array.passes.unwatch()  # gradcheck compares psi's own gradients, so psi must be an argument
        psi = network.bank.psi.detach().clone().requires_grad_()

        def with_psi(x, psi, network=network):
            return torch.func.functional_call(network, {"bank.psi": psi}, (x,))

        (gx,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        gx.square().sum().backward()
        actual = network.bank.psi.grad
        (gx,) = torch.autograd.grad(network.by_definition(x, psi).square().sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(gx.square().sum(), psi)
        torch.testing.assert_close(actual, expected)


def test_functorch_takes_the_plain_path(network):
    network.bank.array.divisor.scaling = "none"
    parameters = dict(network.named_parameters())
    x = inputs().detach()

    def loss(parameters, x):
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters, x)
    network(x).square().sum().backward()
    torch.testing.assert_close(gradients["bank.psi"], network.bank.psi.grad)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(each["bank.psi"].sum(0), network.bank.psi.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_accumulates_in_float32(dtype):
    torch.manual_seed(0)
    network = Network(dtype=torch.float32)
    x = inputs(torch.float32)
    network(x).square().sum().backward()
    expected = network.bank.psi.grad.clone()
    network.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        y = network(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert network.bank.psi.grad.dtype == torch.float32
    assert (network.bank.psi.grad - expected).norm() < 0.02 * expected.norm()


def test_pure_bfloat16():
    torch.manual_seed(0)
    network = Network(dtype=torch.float32)
    low = copy.deepcopy(network).bfloat16()
    x = inputs(torch.float32)
    low(x.bfloat16()).float().square().sum().backward()
    network(x).square().sum().backward()
    assert low.bank.psi.grad.dtype == torch.bfloat16
    difference = (low.bank.psi.grad.float() - network.bank.psi.grad).norm()
    assert difference < 0.05 * network.bank.psi.grad.norm()


def test_autocast_casts_psi_once_a_pass(monkeypatch):
    network = Network(dtype=torch.float32)
    calls = []
    forward = Bank.forward
    monkeypatch.setattr(Bank, "forward", lambda self, *a: calls.append(a) or forward(self, *a))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(inputs(torch.float32)).float().sum().backward()
    assert len(calls) == 1
    calls.clear()
    network(inputs(torch.float32), checkpointing=False).sum().backward()
    assert len(calls) == 2  # the pass, and one for all recomputation


def test_deepcopy_and_pickle(network):
    x = inputs()
    network(x).sum().backward()
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert all(layer.bank is twin.bank for layer in twin.layers)
        torch.testing.assert_close(twin(x), network(x), rtol=0, atol=0)
        with torch.no_grad():
            twin.bank.psi.zero_()
        assert network.bank.psi.abs().sum() > 0
        twin.zero_grad()
        twin(x).sum().backward()
        assert twin.bank.psi.grad is not None


def test_concurrent_passes_in_threads(network):
    """Serving in no_grad beside training in another thread must not take each other's gates."""
    x = inputs()
    network(x).square().sum().backward()
    expected = network.bank.psi.grad.clone()
    stop, errors = threading.Event(), []

    def serve():
        while not stop.is_set():
            try:
                with torch.no_grad():
                    assert not network(x).requires_grad
            except Exception as error:
                errors.append(error)

    server = threading.Thread(target=serve)
    server.start()
    try:
        for _ in range(20):
            network.zero_grad()
            network(x).square().sum().backward()
            torch.testing.assert_close(network.bank.psi.grad, expected)
    finally:
        stop.set()
        server.join()
    assert not errors


def test_replaced_parameter_object_is_used(network):
    """Loaders and FSDP replace the parameter; nothing may keep the old one."""
    network(inputs())
    network.bank.psi = nn.Parameter(torch.zeros_like(network.bank.psi))
    x = inputs()
    layer = network.layers[0]
    y = layer(x).movedim(1 if isinstance(layer, RPSConv) else -1, -1)
    torch.testing.assert_close(y, torch.zeros_like(y) if layer.bias is None else layer.bias.expand_as(y))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_whole_graph(backend):
    for options in ({"ratio": 0.05}, {"mapping": "hash", "sign": "element"}, {"kind": "convolution"}):
        torch._dynamo.reset()
        torch.manual_seed(0)
        network = Network(dtype=torch.float32, **options)
        x = inputs(torch.float32)
        network(x).square().sum().backward()
        expected = network.bank.psi.grad.clone()
        network.zero_grad()
        compiled = torch.compile(network, backend=backend, fullgraph=True)
        compiled(x).square().sum().backward()
        torch.testing.assert_close(network.bank.psi.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_compiled_inference(made, bias):
    """Without gradients a compiler is given the products on views: no weight is made."""
    torch._dynamo.reset()
    network = read(Network(dtype=torch.float32, bias=bias, ratio=0.2), "made" if made else "views")
    x, graphs = inputs(torch.float32).detach(), []

    def backend(graph, examples):
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(torch.compile(network, backend=backend, fullgraph=True)(x), expected)
    assert ("linear" in graphs[0]) == made


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("ratio", [0.6, 0.3])
def test_a_single_token_is_shared_out(monkeypatch, threads, ratio):
    """With several threads every thread has its own part of a product with one token, and the rest is not lost."""
    monkeypatch.setattr(views, "_SHARE_OUT_FROM", 1)
    weight_map = WeightMap([Target("a", 40, 24, 0.1), Target("b", 25, 24, 0.1)], ratio=ratio)
    psi = torch.randn(weight_map.m)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for name in ("a", "b"):
            product, x = Views(weight_map.matrix(name)), torch.randn(1, 1, 24)
            found = product.linear(x, psi, None)
            torch.testing.assert_close(found, x @ definition.weight(psi, weight_map, name).t())
    finally:
        torch.set_num_threads(before)


def test_what_is_made():
    """A weight in many short runs is made for a product, one in few long ones is not, unless tokens are many."""
    weight_map = WeightMap([Target("a", 768, 768, 0.1), Target("b", 768, 768, 0.1)], ratio=0.9)
    many = WeightMap(weight_map.targets, ratio=0.01)
    x = torch.zeros(64, 768)
    few_runs, many_runs = products_of(weight_map.matrix("a")), products_of(many.matrix("a"))
    assert isinstance(choose(few_runs, x), Views)
    assert isinstance(choose(few_runs, x.expand(64, 64, 768)), Made)
    assert isinstance(choose(many_runs, x), Made)
    two_runs = products_of(weight_map.matrix("b"))
    assert isinstance(choose(two_runs, x), Views)
    assert isinstance(choose(two_runs, x.to("meta")), Made), "on any device but a CPU launches are dear"


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_export(kind):
    network = Network(kind, dtype=torch.float32).eval()
    x = inputs(torch.float32).detach()
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), network(x))
    assert [name for name in program.state_dict if name.endswith("psi")] == ["bank.psi"]


def test_dense_weight_and_to_dense(network):
    x = inputs()
    for layer in network.layers:
        dense = copy.deepcopy(layer).to_dense()
        assert type(dense) in (nn.Linear, Conv1D, nn.Conv1d)
        assert dense.weight.is_contiguous()
        assert dense.weight.shape == layer.weight.shape
        y = layer(x)
        torch.testing.assert_close(dense(x), y)
        x = torch.tanh(y)


def test_lazy_weight_reads_as_a_tensor(network):
    layer = network.layers[0]
    weight = layer.weight
    dense = layer.dense_weight()
    assert isinstance(weight, WeightStandIn)
    assert (weight.shape, weight.dtype, weight.device) == (dense.shape, dense.dtype, dense.device)
    assert weight.ndim == weight.dim() == dense.ndim
    assert weight.size(0) == dense.size(0)
    torch.testing.assert_close(torch.cat([weight, weight]), torch.cat([dense, dense]))
    torch.testing.assert_close(weight.mT @ weight, dense.mT @ dense)
    torch.testing.assert_close(weight[1:3] * 2, dense[1:3] * 2)
    (weight * 1).sum().backward()
    assert network.bank.psi.grad.abs().sum() > 0


def test_reference_equals_weight_by_definition():
    network = Network(ratio=0.004)
    layer, psi = network.layers[1], network.bank.psi
    weight = definition.weight(psi, network.bank.weight_map, layer.name)
    torch.testing.assert_close(layer.shared.matrix.weight(psi), weight)
    x = torch.randn(2, layer.in_features, dtype=torch.float64)
    torch.testing.assert_close(linear_by_definition(x, psi, layer.bias, layer.shared.matrix), layer(x))


def test_no_dense_tensor_is_made(monkeypatch):
    """Forward and backward of the fast path allocate nothing of the size of a weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    targets = [Target("a", 1536, 512, 0.1), Target("b", 512, 1536, 0.1)]
    bank = Bank(WeightMap(targets, ratio=0.1))
    nn.init.normal_(bank.psi)
    layers = [RPSLinear(t.name, bank, nn.Linear(t.in_features, t.out_features)) for t in targets]
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                sizes.append(result.untyped_storage().nbytes() // result.element_size())
            return result

    x = torch.randn(2, 512, requires_grad=True)
    with Watch():
        layers[1](torch.relu(layers[0](x))).sum().backward()
    assert bank.psi.grad is not None
    assert max(sizes) <= bank.weight_map.m < 1536 * 512


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="one process per GPU"):
        Network().layers[0]._replicate_for_data_parallel()


def test_a_pass_that_was_never_closed_does_not_outlive_the_next_call(network):
    """Compiled code may end a pass without its closing hook; the next call must not find that pass's gates."""
    network.bank.array.passes._open(network, ())
    network.layers[0](inputs())
    with torch.no_grad():
        network.bank.psi.mul_(2)
    x = inputs()
    torch.testing.assert_close(network(x), network.by_definition(x, network.bank.psi))
    assert not is_open(network)
