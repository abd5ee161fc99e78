"""One check of everything that conversion promises, on tiny models of many architectures (``tiny_models.CASES``).

``python tests/test_architectures.py`` prints the table of architectures; so does the last test.
"""

from __future__ import annotations

import copy
import json
import re
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CASES, TinyCase
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_rps import RPSConfig, get_rps_model, size_report, to_dense
from hf_rps.convert import find_bank
from hf_rps.layers import RPSLayer, RPSLinear
from hf_rps.targets import base_prefix

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


def exact_at_ratio_one(dense: nn.Module, batch: dict, reference: dict[str, Tensor]) -> None:
    """At ratio 1 the compressed model is the dense one, to float rounding, and :func:`to_dense` gives that back.

    The weights that come back carry the rounding of scale and its inverse; names, shapes, ties and modules are exact.
    """
    kinds = [type(module) for module in dense.modules()]
    tied, state = tied_names(dense), clone(dense.state_dict())
    model = get_rps_model(dense, RPSConfig(ratio=1))
    close(outputs(model, batch), reference, "ratio 1")
    to_dense(model)
    assert [type(module) for module in model.modules()] == kinds
    assert tied_names(model) == tied
    close(model.state_dict(), state, "weights of to_dense at ratio 1")
    assert list(model.state_dict()) == list(state)
    close(outputs(model, batch), reference, "to_dense at ratio 1")
    model.load_state_dict(state)


def only_heads_stay_dense(case: TinyCase, model: nn.Module) -> None:
    """Every linear layer is shared but the ones that the case names (heads, tied weights), and those are all there."""
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    assert [n for n in linear if not any(re.fullmatch(p, n) for p in case.dense)] == [], "left dense unexpectedly"
    assert [p for p in case.dense if not any(re.fullmatch(p, n) for n in linear)] == [], "expected to stay dense"


def agrees_with_plain_reference(model: nn.Module, batch: dict) -> None:
    """Outputs, psi's gradient and all other gradients equal those of the densified copy, trained the ordinary way.

    The gradient of psi that is expected is computed by definition, slot by slot, from the copy's dense gradients.
    """
    bank = find_bank(model)
    copied = to_dense(copy.deepcopy(model))
    assert find_bank(copied) is None
    assert find_bank(model) is bank
    expected = backward(copied, batch)
    close(backward(model, batch), expected, f"ratio {RATIO}")

    gradient = torch.zeros(bank.weight_map.m, dtype=torch.float64)
    for name, layer in layers(model).items():
        dense_gradient = copied.get_submodule(name).weight.grad
        if dense_gradient is not None:
            is_transposed = isinstance(layer, RPSLinear) and layer.transposed
            dense_gradient = dense_gradient.t() if is_transposed else dense_gradient.flatten(1)
            factor = torch.from_numpy(bank.weight_map.signs(layer.name)) * bank.weight_map.scale(layer.name)
            slots = torch.from_numpy(bank.weight_map.slots(layer.name))
            gradient.index_add_(0, slots.flatten(), (dense_gradient.double() * factor).flatten())
    gradient /= torch.from_numpy(bank.weight_map.squared_scale_array())
    found = bank.psi.grad
    assert found is not None
    assert torch.isfinite(found).all()
    assert found.norm() > 0
    assert (found - gradient).norm() <= 1e-4 * gradient.norm()

    others = {name: parameter.grad for name, parameter in copied.named_parameters()}
    size = max(value.abs().max().item() for value in others.values() if value is not None)
    for name, parameter in model.named_parameters():
        if parameter is not bank.psi:
            assert (parameter.grad is None) == (others[name] is None), f"gradient of {name}"
            if parameter.grad is not None:  # some (a key's bias) are zero but for rounding
                torch.testing.assert_close(parameter.grad, others[name], rtol=1e-4, atol=1e-5 * size, msg=name)
    model.zero_grad()


def saves_and_loads(case: TinyCase, model: nn.Module, batch: dict, folder: Path) -> None:
    """The checkpoint is as small as it should be and comes back bit-equal, through every usual way of loading it."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    header, body = safetensors_sizes(file)
    stored = sum(t.numel() * t.element_size() for t in distinct(model.state_dict()))  # psi once, and what is not shared
    dense_left = stored - model.get_submodule(bank_name(model)).psi.nbytes
    assert body <= 1.01 * (4 * find_bank(model).weight_map.m + dense_left)
    assert header <= 1024 + 200 * len(model.state_dict())

    expected, state = outputs(model, batch), model.state_dict()
    loaded, info = case.model_class.from_pretrained(folder, output_loading_info=True)
    loaded.train(case.train)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert type(loaded) is type(model)
    assert list(loaded.state_dict()) == list(state)
    assert tied_names(loaded) == tied_names(model)
    equal(loaded.state_dict(), state)
    equal(outputs(loaded, batch), expected)

    for keys in (state, None if tied_names(model) else load_file(file)):
        if keys is not None:
            for parameter in loaded.parameters():
                parameter.data.zero_()
            loaded.load_state_dict(keys, strict=True)
            equal(outputs(loaded, batch), expected)


def plain_transformers_refuses(case: TinyCase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hf_rps, transformers must fail on the checkpoint and not return a randomly initialised model."""
    with monkeypatch.context() as without_rps:
        without_rps.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "rps")
        without_rps.delitem(AUTO_QUANTIZER_MAPPING, "rps")
        with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
            case.model_class.from_pretrained(folder)


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


def outputs(model: nn.Module, batch: dict) -> dict[str, Tensor]:
    """All float tensors of the model's output, by name."""
    with torch.no_grad():
        return floats(model(**batch))


def floats(output) -> dict[str, Tensor]:
    return {key: value for key, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}


def backward(model: nn.Module, batch: dict) -> dict[str, Tensor]:
    """Backpropagate a fixed random projection of all outputs, and return the outputs."""
    result, generator = floats(model(**batch)), torch.Generator().manual_seed(1)
    loss = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in result.values())
    loss.backward()
    return {key: value.detach() for key, value in result.items()}


def layers(model: nn.Module) -> dict[str, RPSLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RPSLayer)}


def bank_name(model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is find_bank(model))


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


def distinct(state: dict[str, Tensor]) -> list[Tensor]:
    """The tensors of a state dict, tied ones once."""
    return list({value.data_ptr() if value.numel() else key: value for key, value in state.items()}.values())


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names of the parameters that are one and the same, group by group."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], what: str, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance`` times the size of each tensor, with the same names."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        size = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance * size, equal_nan=False,
                                   msg=lambda text, key=key: f"{what}: {key}\n{text}")  # fmt: skip


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), f"{key} differs"


def safetensors_sizes(file: Path) -> tuple[int, int]:
    """Bytes of a safetensors file: (header, tensors)."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        json.loads(stream.read(length))
    return 8 + length, file.stat().st_size - 8 - length


if __name__ == "__main__":
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(table())
    print(f"{time.perf_counter() - start:.1f} s")
