"""Adapters of learned maps: codebooks of their own, over one stored base with its codes."""

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from codebook_adapters import IDS, array, compressed, config, step, trained
from paths import environment
from peft import PeftModel, get_model_status, get_peft_model
from peft_adapters import equal, logits
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from hf_rps import get_rps_model, to_dense
from hf_rps.conversion import find_bank, shared_layers
from hf_rps.layers.stand_in import WeightStandIn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a saved base."""
    folder = tmp_path_factory.mktemp("base")
    compressed().save_pretrained(folder)
    return folder


@pytest.fixture
def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_task_is_stored_as_its_codebooks(base, folder, tmp_path):
    """They start as the base's, they alone are trained, and they alone are in the file."""
    expected = logits(base, IDS)
    model = get_peft_model(base, config(bits=3))
    name = f"adapters_rps.rps_banks.default.{find_bank(model).psi_name}"
    assert trained(model) == [f"base_model.model.{name}"]
    equal(logits(model, IDS), expected)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    outputs = step(model.train()).clone()
    assert not torch.equal(outputs, expected)
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
    assert changed == [f"base_model.model.{name}"]
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as reader:
        found = {key: reader.get_slice(key).get_shape() for key in reader.keys()}  # noqa: SIM118
    place = "base_model.model.adapters_rps"
    m = find_bank(model).weight_map.m
    sentinel = list(find_bank(model).weight_map.sentinel_shape())
    assert found == {f"{place}.rps_banks.{find_bank(model).psi_name}": [m], f"{place}.rps_map": sentinel}
    assert 4 * m < file.stat().st_size < 4 * m + 500
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    equal(logits(again, IDS), outputs)
    assert trained(again) == []
    assert "needs just that compressed model" in (tmp_path / "README.md").read_text()


def test_a_new_process_loads_it_every_way(base, folder, tmp_path):
    model = get_peft_model(base, config(task_type="CAUSAL_LM"), adapter_name="a")
    outputs = {"a": step(model)}
    model.add_adapter("b", config())
    model.set_adapter("b")
    outputs["b"] = step(model)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    outputs["merged"] = logits(merged, IDS)
    equal(outputs["merged"], outputs["b"])
    torch.save((IDS, outputs), tmp_path / "outputs.pt")
    script = """
        import sys, torch
        from pathlib import Path
        import hf_rps
        from peft import AutoPeftModelForCausalLM, PeftModel
        from transformers import AutoModelForCausalLM
        base, folder = map(Path, sys.argv[1:])
        ids, outputs = torch.load(folder / "outputs.pt")
        torch.set_num_threads(1)
        def check(model, key):
            with torch.no_grad():
                assert torch.equal(model.eval()(input_ids=ids).logits, outputs[key]), key
        load = AutoModelForCausalLM.from_pretrained
        check(load(folder / "merged"), "merged")
        check(AutoPeftModelForCausalLM.from_pretrained(folder / "a"), "a")
        check(load(folder / "a"), "a")
        model = load(base)
        info = model.load_adapter(str(folder / "b"))
        assert not info.missing_keys and not info.unexpected_keys, info
        check(model, "b")
        model = PeftModel.from_pretrained(load(base), folder / "a", low_cpu_mem_usage=True)
        model.load_adapter(folder / "b", "b")
        check(model, "a")
        model.set_adapter("b")
        check(model, "b")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder), str(tmp_path)]
    child = subprocess.run(
        command, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), check=False
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]


def test_two_adapters_over_one_base(base):
    """The codes are there once; without an adapter the base is what it was, bit for bit."""
    expected, codes = logits(base, IDS), [p.data_ptr() for p in base.parameters() if p.dtype == torch.uint8]
    model = get_peft_model(base, config(), adapter_name="a")
    outputs = {"a": step(model)}
    model.add_adapter("b", config())
    assert trained(model) == [n for n, p in model.named_parameters() if p is array(model, "a")]
    model.set_adapter("b")
    equal(logits(model, IDS), expected)  # it starts from the base, not from the other one
    outputs["b"] = step(model)
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        equal(logits(model, IDS), outputs[name])
        assert trained(model) == [n for n, p in model.named_parameters() if p is array(model, name)]
    assert [p.data_ptr() for p in model.parameters() if p.dtype == torch.uint8] == codes
    with model.disable_adapter():
        equal(logits(model, IDS), expected)
    equal(logits(model, IDS), outputs["a"])
    model.delete_adapter("a")
    equal(logits(model, IDS), outputs["b"])
    model.delete_adapter("b")
    equal(logits(model.base_model.model, IDS), expected)  # PEFT's own model asks for an active one


def test_merged_and_unmerged(base, tmp_path):
    expected, psi = logits(base, IDS), find_bank(base).psi.detach().clone()
    model = get_peft_model(base, config())
    outputs = step(model)
    model.merge_adapter(safe_merge=True)
    assert get_model_status(model).merged_adapters == ["default"]
    equal(find_bank(model).psi.detach(), array(model).detach())
    equal(logits(model, IDS), outputs)
    model.unmerge_adapter()
    equal(find_bank(model).psi.detach(), psi)
    model.merge_adapter()
    with model.disable_adapter():  # as of PEFT's methods, it unmerges
        equal(logits(model, IDS), expected)
    equal(logits(model, IDS), outputs)
    model.merge_adapter()
    merged = copy.deepcopy(model).merge_and_unload()
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in compressed().named_parameters()]
    equal(logits(merged, IDS), outputs)
    merged.save_pretrained(tmp_path)
    equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), IDS), outputs)
    dense = to_dense(merged)
    torch.testing.assert_close(logits(dense, IDS), outputs)
    plain = model.unload()
    equal(logits(plain, IDS), expected)
    hooks = [m for m in plain.modules() if m is not plain and m is not plain.model and m._forward_pre_hooks]
    assert hooks == []
    get_peft_model(plain, config())  # and so on


@pytest.mark.parametrize("scaling", ["projection", "norm", "none"])
@pytest.mark.parametrize(("kind", "group"), [("llama", None), ("gpt2", None), ("llama", 20)])
def test_loss_and_gradient_equal_explicit_weights(kind, group, scaling):
    base = compressed(kind, group_size=group, bits=2)
    dense, layers = to_dense(copy.deepcopy(base)), shared_layers(base)
    model = get_peft_model(base, config(grad_scaling=scaling))
    with torch.no_grad():
        array(model).mul_(torch.rand(array(model).shape) + 0.5)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    psi = array(model).detach().clone().requires_grad_()
    weights, gamma, start = {}, torch.zeros_like(psi), 0
    for name, layer in layers.items():  # by the formula of hf_rps.mappings.codebook
        rows, cols = layer.out_features, layer.in_features
        width, entries = group or cols, 4
        groups = -(-cols // width)
        (packed,) = (p for key, p in layer._parameters.items() if key.startswith("codes_"))
        codes = packed[:, torch.arange(cols) // 4].to(torch.int64) >> 2 * (torch.arange(cols) % 4) & 3
        place = torch.arange(rows)[:, None] * groups + torch.arange(cols) // width
        slots = start + place * entries + codes
        gamma += torch.bincount(slots.flatten(), minlength=len(psi))
        weights[f"{name}.weight"] = layer.as_stored(psi[slots])
        start += rows * groups * entries
    expected = torch.func.functional_call(dense, weights, (), {"input_ids": IDS, "labels": IDS}).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    divisor = {"projection": gamma, "norm": gamma.sqrt(), "none": torch.ones_like(gamma)}[scaling]
    gradient = psi.grad / divisor.masked_fill(divisor == 0, 1)
    torch.testing.assert_close(array(model).grad, gradient, rtol=1e-4, atol=1e-6)
    assert gradient.norm() > 0


def test_sums_of_adapters(base):
    model = get_peft_model(base, config(), adapter_name="a")
    step(model)
    model.add_adapter("b", config())
    model.set_adapter("b")
    step(model)
    model.add_weighted_adapter(["a", "b"], [0.75, 0.5], "sum")
    torch.testing.assert_close(array(model, "sum"), 0.75 * array(model, "a") + 0.5 * array(model, "b"))
    weights = {}
    for name in ("a", "b", "sum"):
        model.set_adapter(name)
        weights[name] = [layer.dense_weight().detach() for layer in shared_layers(model).values()]
    for a, b, both in zip(*weights.values(), strict=True):
        torch.testing.assert_close(both, 0.75 * a + 0.5 * b)
    assert not any("rps_map" in name for name, _ in model.named_parameters())


def test_weights_that_are_read_copied_and_compiled(base):
    model = get_peft_model(base, config())
    outputs = step(model)
    layer = next(iter(shared_layers(model).values()))
    assert isinstance(layer.weight, WeightStandIn)
    assert layer.weight.requires_grad
    equal(layer.weight.detach().clone(), layer.shared.matrix.weight(array(model).detach()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            array(model).mul_(1.5)
        equal(logits(twin, IDS), outputs)
        with torch.no_grad():
            array(model).div_(1.5)
        assert not torch.equal(step(twin), outputs)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(40, 30), nn.Linear(30, 20)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_compiled_layers_read_what_is_active():
    base, x = get_rps_model(Network(), config(bits=2)), torch.randn(5, 40)
    expected = base(x).detach()
    model = get_peft_model(base, config())
    with torch.no_grad():
        array(model).mul_(1.5)
    model(x).square().sum().backward()
    outputs, gradient = model(x).detach(), array(model).grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    y = compiled(x)
    y.square().sum().backward()
    torch.testing.assert_close(y.detach(), outputs)
    torch.testing.assert_close(array(model).grad, gradient)
    with model.disable_adapter():
        torch.testing.assert_close(compiled(x).detach(), expected)
    torch.testing.assert_close(compiled(x).detach(), outputs)
