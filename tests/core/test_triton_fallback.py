"""Where Triton can't be had, or is not wanted, torch's products take over; and where it is chosen."""

import logging
import sys

import pytest
import torch
from triton_cases import DEVICE, distance, layer_of, of_the_definition, triton_runs

from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products.base import Made, choose, products_of
from hf_rps.products.triton import launch
from hf_rps.products.triton.product import TritonProduct

pytestmark = pytest.mark.usefixtures("fresh")


def fails(*args, **kwargs):
    raise RuntimeError("no compiler here")


def check_falls_back(weight_map, caplog, warnings):
    layer = layer_of(weight_map)
    with caplog.at_level(logging.WARNING, "hf_rps"):
        for tokens in (1, 3, 20):
            x = torch.randn(tokens, layer.in_features, device=DEVICE, requires_grad=True)
            y = layer(x)
            (y.square().sum() / 2).backward()
            expected = of_the_definition(layer, x, weight_map)
            for one, other in zip([y, x.grad, layer.bank.psi.grad, layer.bias.grad], expected, strict=True):
                assert distance(one, other) < 1e-4
            layer.zero_grad()
            layer.bank.zero_grad()
        assert isinstance(choose([TritonProduct(weight_map.matrix("it")), Made(weight_map.matrix("it"))], x), Made)
    assert len(caplog.records) == warnings


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_without_triton_torch_takes_over(weight_map, caplog, monkeypatch, error):
    def import_module(name):
        raise error(f"no {name}")

    monkeypatch.setattr(launch.importlib, "import_module", import_module)
    check_falls_back(weight_map, caplog, warnings=1)


def test_without_the_package_the_import_fails(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "hf_rps.products.triton.kernels", raising=False)
    with caplog.at_level(logging.WARNING, "hf_rps"):
        assert launch.loaded() is None
        assert launch.loaded() is None
    assert len(caplog.records) == 1
    assert launch.DISABLE in caplog.records[0].message


@triton_runs
def test_where_a_kernel_fails_torch_takes_over(weight_map, caplog, monkeypatch):
    monkeypatch.setattr(launch.Launcher, "_launch", fails)
    check_falls_back(weight_map, caplog, warnings=1)


def test_the_environment_disables_it(weight_map, caplog, monkeypatch):
    monkeypatch.setenv(launch.DISABLE, "1")
    check_falls_back(weight_map, caplog, warnings=0)


def test_which_matrices_have_it():
    targets = [Target("a", 40, 16, 0.1), Target("b", 4, 400, 0.1)]
    folded = WeightMap(targets, ratio=0.1)
    assert isinstance(products_of(folded.matrix("a"))[0], TritonProduct)
    assert not TritonProduct.accepts(folded.matrix("b")), "a row longer than the array"
    assert not TritonProduct.accepts(WeightMap(targets, ratio=0.1, mapping="hash").matrix("a"))
    assert not TritonProduct.accepts(WeightMap(targets, ratio=0.1, sign="element").matrix("a"))
    huge = WeightMap([Target("a", 50_000, 50_000, 0.1)], ratio=0.001)
    assert not TritonProduct.accepts(huge.matrix("a")), "offsets beyond int32"


def test_a_cpu_does_not_choose_it():
    matrix = WeightMap([Target("a", 40, 16, 0.1)], ratio=0.1).matrix("a")
    assert not isinstance(choose(products_of(matrix), torch.randn(3, 16)), TritonProduct)
