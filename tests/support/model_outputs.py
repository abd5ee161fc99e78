"""A model's float outputs, a backward pass through all of them, and two comparisons: close, and bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
