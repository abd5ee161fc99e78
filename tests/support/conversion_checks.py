"""What conversion promises of any model, each promise a check that takes the model and a batch."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path

import pytest
import torch
from model_outputs import backward, close, equal, outputs
from safetensors.torch import load_file
from tiny_models import TinyCase
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank
from hf_rps.layers.base import RPSLayer
from hf_rps.layers.kinds import kind_of
from hf_rps.mappings import definition


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


def agrees_with_plain_reference(model: nn.Module, batch: dict) -> None:
    """Outputs, psi's gradient and all other gradients equal those of the densified copy, trained the ordinary way.

    The gradient of psi that is expected is computed by definition, slot by slot, from the copy's dense gradients.
    """
    bank = find_bank(model)
    copied = to_dense(copy.deepcopy(model))
    assert find_bank(copied) is None
    assert find_bank(model) is bank
    expected = backward(copied, batch)
    close(backward(model, batch), expected, "compressed")

    gradient = torch.zeros(bank.weight_map.m, dtype=torch.float64)
    for name, layer in layers(model).items():
        dense_gradient = copied.get_submodule(name).weight.grad
        if dense_gradient is not None:
            dense_gradient = kind_of(copied.get_submodule(name)).matrix(dense_gradient)
            factor = torch.from_numpy(bank.weight_map.signs(layer.name)) * bank.weight_map.scale(layer.name)
            slots = torch.from_numpy(bank.weight_map.slots(layer.name))
            gradient.index_add_(0, slots.flatten(), (dense_gradient.double() * factor).flatten())
    gradient /= torch.from_numpy(definition.gamma(bank.weight_map))
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
        with pytest.raises(OSError, match="import-hf_rps-before-loading"):
            case.model_class.from_pretrained(folder)


def layers(model: nn.Module) -> dict[str, RPSLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RPSLayer)}


def bank_name(model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is find_bank(model))


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


def safetensors_sizes(file: Path) -> tuple[int, int]:
    """Bytes of a safetensors file: (header, tensors)."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        json.loads(stream.read(length))
    return 8 + length, file.stat().st_size - 8 - length
