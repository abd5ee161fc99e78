"""RPS adapters on tiny models of many architectures (``tiny_models.CASES``), in both modes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_outputs import close, equal, outputs
from peft import PeftModel, get_peft_model
from tiny_models import CASES, TinyCase
from torch import nn

from hf_rps import RPSConfig
from hf_rps.integrations.peft.layers import AdapterLinear


@pytest.mark.parametrize("mode", ["delta", "replace"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_adapter(case: TinyCase, mode: str, tmp_path: Path):
    """It starts as the base model, changes it, reloads bit-equal, and merges into a plain model of the same outputs."""
    base, batch = case.build(), case.batch()
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    reference = outputs(base, batch)
    # a replacement of ratio 1 is the model itself, to float rounding
    start = get_peft_model(case.build(), RPSConfig(ratio=1 if mode == "replace" else 0.2, mode=mode))
    close(outputs(start.base_model.model, batch), reference, "at first")

    model = get_peft_model(base, RPSConfig(ratio=0.2, mode=mode, init_weights=False)).train(case.train)
    inner = model.base_model.model
    psi = inner.rps.rps_banks["default"].psi
    assert psi.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) == 1
    expected = outputs(inner, batch)
    assert max((expected[key] - value).norm() / value.norm() for key, value in reference.items()) > 0.01
    if case.name == "reformer":  # its reversible layers pass no gradient on if their input needs none, LoRA's neither
        inner.enable_input_require_grads()
    sum(value.square().sum() for value in inner(**batch).values() if _is_float(value)).backward()
    assert psi.grad.isfinite().all()
    assert psi.grad.norm() > 0

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.build(seed=0), tmp_path).train(case.train)
    equal(outputs(again.base_model.model, batch), expected)

    merged = model.merge_and_unload()
    assert not any(isinstance(module, AdapterLinear) for module in merged.modules())
    assert {name for name, module in merged.named_modules() if isinstance(module, nn.Linear)} == linear
    close(outputs(merged, batch), expected, "merged", tolerance=1e-4)


def _is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
