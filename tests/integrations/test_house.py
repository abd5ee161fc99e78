"""The rooms of the house: a mapping, a kind of layer and a product from outside the library, each in one place.

What is written here is all that each of them takes. They are trained, saved, and reloaded in a new process.
"""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from paths import ROOT, environment
from toys import Additive, Net, NetConfig, Threefold, register
from ways import arrays_of

from hf_rps import RPSConfig, get_rps_model, size_report, to_dense
from hf_rps.conversion import find_bank
from hf_rps.layers import kinds
from hf_rps.mappings.base import SharedMatrix
from hf_rps.mappings.table import MAPPINGS
from hf_rps.products import base as products


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """In the tables for one test."""
    monkeypatch.setattr(kinds, "KINDS", [*kinds.KINDS])
    monkeypatch.setattr(products, "PRODUCTS", [*products.PRODUCTS])
    before = dict(MAPPINGS)
    register()
    yield
    MAPPINGS.clear()
    MAPPINGS.update(before)


X = torch.linspace(-1, 1, 4 * 12).view(4, 12)


def compressed(**options):
    torch.manual_seed(0)
    return get_rps_model(Net(NetConfig()), RPSConfig(ratio=0.5, **options))


def train(model, steps=40):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = (model(X) - X.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_imports_point_one_way():
    """The contracts of pyproject.toml."""
    found = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as command; command()", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout


def test_a_mapping_from_outside(tmp_path):
    """W = scale * sign * (one number per row + one per column): two slots per weight, and a size of its own."""
    model = compressed(mapping="additive", grad_scaling="projection")
    weight_map = find_bank(model).weight_map
    assert weight_map.m == sum(t.out_features + t.in_features for t in weight_map.targets) == size_report(model).m
    matrix, psi = weight_map.matrix("inner"), find_bank(model).psi
    weight = matrix.weight(psi)
    assert torch.linalg.matrix_rank(weight * matrix.factor) <= 2
    dense = to_dense(compressed(mapping="additive"))
    expected = torch.autograd.grad(dense(X).square().sum(), dense.inner.weight)[0]
    (adjoint,) = torch.autograd.grad(weight, psi, expected)
    into = torch.zeros_like(psi)
    SharedMatrix.add_adjoint(matrix, into, expected)
    torch.testing.assert_close(into, adjoint)
    losses = train(model)
    assert losses[-1] < 0.7 * losses[0]
    reloads(model, tmp_path)


def test_a_kind_of_layer_from_outside(tmp_path):
    """A layer that computes x K, with a parameter that is not called weight."""
    model = compressed()
    assert type(model.gate).__name__ == "RPSGate"
    assert "gate.kernel" in find_bank(model).weight_map.index
    assert [name for name, _ in model.named_parameters()].count("gate.kernel") == 0
    torch.testing.assert_close(model.gate(X), X @ model.gate.dense_weight())
    losses = train(model)
    assert losses[-1] < 0.7 * losses[0]
    reloads(model, tmp_path)
    before = model(X)
    dense = to_dense(model)
    assert type(dense.gate).__name__ == "Gate"
    torch.testing.assert_close(dense(X), before)


def test_a_product_from_outside(tmp_path):
    """A product for three tokens only."""
    model = compressed()
    reference = compressed()
    for array in arrays_of(reference):
        array.choose = products.always(products.Made)
    Threefold.calls = 0
    model(X)
    assert Threefold.calls == 0
    x = X[:3].requires_grad_()
    y = model(x)
    assert Threefold.calls == 3, "of the three layers, forward"
    torch.testing.assert_close(y, reference(x))
    y.square().sum().backward()
    assert Threefold.calls == 6
    reference(x).square().sum().backward()
    torch.testing.assert_close(find_bank(model).psi.grad, find_bank(reference).psi.grad)
    reloads(model, tmp_path)


def reloads(model, folder):
    """Bit for bit, in a process that knows the toys, and not in one that does not."""
    model.save_pretrained(folder)
    torch.save(model(X), folder / "y.pt")
    code = f"""
        import torch
        import toys
        toys.register()
        x = torch.linspace(-1, 1, 4 * 12).view(4, 12)
        torch.set_num_threads(1)
        assert torch.equal(toys.Net.from_pretrained({str(folder)!r})(x), torch.load({str(folder / "y.pt")!r}))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment(HF_HUB_OFFLINE="1"))


def test_one_row_each():
    """The library's own rooms and the toys stand in the same tables."""
    assert MAPPINGS["additive"] is Additive
    assert Threefold in products.PRODUCTS
    assert kinds.kind_of(Net(NetConfig()).gate).noun == "gates"
    with pytest.raises(ValueError, match=r"mapping='other' is not valid; expected one of .*'additive'"):
        RPSConfig(mapping="other")


@pytest.mark.parametrize("mapping", ["fold", "additive"])
def test_the_toys_agree_with_plain_layers(mapping):
    model = compressed(mapping=mapping)
    weights = {name: model.get_submodule(name).dense_weight() for name in ("inner", "outer", "gate")}
    hidden = torch.tanh(F.linear(X, weights["inner"], model.inner.bias))
    hidden = hidden * torch.sigmoid(X @ weights["gate"])
    torch.testing.assert_close(model(X), F.linear(hidden, weights["outer"], model.outer.bias))
