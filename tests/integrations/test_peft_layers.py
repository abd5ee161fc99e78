"""Layers with an RPS adapter compute and train as weights that are written out, through every path."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_model_status, get_peft_model
from peft_adapters import MODES, config, equal, layers, logits, psi
from torch import nn

from hf_rps import RPSConfig
from hf_rps.integrations.peft.layers import DeltaLinear
from hf_rps.layers.stand_in import WeightStandIn
from hf_rps.mappings import definition
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products.autograd import shared_linear
from hf_rps.products.base import Made
from hf_rps.psi.memory import GradientMemory
from hf_rps.psi.sink import GradientBuffer


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40), cols=st.integers(1, 40), m=st.integers(1, 900), tokens=st.integers(1, 5),
    transposed=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_delta_function_equals_its_reference(rows, cols, m, tokens, transposed, seed):
    weight_map = WeightMap([Target("w", rows, cols, 0.1)], ratio=min(1.0, m / (rows * cols)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight = draw(cols, rows).t() if transposed else draw(rows, cols)
    inputs = [draw(tokens, cols), draw(weight_map.m), draw(rows)]
    gradients, outputs = [], []
    gy = draw(tokens, rows)
    for fast in (True, False):
        x, psi, bias = (t.clone().requires_grad_() for t in inputs)
        buffer, summed = GradientBuffer(GradientMemory()), []
        if fast:
            y = shared_linear(x, psi, bias, Made(weight_map.matrix("w")), buffer, weight)
            # the buffer belongs to the pass that fills it; a hook on x runs inside that pass
            x.register_hook(lambda g, b=buffer, s=summed: s.append(b.take()))
        else:
            y = F.linear(x, weight + definition.weight(psi, weight_map, "w"), bias)
        y.backward(gy)
        outputs.append(y.detach())
        gradients.append([x.grad, summed[0] if fast else psi.grad, bias.grad])
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_fused_delta_differentiates_twice(monkeypatch):
    """The gradient of a gradient penalty is that of two separate products, whose own is tested with the layers."""
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(
            nn.Sequential(nn.Linear(6, 5)).double(), config("delta", target_modules=["0"], ratio=0.5)
        )
        x = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
        if not fused:
            monkeypatch.setattr(DeltaLinear, "_can_fuse", lambda *arguments: False)
        (gradient,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append((psi(model).grad, x.grad))
        assert found[-1][0].norm() > 0
    torch.testing.assert_close(found[0], found[1])


def explicit(model, dense, ids):
    """Loss and gradient of psi through weights built out of psi by plain operations."""
    array = psi(model).detach().clone().requires_grad_()
    weights = {}
    for name, layer in layers(model).items():
        shared = layer.shared["default"]
        weight = layer.kind.stored(definition.weight(array, shared.source.array.weight_map, shared.name))
        name = name.removeprefix("base_model.model.")
        weights[f"{name}.weight"] = weight + (dense.get_parameter(f"{name}.weight") if layer_is_delta(layer) else 0)
    loss = torch.func.functional_call(dense, weights, (), {"input_ids": ids, "labels": ids}).loss
    loss.backward()
    gamma = torch.from_numpy(definition.gamma(shared.source.array.weight_map)).to(array)
    gamma.masked_fill_(gamma == 0, 1)
    scaling = shared.source.array.divisor.scaling
    return loss.detach(), array.grad / {"projection": gamma, "norm": gamma.sqrt(), "none": 1.0}[scaling]


def layer_is_delta(layer):
    return isinstance(layer, DeltaLinear)


@pytest.mark.parametrize("tokens", [9, 40])  # two products, or one with the sum of the weights
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient_equal_explicit_weights(tiny, mode, kind, tokens):
    ids = torch.arange(2 * tokens).view(2, tokens) * 5 % 97
    dense = tiny(kind)
    model = get_peft_model(tiny(kind), config(mode)).eval()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    expected, gradient = explicit(model, dense, ids)
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(psi(model).grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"sign": "element"}, {"mapping": "roast"}, {"mapping": "hash"}, {"sharing": "block"}]
)
@pytest.mark.parametrize("mode", MODES)
def test_every_map_trains_and_reloads(tiny, ids, tmp_path, mode, changes):
    model = get_peft_model(tiny(), config(mode, **changes)).eval()
    with torch.inference_mode():
        model(input_ids=ids)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    expected, gradient = explicit(model, tiny(), ids)
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(psi(model).grad, gradient, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path)
    equal(logits(PeftModel.from_pretrained(tiny(), tmp_path).eval(), ids), logits(model, ids))


@pytest.mark.parametrize("mode", MODES)
def test_only_the_array_trains_and_replaced_weights_are_freed(tiny, ids, mode):
    base = tiny()
    dense = sum(p.numel() for p in base.parameters())
    targeted = sum(m.weight.numel() for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    model = get_peft_model(base, RPSConfig(ratio=0.2, mode=mode))
    (trained,) = [name for name, p in model.named_parameters() if p.requires_grad]
    assert re.fullmatch(r"base_model\.model\.rps\.rps_banks\.default\.psi_[0-9a-f]{12}", trained)
    expected = dense + psi(model).numel() - (targeted if mode == "replace" else 0)
    assert model.get_nb_trainable_parameters() == (psi(model).numel(), expected)
    model.print_trainable_parameters()
    if mode == "delta":
        equal(logits(model, ids), logits(tiny(), ids))  # zero at first
    status = get_model_status(model)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True}


@pytest.mark.parametrize("mode", MODES)
def test_autocast_and_half_precision(tiny, mode):
    ids = torch.arange(80).view(2, 40) * 5 % 97
    exact = logits(get_peft_model(tiny(), config(mode)).eval(), ids)
    model = get_peft_model(tiny(), config(mode)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.testing.assert_close(logits(model, ids).float(), exact, rtol=0.1, atol=0.05)
    assert psi(model).grad.dtype == torch.float32
    half = get_peft_model(tiny().bfloat16(), config(mode)).eval()
    assert psi(half).dtype == torch.float32  # PEFT's autocast_adapter_dtype
    assert logits(half, ids).dtype == torch.bfloat16
    half(input_ids=ids, labels=ids).loss.backward()
    assert psi(half).grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_adapter_stays_frozen_when_cast(tiny, mode, tmp_path):
    get_peft_model(tiny().bfloat16(), config(mode), autocast_adapter_dtype=False).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny().bfloat16(), tmp_path)
    assert psi(model).dtype == torch.float32
    assert not psi(model).requires_grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny, ids, mode, reentrant):
    plain = get_peft_model(tiny(), config(mode)).train()
    plain(input_ids=ids, labels=ids).loss.backward()
    base = tiny()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.enable_input_require_grads()
    model = get_peft_model(base, config(mode)).train()
    psi(model).data.copy_(psi(plain).data)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(psi(model).grad, psi(plain).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_compile_takes_the_plain_path(tiny, ids, mode):
    """The whole graph of a model that has never run, with its gradient."""
    model = get_peft_model(tiny(num_hidden_layers=1), config(mode)).eval()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    found = compiled(input_ids=ids, labels=ids)
    found.loss.backward()
    gradient = psi(model).grad.clone()
    model.zero_grad()
    expected = model(input_ids=ids, labels=ids)
    expected.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(gradient, psi(model).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_copies_are_independent(tiny, ids, mode):
    model = get_peft_model(tiny(), config(mode)).eval()
    expected = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        equal(logits(other, ids), expected)
        other(input_ids=ids, labels=ids).loss.backward()
        assert psi(model).grad is None
        psi(other).data.zero_()
        equal(logits(model, ids), expected)


@pytest.mark.parametrize("mode", MODES)
def test_models_that_read_the_weight_themselves_see_the_adapter(mode):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 6)

        def forward(self, x):
            return F.linear(x, self.lin.weight, self.lin.bias)

    torch.manual_seed(0)
    model = get_peft_model(Reader(), config(mode, target_modules=["lin"], ratio=0.5))
    layer, x = model.base_model.model.lin, torch.randn(3, 8)
    assert isinstance(layer.weight, WeightStandIn)
    torch.testing.assert_close(model(x), layer(x))
    model(x).sum().backward()
    assert psi(model).grad.abs().sum() > 0


def test_offloaded_arrays_are_brought_in(tiny, ids):
    from accelerate import cpu_offload

    model = get_peft_model(tiny(), config("delta")).eval()
    expected = logits(model, ids)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert psi(model).is_meta
    equal(logits(model, ids), expected)
    assert psi(model).is_meta
