"""One check of everything that conversion promises, on tiny models of many architectures (``tiny_models.CASES``).

The last test prints the table of architectures: ``pytest tests/core/test_architectures.py -k table``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conversion_checks import (
    agrees_with_plain_reference,
    exact_at_ratio_one,
    plain_transformers_refuses,
    saves_and_loads,
)
from model_outputs import outputs
from tiny_models import CASES, TinyCase
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_rps import RPSConfig, get_rps_model, size_report
from hf_rps.conversion import find_bank
from hf_rps.names import base_prefix

RATIO = 0.2
ROWS: dict[str, str] = {}  # lines of the table, by architecture


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_architecture(case: TinyCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Convert, train, densify, save and load one architecture."""
    dense, batch = case.build(), case.batch()
    reference = outputs(dense, batch)
    exact_at_ratio_one(dense, batch, reference)
    dense_numbers = count(dense.parameters())

    model = get_rps_model(dense, RPSConfig(ratio=RATIO))
    ROWS[case.name] = row(case, model)
    only_heads_stay_dense(case, model)
    weight_map = find_bank(model).weight_map
    assert abs(weight_map.m - RATIO * weight_map.n) <= 8
    assert count(model.parameters()) == dense_numbers - weight_map.n + weight_map.m
    assert dense_numbers == size_report(model).dense_parameters
    changed = outputs(model, batch)
    assert max((changed[key] - value).norm() / value.norm() for key, value in reference.items()) > 0.01, (
        "outputs hardly changed, so this case would not notice a wrong weight"
    )
    agrees_with_plain_reference(model, batch)
    saves_and_loads(case, model, batch, tmp_path)
    plain_transformers_refuses(case, tmp_path, monkeypatch)


def only_heads_stay_dense(case: TinyCase, model: nn.Module) -> None:
    """Every linear layer is shared but the ones that the case names (heads, tied weights), and those are all there."""
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    assert [n for n in linear if not any(re.fullmatch(p, n) for p in case.dense)] == [], "left dense unexpectedly"
    assert [p for p in case.dense if not any(re.fullmatch(p, n) for n in linear)] == [], "expected to stay dense"


def test_table(capsys: pytest.CaptureFixture):
    """Print the table; rows that did not run in this process are made now."""
    text = table()
    assert text.count("\n") > len(CASES)
    with capsys.disabled():
        print(f"\n{text}")


# ---- the table


def row(case: TinyCase, model: nn.Module) -> str:
    """Architecture, n, m, targets and the weight matrices that stay dense, of one compressed model."""
    weight_map, left = find_bank(model).weight_map, {}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            short = re.sub(r"\.\d+(?=\.)", ".*", name).removeprefix(base_prefix(model)).removesuffix(".weight")
            left[short] = left.get(short, 0) + 1
    names = ", ".join(f"{name} ({times})" if times > 1 else name for name, times in left.items())
    return f"{case.name:<24}{weight_map.n:>8}{weight_map.m:>7}{len(weight_map.targets):>9}  {names}"


def table() -> str:
    """One line an architecture."""
    for case in CASES:
        if case.name not in ROWS:
            ROWS[case.name] = row(case, get_rps_model(case.build(), RPSConfig(ratio=RATIO)))
    lines = [ROWS[case.name] for case in CASES]
    head = f"{'architecture':<24}{'n':>8}{'m':>7}{'targets':>9}  left dense (matrices; how many of one name)"
    return "\n".join([head, "-" * 100, *lines, f"{len(CASES)} architectures"])


# ---- helpers


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)
