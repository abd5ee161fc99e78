"""RPS as a PEFT method: layers against explicit references, round trips, several adapters, merging, bad input."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import environment
from peft import (
    LoraConfig,
    PeftModel,
    PeftType,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_rps import RPSConfig, get_rps_model, size_report, to_dense
from hf_rps.integrations.peft import model as rps_peft
from hf_rps.integrations.peft import peft_type
from hf_rps.integrations.peft.layers import DeltaLinear, ReplaceLinear
from hf_rps.layers.stand_in import WeightStandIn
from hf_rps.mappings import definition
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products.autograd import shared_linear
from hf_rps.products.base import Made
from hf_rps.psi.sink import GradientBuffer

MODES = ["delta", "replace"]


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def config(mode, **changes):
    """An adapter that does something from the start."""
    return RPSConfig(**{"ratio": 0.2, "mode": mode, "init_weights": False} | changes)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def psi(model, adapter="default"):
    return next(p for name, p in model.named_parameters() if name.endswith(f"rps.rps_psi.{adapter}"))


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (DeltaLinear, ReplaceLinear))}


# ---- registration and config


def test_the_enumeration_is_extended_once():
    assert PeftType.RPS.value == "RPS"
    assert PeftType("RPS") is PeftType.RPS
    assert isinstance(PeftType.RPS, PeftType)
    assert [str(member) for member in PeftType].count("PeftType.RPS") == 1
    before = list(PeftType)
    peft_type.extend(PeftType, "RPS")
    rps_peft.register()
    assert list(PeftType) == before
    assert pickle.loads(pickle.dumps(PeftType.RPS)) is PeftType.RPS
    assert copy.deepcopy(PeftType.RPS) is PeftType.RPS
    assert json.dumps({"type": PeftType.RPS}) == '{"type": "RPS"}'


def test_one_config_serves_several_models(tiny, ids, tmp_path):
    """Nothing of the first model is left in the config: not its targets, not its map."""
    settings = config("delta")
    before = settings.to_dict()
    small = get_peft_model(tiny(num_hidden_layers=1), settings)
    large = get_peft_model(tiny(num_hidden_layers=3), settings)
    assert {name: getattr(settings, name) for name in before} == before
    assert len(layers(large)) == 3 * len(layers(small))
    for name, model in (("small", small), ("large", large)):
        model.save_pretrained(tmp_path / name)
    again = PeftModel.from_pretrained(tiny(num_hidden_layers=1), tmp_path / "small")
    equal(logits(again, ids), logits(small.eval(), ids))


@pytest.mark.parametrize("field", ["mode", "bias"])
def test_bad_fields(field):
    with pytest.raises(ValueError, match=f"{field}='no'.*expected one of"):
        RPSConfig(**{field: "no"})


def test_bad_init_of_a_delta():
    with pytest.raises(ValueError, match=r"init_weights='project'.*True or False with mode='delta'"):
        RPSConfig(mode="delta", init_weights="project")


# ---- the layers


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
        buffer, summed = GradientBuffer(), []
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
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["base_model.model.rps.rps_psi.default"]
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


# ---- round trips


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
def test_round_trip(tiny, ids, tmp_path, mode, kind, low_cpu_mem_usage):
    model = get_peft_model(tiny(kind), config(mode)).eval()
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in file.values()) == psi(model).numel()
    state = torch.get_rng_state()
    again = PeftModel.from_pretrained(tiny(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.set_rng_state(state)
    equal(logits(again, ids), logits(model, ids))
    assert not psi(again).requires_grad


def test_round_trips_in_a_new_process(tiny, ids, tmp_path):
    """AutoPeftModel, from_pretrained of the adapter's folder, load_adapter, two adapters; merged, without hf_rps."""
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    reference = {}
    for mode in MODES:
        start = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = get_peft_model(start, config(mode, task_type="CAUSAL_LM")).eval()
        model.add_adapter("other", config(mode, seed=1))
        model.save_pretrained(tmp_path / mode)
        reference[mode] = logits(model, ids)
        model.set_adapter("other")
        reference[f"{mode} other"] = logits(model, ids)
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / f"{mode} merged")
        reference[f"{mode} merged"] = logits(merged, ids)
        torch.testing.assert_close(reference[f"{mode} merged"], reference[f"{mode} other"], rtol=0, atol=1e-6)
    torch.save((ids, reference), tmp_path / "reference.pt")
    script = """
        import sys, torch
        from pathlib import Path
        from transformers import AutoModelForCausalLM
        folder = Path(sys.argv[1])
        ids, reference = torch.load(folder / "reference.pt")
        def check(model, key):
            with torch.no_grad():
                difference = (model.eval()(input_ids=ids).logits - reference[key]).abs().max().item()
            assert difference == 0, (key, difference)
        torch.set_num_threads(1)
        for mode in ("delta", "replace"):
            check(AutoModelForCausalLM.from_pretrained(folder / f"{mode} merged"), f"{mode} merged")
        import hf_rps
        from peft import AutoPeftModelForCausalLM, PeftModel
        for mode in ("delta", "replace"):
            check(AutoPeftModelForCausalLM.from_pretrained(folder / mode), mode)
            check(AutoModelForCausalLM.from_pretrained(folder / mode), mode)
            model = AutoModelForCausalLM.from_pretrained(folder / "base")
            check(PeftModel.from_pretrained(model, folder / mode, low_cpu_mem_usage=True), mode)
            model = AutoModelForCausalLM.from_pretrained(folder / "base")
            model.load_adapter(str(folder / mode))
            check(model, mode)
            model = AutoModelForCausalLM.from_pretrained(folder / "base")
            model = PeftModel.from_pretrained(model, folder / mode)
            model.load_adapter(folder / mode / "other", "other")
            check(model, mode)
            model.set_adapter("other")
            check(model, f"{mode} other")
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]


@pytest.mark.parametrize("mode", MODES)
def test_merge_and_unmerge(tiny, ids, mode):
    model = get_peft_model(tiny("gpt2"), config(mode)).eval()
    expected = logits(model, ids)
    model.merge_adapter(safe_merge=True)
    assert get_model_status(model).merged_adapters == ["default"]
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    assert get_model_status(model).merged_adapters == []
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-6)
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny("gpt2"))
    assert not hasattr(merged, "rps")
    assert not layers(merged)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())
    assert {name: p.shape for name, p in merged.named_parameters()} == {
        name: p.shape for name, p in tiny("gpt2").named_parameters()
    }


@pytest.mark.parametrize("mode", MODES)
def test_safe_merge_refuses_what_is_not_finite(tiny, mode):
    model = get_peft_model(tiny(), config(mode))
    psi(model).data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert get_model_status(model).merged_adapters == []


def test_a_delta_is_unloaded_and_disabled(tiny, ids):
    model = get_peft_model(tiny(), config("delta")).eval()
    expected = logits(tiny(), ids)
    with model.disable_adapter():
        equal(logits(model, ids), expected)
    assert not torch.equal(logits(model, ids), expected)
    equal(logits(model.unload(), ids), expected)


# ---- several adapters


@pytest.mark.parametrize("mode", MODES)
def test_two_adapters(tiny, ids, mode):
    alone = {}
    torch.manual_seed(1)
    model = get_peft_model(tiny(), config(mode), adapter_name="a").eval()
    alone["a"] = logits(model, ids)
    model.add_adapter("b", config(mode, seed=1, ratio=0.1))
    assert psi(model, "a").requires_grad
    assert not psi(model, "b").requires_grad
    equal(logits(model, ids), alone["a"])
    model.set_adapter("b")
    assert not psi(model, "a").requires_grad
    alone["b"] = logits(model, ids)
    assert not torch.equal(alone["a"], alone["b"])
    model(input_ids=ids, labels=ids).loss.backward()
    assert psi(model, "a").grad is None
    assert psi(model, "b").grad.abs().sum() > 0
    if mode == "delta":
        model.base_model.set_adapter(["a", "b"])
        both = logits(model, ids)
        weights = tiny()
        for name, layer in layers(model).items():
            name = name.removeprefix("base_model.model.")
            weights.get_parameter(f"{name}.weight").data += layer.get_delta_weight("a") + layer.get_delta_weight("b")
        torch.testing.assert_close(both, logits(weights, ids), rtol=1e-4, atol=1e-5)
    model.delete_adapter("b")
    model.set_adapter("a")
    equal(logits(model, ids), alone["a"])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_second_replacement_starts_from_the_first(tiny, ids, kind):
    """Projected from the weights that the model has: with the same map, the same array."""
    model = get_peft_model(tiny(kind), RPSConfig(ratio=0.2), adapter_name="a").eval()
    model.add_adapter("b", RPSConfig(ratio=0.2))
    torch.testing.assert_close(psi(model, "b"), psi(model, "a"))


def test_replacements_of_different_layers(tiny, ids):
    """A layer that not every adapter replaces keeps its dense weight; one that lost it says so."""
    model = get_peft_model(tiny(), config("replace", target_modules=["up_proj"]), adapter_name="a").eval()
    model.add_adapter("b", config("replace", target_modules=["down_proj"]))
    assert layers(model)["base_model.model.model.layers.0.mlp.down_proj"].base_layer.weight is not None
    logits(model, ids)
    model.set_adapter("b")
    with pytest.raises(ValueError, match=r"freed.*\['a'\] none is active; activate one"):
        logits(model, ids)
    model.base_model.set_adapter(["a", "b"])
    assert logits(model, ids).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_transformers_own_adapters(tiny, ids, tmp_path, mode):
    model = tiny()
    model.add_adapter(config(mode), "a")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["rps.rps_psi.a"]
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "a")
    model.add_adapter(config(mode, seed=1), "b")
    other = logits(model, ids)
    assert model.active_adapters() == ["b"]
    model.set_adapter("a")
    equal(logits(model, ids), expected)
    model.delete_adapter("b")
    again = tiny()
    info = again.load_adapter(str(tmp_path / "a"))
    assert not info.missing_keys
    assert not info.unexpected_keys
    equal(logits(again, ids), expected)
    assert not any("rps_map" in name for name, _ in again.named_parameters())
    again.load_adapter(str(tmp_path / "a"), "second")
    again.set_adapter("second")
    equal(logits(again, ids), expected)
    assert not torch.equal(expected, other)
    if mode == "delta":
        again.disable_adapters()
        equal(logits(again, ids), logits(tiny(), ids))
        again.enable_adapters()
        equal(logits(again, ids), expected)
        model.delete_adapter("a")
        equal(logits(model, ids), logits(tiny(), ids))


# ---- with the rest of PEFT and transformers


@pytest.mark.parametrize("mode", MODES)
def test_trainer_trains_resumes_and_saves(tiny, tmp_path, mode):
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 97, (16, 12))]

    def trainer(folder, **changes):
        arguments = TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=3, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True, **changes,
        )  # fmt: skip
        torch.manual_seed(0)
        return Trainer(
            get_peft_model(tiny(), RPSConfig(ratio=0.2, mode=mode, task_type="CAUSAL_LM")),
            arguments,
            train_dataset=rows,
        )

    whole = trainer(tmp_path / "run")
    start = psi(whole.model).detach().clone()
    whole.train()
    assert not torch.equal(psi(whole.model), start)
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    equal(psi(resumed.model).detach(), psi(whole.model).detach())


def test_classification_head_and_biases_are_saved(tiny, ids, tmp_path):
    def make():
        return tiny("bert", AutoModelForSequenceClassification, num_labels=3)

    settings = config("delta", task_type="SEQ_CLS", bias="rps_only")
    model = get_peft_model(make(), settings).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in saved
    assert sum(key.endswith(".bias") and "classifier" not in key for key in saved) == len(layers(model))
    equal(logits(PeftModel.from_pretrained(make(), tmp_path).eval(), ids), logits(model, ids))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_delta_on_a_quantised_base(tiny, tmp_path, bits):
    """It computes what the dequantised base plus the delta does, trains, reloads and merges; replacing is refused."""
    from transformers import BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    tiny(**sizes).save_pretrained(tmp_path / "base")
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}

    def load():
        quantised = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantised, device_map="cpu", dtype=torch.float32
        )

    ids = torch.arange(80).view(2, 40) * 5 % 97
    model = get_peft_model(load(), config("delta")).eval()
    assert {layer.quantization_backend.backend_name for layer in layers(model).values()} == {f"bnb {bits}bit"}
    dense = tiny(**sizes)
    for name, layer in layers(model).items():
        weight = layer.get_base_weight() + layer.get_delta_weight("default")
        dense.get_parameter(f"{name.removeprefix('base_model.model.')}.weight").data.copy_(weight)
    expected = logits(model, ids)
    torch.testing.assert_close(expected, logits(dense, ids), rtol=0.02, atol=0.02)
    model(input_ids=ids, labels=ids).loss.backward()
    assert psi(model).grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again, ids), expected, rtol=0.01, atol=0.01)
    model.merge_adapter()
    assert (logits(model, ids) - expected).norm() < 0.5 * (logits(load().eval(), ids) - expected).norm()
    with pytest.raises(ValueError, match="RPS shares float weights"):
        get_peft_model(load(), config("replace"))


@pytest.mark.parametrize("mode", MODES)
def test_sentence_transformers(tiny, tmp_path, mode):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "cat": 3, "sat": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "b"
    )
    tiny("bert", AutoModel).save_pretrained(tmp_path / "b")
    encoder = Transformer(str(tmp_path / "b"))
    model = SentenceTransformer(modules=[encoder, Pooling(32)], device="cpu")
    texts = ["a cat", "a cat sat"]
    plain = model.encode(texts, convert_to_tensor=True)
    model.add_adapter(config(mode))
    expected = model.encode(texts, convert_to_tensor=True)
    assert not torch.equal(expected, plain)
    model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    equal(again.encode(texts, convert_to_tensor=True), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_card_says_the_import(tiny, tmp_path, mode):
    model = get_peft_model(tiny(), config(mode, task_type="CAUSAL_LM"))
    model.add_adapter("other", config(mode))
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        text = (folder / "README.md").read_text()
        assert "import hf_rps" in "\n".join(text.splitlines()[:20])
        assert "library_name: peft" in text
    assert "AutoPeftModelForCausalLM" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import hf_rps") == 1


def test_without_hf_rps_peft_refuses(tiny, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    get_peft_model(tiny(), config("delta")).save_pretrained(tmp_path / "adapter")
    script = """
        import sys
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "base"), str(tmp_path / "adapter")]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "KeyError: 'RPS'" in child.stderr


# ---- bad input


def snapshot(model):
    return {name: (type(module), id(module)) for name, module in model.named_modules()}, {
        name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()
    }


def unchanged(model, before):
    modules, parameters = before
    assert snapshot(model)[0] == modules
    for name, p in model.named_parameters():
        assert p.requires_grad == parameters[name][1]
        equal(p, parameters[name][0])


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (None, {"target_modules": ["embed_tokens"]}, "matches 'model.embed_tokens', which is a Embedding"),
        (None, {"target_modules": ["nothing"]}, "nothing"),
        (None, {"exclude_modules": r".*"}, "no module of LlamaForCausalLM is left"),
        ("nan", {}, "'model.layers.0.mlp.up_proj' holds values that are not finite"),
        ("meta", {}, "meta device"),
        ("name", {}, "attribute 'rps' of its own"),
        ("compressed", {}, "is compressed already"),
    ],
)
def test_a_refused_config_changes_nothing(tiny, spoil, settings, message):
    model = tiny()
    if spoil == "nan":
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    if spoil == "meta":
        model.model.layers[0].mlp.up_proj.to("meta")
    if spoil == "name":
        model.rps = nn.Linear(2, 2)
    if spoil == "compressed":
        get_rps_model(model, RPSConfig(ratio=0.5))
    modules = snapshot(model)[0]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config("delta", **settings))
    assert snapshot(model)[0] == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("mode", MODES)
def test_modes_and_methods_do_not_mix(tiny, ids, mode):
    model = get_peft_model(tiny(), config(mode)).eval()
    expected = logits(model, ids)
    other = "delta" if mode == "replace" else "replace"
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"carries the adapter 'default' of mode='{mode}'"):
        model.add_adapter("other", config(other))
    unchanged(model, before)
    with pytest.raises(ValueError, match=r"LORA|same type"):
        model.add_adapter("other", LoraConfig(target_modules=["up_proj"]))
    assert set(model.peft_config) == {"default"}
    equal(logits(model, ids), expected)


def test_replace_mode_says_what_it_cannot_do(tiny, ids):
    model = get_peft_model(tiny(), config("replace")).eval()
    with model.disable_adapter(), pytest.raises(ValueError, match="no model without them to run"):
        logits(model, ids)
    assert logits(model, ids).isfinite().all()
    with pytest.raises(ValueError, match="nothing to unload to; merge_and_unload"):
        model.unload()
    assert logits(model, ids).isfinite().all()
    model.add_adapter("other", config("replace"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="only one RPS adapter can replace a weight"):
        logits(model, ids)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.delete_adapter("other")
    with pytest.raises(ValueError, match=r"freed.*load one"):
        logits(model.base_model.model, ids)
    with pytest.raises(ValueError, match="nothing to start from"):
        model.add_adapter("third", config("replace"))


def test_a_deleted_replacement_can_be_loaded_again(tiny, ids, tmp_path):
    model = get_peft_model(tiny(), config("replace")).eval()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    equal(logits(model, ids), expected)


def test_files_of_different_adapters_do_not_load_together(tiny, tmp_path):
    """Same size, other seed: only the map's name in the file tells."""
    for seed in (0, 1):
        get_peft_model(tiny(), config("delta", seed=seed)).save_pretrained(tmp_path / str(seed))
    (tmp_path / "0" / "adapter_config.json").write_text((tmp_path / "1" / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="are of different adapters"):
        PeftModel.from_pretrained(tiny(), tmp_path / "0")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # its report names rps.rps_map
        tiny().load_adapter(str(tmp_path / "0"))
    other = get_peft_model(tiny(), config("delta", seed=1))
    with pytest.raises(ValueError, match="read in the wrong places"):
        set_peft_model_state_dict(other, get_peft_model_state_dict(get_peft_model(tiny(), config("delta"))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "'model.layers.2.self_attn.q_proj', but LlamaForCausalLM has no such"),
        ({"intermediate_size": 96}, r"shape \(104, 48\), but in LlamaForCausalLM it has shape \(96, 48\)"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_of_another_model(tiny, tmp_path, mode, changes, message):
    get_peft_model(tiny(), config(mode)).save_pretrained(tmp_path)
    model = tiny(**changes)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, tmp_path)
    unchanged(model, before)


def test_an_edited_config(tiny, tmp_path):
    get_peft_model(tiny(), config("delta")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"seed": 5}))
    with pytest.raises(ValueError, match=r"records the map .* seed=5.* restore its adapter_config.json"):
        PeftModel.from_pretrained(tiny(), tmp_path)
    file.write_text(json.dumps(fields | {"modules": ["nonsense"]}))
    with pytest.raises(ValueError, match="'nonsense' is not of the form"):
        PeftModel.from_pretrained(tiny(), tmp_path)


def test_a_compressed_model_is_not_made_by_the_wrong_door(tiny):
    with pytest.raises(ValueError, match=r"mode='delta'.*get_peft_model"):
        get_rps_model(tiny(), RPSConfig(mode="delta"))
    model = get_peft_model(tiny(), config("replace"))
    with pytest.raises(ValueError, match=r"carries PEFT adapters.*merge_and_unload"):
        get_rps_model(model.base_model.model, RPSConfig())
    with pytest.raises(ValueError, match=r"carries PEFT adapters.*merge_and_unload"):
        to_dense(model)
    with pytest.raises(ValueError, match=r"carries PEFT adapters.*print_trainable_parameters"):
        size_report(model)


def test_data_parallel_is_refused(tiny):
    layer = next(iter(layers(get_peft_model(tiny(), config("delta"))).values()))
    with pytest.raises(RuntimeError, match="one process per GPU"):
        layer._replicate_for_data_parallel()
