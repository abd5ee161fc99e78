"""An RPS adapter that is saved and loaded, merged or unloaded is the same; without hf_rps, PEFT refuses it."""

import subprocess
import sys
import textwrap

import pytest
import torch
from paths import environment
from peft import PeftModel, get_model_status, get_peft_model
from peft_adapters import MODES, config, equal, layers, logits, psi
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


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
