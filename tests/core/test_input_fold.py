"""Folded inputs: the definition weight by weight, and everything that is faster or smaller against it."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_rps import RPSConfig, get_rps_model, size_report, to_dense
from hf_rps.config import most_input_fold
from hf_rps.conversion import find_bank
from hf_rps.mappings import definition
from hf_rps.mappings.base import Target
from hf_rps.mappings.input_fold import InputFold, mixing_factors
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products.base import products_of
from hf_rps.products.input_fold import Folded
from hf_rps.psi.divisor import Divisor, load

TARGETS = [Target("a.q", 40, 24, 0.1), Target("a.k", 7, 33, 0.2), Target("b", 3, 50, 0.3), Target("c", 16, 54, 0.1, 9)]

GOLDEN_SIGNS = {"a.q": [1, 1, -1, 1, 1, 1, 1, 1, -1, 1, 1, 1], "b": [-1, 1, -1, 1, 1, -1, -1, -1, -1, -1, -1, 1]}
GOLDEN_FINGERPRINT = "6d129af588233fe890fb22cf9701b430"


@st.composite
def maps(draw):
    """Maps of odd sizes: widths that the fold does not divide, fewer rows than blocks, fewer inputs than the fold."""
    sizes = st.integers(1, 40)
    targets = []
    for i in range(draw(st.integers(1, 3))):
        positions = draw(st.sampled_from([1, 1, 4]))
        targets.append(Target(f"m{i}.w", draw(sizes), draw(sizes) * positions, 0.1 * (i + 1), positions))
    fold = draw(st.integers(1, 12))
    return WeightMap(
        targets,
        ratio=draw(st.floats(0.02, 1.0)) / fold,
        seed=draw(st.integers(0, 3)),
        mapping=draw(st.sampled_from(["fold", "fold", "roast", "hash"])),
        sign=draw(st.sampled_from(["row", "element", "none"])),
        sharing=draw(st.sampled_from(["global", "module"])),
        input_fold=fold,
    )


@settings(max_examples=120, deadline=None)
@given(maps(), st.integers(0, 2**16))
def test_all_that_a_matrix_does_is_its_definition(weight_map, seed):
    generator = torch.Generator().manual_seed(seed)
    psi = torch.randn(weight_map.m, dtype=torch.float64, generator=generator)
    total = torch.zeros_like(psi)
    for target in weight_map.targets:
        matrix = weight_map.matrix(target.name)
        leaf = psi.clone().requires_grad_()
        weight = definition.weight(leaf, weight_map, target.name)
        assert weight.shape == (target.out_features, target.in_features) == (matrix.rows, matrix.cols)
        torch.testing.assert_close(matrix.weight(psi), weight)
        torch.testing.assert_close(matrix.make(psi), weight)
        base = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
        torch.testing.assert_close(matrix.make(psi, base), base + weight)
        matrix.add_load(total)
        x = torch.randn(3, target.in_features, dtype=torch.float64, generator=generator, requires_grad=True)
        gy = torch.randn(3, target.out_features, dtype=torch.float64, generator=generator)
        y = x @ weight.t()
        torch.testing.assert_close(matrix.linear(x, psi), y)
        gx, gpsi = torch.autograd.grad(y, (x, leaf), gy)
        into = torch.zeros_like(psi)
        matrix.add_adjoint(into, gy.t() @ x.detach())
        torch.testing.assert_close(into, gpsi)
        for product in products_of(matrix):
            fold, read = product.input_fold, x.detach()
            read = read if fold is None else fold.fold(read)
            torch.testing.assert_close(product.linear(read, psi, None), y.detach())
            torch.testing.assert_close(product.by_definition(read, psi), y.detach())
            into = torch.zeros_like(psi)
            found = product.gradients(gy, read, psi, True, into)
            torch.testing.assert_close(found if fold is None else fold.unfold(found), gx)
            torch.testing.assert_close(into, gpsi)
    torch.testing.assert_close(total, torch.from_numpy(definition.gamma(weight_map)))
    divisor = Divisor([weight_map.matrix(t.name) for t in weight_map.targets], weight_map.m, "projection")
    expected = torch.where(total == 0, 1.0, total)
    torch.testing.assert_close(torch.where(total == 0, 1.0, divisor.tensor(psi.device, psi.dtype)), expected)


def test_the_definition_written_out():
    """W[r, c] = mix[block of r, tile of c] * sign * Z[r, place of c], for one small map."""
    weight_map = WeightMap([Target("w", 4, 6, 1.0)], ratio=0.5, input_fold=2, sign="none", init_std=1.0)
    fold, matrix = weight_map.fold_of("w"), weight_map.matrix("w")
    assert (fold.c, fold.width, matrix.blocks, matrix.block_rows) == (2, 3, 2, 2)
    psi = torch.arange(1.0, 13.0)
    z = psi[torch.from_numpy(weight_map.slots("w"))]
    weight = definition.weight(psi, weight_map, "w")
    for r in range(4):
        for c in range(6):
            mix = [[1, 1], [1, -1]][r // 2][c // 3]
            assert weight[r, c] == mix * fold.signs[c // 3, c % 3] * z[r, c % 3]


@pytest.mark.parametrize(
    ("c", "sizes"), [(1, [1]), (3, [3]), (10, [10]), (16, [16]), (17, [17]), (32, [4, 8]), (50, [5, 10]), (99, [9, 11])]
)
def test_mixing_is_orthogonal(c, sizes):
    """One small matrix, or two that cost less."""
    factors = mixing_factors(c)
    assert [len(factor) for factor in factors] == sizes
    fold = InputFold(3 * c, 1, c, key=7)
    np.testing.assert_allclose(fold.mix @ fold.mix.T, c * np.eye(c), atol=1e-10)
    assert fold.multiplications == 3 * c * sum(sizes)
    x = torch.randn(2, 3 * c, dtype=torch.float64)
    expected = torch.einsum("jtb,ntb->njb", torch.from_numpy(fold.coefficients), x.view(2, c, 3))
    torch.testing.assert_close(fold.fold(x), expected)
    torch.testing.assert_close(fold.fold_unfollowed(x), expected)
    torch.testing.assert_close(fold.fold_channels(x[..., None, None]).flatten(1), expected.flatten(1))


def test_widths_that_the_fold_does_not_divide():
    fold, x = InputFold(9, 2, 4, key=7), torch.randn(2, 3, 18, dtype=torch.float64)
    torch.testing.assert_close(fold.fold_unfollowed(x), fold.fold(x), rtol=0, atol=0)
    y = torch.randn_like(fold.fold(x))
    torch.testing.assert_close((fold.unfold(y) * x).sum(), (fold.fold(x) * y).sum())


def test_gradients_of_the_second_order():
    torch.manual_seed(0)
    model = get_rps_model(_Line(), RPSConfig(ratio=0.25, input_fold=4, grad_scaling="none"))
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: model(x).tanh(), (x,))


def test_two_factors_of_hadamards_matrix_are_hadamards():
    np.testing.assert_array_equal(np.kron(*mixing_factors(32)), np.kron(mixing_factors(16)[0], mixing_factors(2)[0]))


def test_folding_keeps_lengths():
    fold = InputFold(40, 1, 5, key=7)
    x = torch.randn(6, 40, dtype=torch.float64)
    torch.testing.assert_close(fold.fold(x).square().sum((1, 2)), 5 * x.square().sum(1))
    torch.testing.assert_close(fold.unfold(fold.fold(x)), 5 * x)


def test_golden_integers():
    """What is hashed is part of the checkpoint format."""
    weight_map = WeightMap(TARGETS, ratio=0.1, seed=3, input_fold=4)
    signs = {name: weight_map.fold_of(name).signs.ravel()[:12].tolist() for name in ("a.q", "b")}
    assert signs == GOLDEN_SIGNS
    assert weight_map.fingerprint == GOLDEN_FINGERPRINT
    assert weight_map.fold_of("a.q").signs.ravel()[:8].tolist() == weight_map.fold_of("a.k").signs.ravel()[:8].tolist()


def test_without_folds_the_map_is_what_it_was():
    assert WeightMap(TARGETS, ratio=0.1).fingerprint == WeightMap(TARGETS, ratio=0.1, input_fold=1).fingerprint
    assert isinstance(str(TARGETS[3]), str)
    assert Target.parse(str(TARGETS[3])) == TARGETS[3]


def test_full_rank():
    """One fold for all outputs would leave rank K / c."""
    weight_map = WeightMap([Target("w", 64, 64, 1.0)], ratio=0.25, input_fold=4)
    weight = definition.weight(torch.randn(weight_map.m, dtype=torch.float64), weight_map, "w")
    assert torch.linalg.matrix_rank(weight) == 64


@pytest.mark.parametrize(("ratio", "most"), [(1, 1), (0.5, 2), (0.3, 3), (0.1, 10), (0.02, 50), (1 / 3, 3)])
def test_how_far_inputs_can_be_folded(ratio, most):
    assert most_input_fold(ratio) == most
    RPSConfig(ratio=ratio, input_fold=most)
    with pytest.raises(ValueError, match=rf"input_fold={most + 1} leaves.*at most {most}"):
        RPSConfig(ratio=ratio, input_fold=most + 1)


def test_a_fold_that_divides_the_channels_is_taken_and_keeps_no_array():
    """10 is asked for; 8 divides, keeps Gamma constant, and splits rows evenly."""
    weight_map = RPSConfig(ratio=0.1, input_fold="full").weight_map([Target("w", 1024, 768, 0.1)])
    assert weight_map.fold_of("w").c == 8
    assert weight_map.m == pytest.approx(0.1 * 1024 * 768, rel=0.01)  # the numbers are what was asked for
    divisor = Divisor([weight_map.matrix("w")], weight_map.m, "projection")
    divisor.divide_(torch.ones(weight_map.m))
    assert divisor.kept_tensors() == []


@pytest.mark.parametrize("value", [0, -1, 2.0, "most", None, True])
def test_bad_values(value):
    with pytest.raises(ValueError, match="input_fold"):
        RPSConfig(ratio=0.1, input_fold=value)


class Net(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(12, 21, 3, padding=1, padding_mode="reflect", groups=3 if groups > 1 else 1)
        self.line = nn.Conv1d(21, 10, 2, bias=False)
        self.linear = nn.Linear(10, 6)

    def forward(self, x):
        x = self.conv(x).relu().flatten(2).mean(2, keepdim=True).expand(-1, -1, 3)
        return self.linear(self.line(x).relu().mean(2))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("config", [{"ratio": 0.25, "input_fold": 4}, {"ratio": 0.1, "input_fold": 3}])
def test_networks_compute_and_learn_as_their_dense_form(config, groups):
    torch.manual_seed(0)
    config = RPSConfig(target_modules=["conv", "line", "linear"], **config)
    model = get_rps_model(Net(groups).double(), config)
    x, target = torch.randn(3, 12, 5, 5, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    dense = to_dense(copy.deepcopy(model))
    torch.testing.assert_close(model(x), dense(x))
    torch.testing.assert_close(model.conv(x[0]), dense.conv(x[0]))  # without a batch
    for network in (model, dense):
        (network(x) - target).square().sum().backward()
    bank = find_bank(model)
    expected, names = torch.zeros_like(bank.psi), {"conv": dense.conv, "line": dense.line, "linear": dense.linear}
    for name, layer in names.items():
        leaf = bank.psi.detach().clone().requires_grad_()
        weight = definition.weight(leaf, bank.weight_map, name)
        expected += torch.autograd.grad(weight, leaf, layer.weight.grad.flatten(1))[0]
    gamma = load([bank.weight_map.matrix(name) for name in names], bank.weight_map.m).clamp(min=1e-30)
    torch.testing.assert_close(bank.psi.grad, expected / gamma)
    torch.testing.assert_close(model.conv.bias.grad, dense.conv.bias.grad)


def test_an_sgd_step_is_the_projection_of_the_dense_one():
    torch.manual_seed(0)
    model = get_rps_model(_Line(), RPSConfig(ratio=0.25, input_fold=4))
    dense, x = to_dense(copy.deepcopy(model)), torch.randn(5, 24, dtype=torch.float64)
    for network in (model, dense):
        network(x).square().sum().backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.01 * parameter.grad
    weight_map = find_bank(model).weight_map
    identity = torch.eye(weight_map.m, dtype=torch.float64)
    columns = torch.stack([definition.weight(row, weight_map, "line").flatten() for row in identity], 1)
    wanted = columns @ torch.linalg.lstsq(columns, dense.line.weight.detach().flatten()[:, None]).solution
    torch.testing.assert_close(model.line.dense_weight().detach().flatten(), wanted[:, 0])


class _Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(24, 20, dtype=torch.float64)

    def forward(self, x):
        return self.line(x)


@pytest.mark.parametrize("how", ["project", "rescale"])
def test_where_the_array_starts(how):
    """Least squares for a trained weight; each weight's own size for a random one."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"inner": nn.Linear(96, 120)})
    net = _Wrapped(model)
    weight = net.inner.weight.detach().clone()
    get_rps_model(net, RPSConfig(ratio=0.25, input_fold=4, init_weights=how))
    made = net.inner.dense_weight().detach()
    if how == "project":
        close = ((made - weight).square().sum() / weight.square().sum()).item()
        assert close == pytest.approx(0.75, abs=0.02)
        assert (made * (weight - made)).sum().abs() < 1e-3 * weight.square().sum()  # orthogonal
    else:
        assert made.std().item() == pytest.approx(weight.std().item(), rel=0.05)


class _Wrapped(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.inner = parts["inner"]

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(1,), (2, 3), ()])
def test_dtypes_and_shapes(dtype, tokens):
    torch.manual_seed(0)
    model = get_rps_model(_Wrapped({"inner": nn.Linear(48, 40)}), RPSConfig(ratio=0.2, input_fold=5)).to(dtype)
    x = torch.randn(*tokens, 48, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype and y.shape == (*tokens, 40)  # noqa: PT018
    torch.testing.assert_close(y.float(), to_dense(copy.deepcopy(model)).float()(x.float()), rtol=0.05, atol=0.02)
    y += 1  # what a layer gives back may be written to
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(x.float()).dtype == torch.bfloat16


class Siblings(nn.Module):
    """Layers that read the same input, and one that changes it between two of them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, rows, bias=False) for rows in (24, 16, 8))
        self.write = False

    def forward(self, x):
        q = self.q(x)
        if self.write:
            x += 1
        return torch.cat([q, self.k(x), self.v(x)], -1)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = Siblings(), nn.Linear(24, 24)

    def forward(self, x):
        return self.inner(self.head(x))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_one_input_is_folded_once(mode, monkeypatch):
    torch.manual_seed(0)
    model = get_rps_model(Outer().double(), RPSConfig(ratio=0.25, input_fold=4, target_modules=["q", "k", "v"]))
    dense, x = to_dense(copy.deepcopy(model)), torch.randn(3, 24, dtype=torch.float64)
    folds, fold = [], InputFold.fold
    monkeypatch.setattr(InputFold, "fold_unfollowed", lambda self, x: folds.append(1) or fold(self, x))
    for write in (False, True, False):
        model.inner.write = dense.inner.write = write
        folds.clear()
        with mode():
            torch.testing.assert_close(model(x), dense(x))
        # an inference tensor does not tell whether it was written to
        assert len(folds) == (3 if mode is torch.inference_mode else 2 if write else 1)
    for network in (model, dense):
        network(x).square().sum().backward()
    torch.testing.assert_close(model.head.weight.grad, dense.head.weight.grad)
    folds.clear()
    torch.testing.assert_close(model.inner.q(x) + 0, dense.inner.q(x))  # outside of a pass nothing is kept
    torch.testing.assert_close(model.inner.k(x) + 0, dense.inner.k(x))
    assert len(folds) == 2


def test_a_folded_input_is_not_kept_for_another_mode():
    """First without gradients, then with, in one pass; with autocast, then without."""
    torch.manual_seed(0)
    model = get_rps_model(Outer(), RPSConfig(ratio=0.25, input_fold=4, target_modules=["q", "k", "v"]))
    dense, x = to_dense(copy.deepcopy(model)), torch.randn(3, 24, requires_grad=True)

    def forward(inner, x):
        with torch.inference_mode():
            inner.q(x)
        with torch.no_grad():
            inner.q(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inner.k(x)
        return inner.q(x) + inner.k(x).sum(-1, keepdim=True)

    gradients = []
    for network in (model, dense):
        network.forward = lambda x, network=network: forward(network.inner, x)
        y = network(x)
        gradients.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    torch.testing.assert_close(*gradients)


def test_a_checkpointed_block_folds_its_input_again():
    torch.manual_seed(0)
    model = get_rps_model(Outer().double(), RPSConfig(ratio=0.25, input_fold=4, target_modules=["q", "k", "v"]))
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    model.forward = lambda x: torch.utils.checkpoint.checkpoint(model.inner, model.head(x), use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x)[0], expected)


def test_which_product():
    matrix = WeightMap([Target("w", 64, 64, 0.1)], ratio=0.25, input_fold=4).matrix("w")
    assert type(products_of(matrix)[0]) is Folded
    assert matrix.multiplications == 64 * 16 + 4 * 64


def test_compiled_in_one_graph_and_trained():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = get_rps_model(_Wrapped({"inner": nn.Linear(48, 40)}), RPSConfig(ratio=0.1, input_fold="full"))
    x = torch.randn(4, 48)
    model(x).square().sum().backward()
    expected, model.inner.bank.psi.grad = model.inner.bank.psi.grad, None
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    torch.testing.assert_close(model.inner.bank.psi.grad, expected)


def test_torch_func():
    torch.manual_seed(0)
    model = get_rps_model(_Wrapped({"inner": nn.Linear(48, 40)}), RPSConfig(ratio=0.1, input_fold=5))
    x, parameters = torch.randn(4, 48), dict(model.named_parameters())
    model(x).square().sum().backward()
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    torch.testing.assert_close(gradients, {name: p.grad for name, p in parameters.items()})


def test_the_report_counts_multiplications():
    model = get_rps_model(_Wrapped({"inner": nn.Linear(100, 80)}), RPSConfig(ratio=0.1, input_fold=10))
    report = size_report(model)
    assert (report.dense_multiplications, report.multiplications) == (8000, 800 + 1000)
    assert "multiplications" in str(report)
