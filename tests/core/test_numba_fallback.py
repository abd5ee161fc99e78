"""Where Numba can't be had, or is not wanted, torch's operations take over; and kernels for other processors."""

import json
import logging
import os
import subprocess
import sys

import paths
import pytest
import torch

from hf_rps.mappings.base import Span
from hf_rps.mappings.codebook import CodebookMatrix
from hf_rps.mappings.codes import pack
from hf_rps.products.base import Made, choose, products_of
from hf_rps.products.numba import loading

SCRIPT = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from hf_rps.products.numba.loading import loaded
if {check}:
    from test_numba import check, matrix_of
    for bits in (2, 3, 4, 8):
        check(matrix_of(9, 100, bits, 24), 5, True)
vectors = loaded() and loaded()._HAS_AVX512 + loaded()._HAS_VECTORS
print(json.dumps([loaded() is not None, "numba" in sys.modules, vectors]))
"""


@pytest.fixture
def fresh():
    loading.loaded.cache_clear()
    yield
    loading.loaded.cache_clear()


def run(check: bool = False, **variables: str) -> list:
    """Whether the kernels are there, whether Numba was imported, and how wide vectors are (0, 1, 2)."""
    script = SCRIPT.format(tests=os.path.dirname(__file__), check=check)
    done = subprocess.run(
        [sys.executable, "-c", script], env=paths.environment() | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_falls_back(caplog, warnings: int) -> None:
    matrix = CodebookMatrix(Span(0, 6, 20), 4, 20, 0)
    matrix.keep_in({"codes": pack(torch.randint(0, 16, (6, 20), dtype=torch.uint8), 4)}, {"codes": "codes"})
    psi, x = torch.randn(matrix.size), torch.randn(2, 20)
    with caplog.at_level(logging.WARNING, "hf_rps"):
        for _ in range(2):
            product = choose(products_of(matrix), x)
            assert isinstance(product, Made)
            torch.testing.assert_close(product.linear(x, psi, None), x @ matrix.weight(psi).t())
            into = torch.zeros_like(psi)
            product.gradients(torch.ones(2, 6), x, psi, needs_x=True, into=into)
            torch.testing.assert_close(matrix.books(into).sum(1), x.sum().expand(6))
    assert len(caplog.records) == warnings


@pytest.mark.usefixtures("fresh")
def test_without_numba_torch_takes_over(caplog, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    check_falls_back(caplog, warnings=0)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_a_broken_numba_is_reported_once(caplog, monkeypatch, error):
    def import_module(name):
        raise error(f"no {name}")

    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    monkeypatch.setattr(loading.importlib, "import_module", import_module)
    check_falls_back(caplog, warnings=1)
    assert loading.DISABLE in caplog.records[0].message


@pytest.mark.usefixtures("fresh")
def test_the_environment_disables_it(caplog, monkeypatch):
    monkeypatch.setenv(loading.DISABLE, "1")
    check_falls_back(caplog, warnings=0)


def test_disabled_it_is_not_imported():
    assert run(**{loading.DISABLE: "1"}) == [False, False, None]


def test_kernels_without_vectors(tmp_path):
    """As on a processor that has none, and with a cache of their own."""
    pytest.importorskip("numba")
    assert run(check=True, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))[2] == 0
    assert any(tmp_path.rglob("*.nbc"))


def test_kernels_of_narrow_vectors(tmp_path):
    pytest.importorskip("numba")
    import llvmlite.binding

    if not llvmlite.binding.get_host_cpu_features().get("avx2"):
        pytest.skip("this processor has none")
    found = run(check=True, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx2,+fma", NUMBA_CACHE_DIR=str(tmp_path))
    assert found[2] == 1


def test_without_a_folder_for_the_cache(tmp_path):
    """What can't be kept is compiled for the process."""
    pytest.importorskip("numba")
    (tmp_path / "file").touch()
    assert run(NUMBA_CACHE_DIR=str(tmp_path / "file"))[0]
