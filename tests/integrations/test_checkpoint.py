"""The native checkpoint: compact, and bit-equal after reload through every door."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from checkpoints import equal, rewrite
from forks import forks
from paths import environment
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
)
from ways import read

from hf_rps import RPSConfig, get_rps_model, size_report
from hf_rps.conversion import find_bank


@pytest.mark.parametrize("way", ["views", "made"])
def test_in_a_fresh_process(saved, ids, way):
    """Bit for bit, whichever way the weights are read."""
    model, folder = saved
    torch.save(read(model, way)(ids).logits, folder / "logits.pt")
    code = f"""
        import sys, torch, hf_rps
        from transformers import AutoModelForCausalLM
        from ways import read
        folder = {str(folder)!r}
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(folder)
        logits = read(model, {way!r})(torch.arange(18).view(2, 9) * 5 % 97).logits
        assert torch.equal(logits, torch.load(folder + "/logits.pt")), "logits differ"
    """
    code = textwrap.dedent(code)
    if way == "views":  # an interpreter that shares nothing with this one, not even what was imported
        subprocess.run([sys.executable, "-c", code], check=True, env=environment(HF_HUB_OFFLINE="1"))
    else:
        child = forks().run_code(code, [], folder.parent)
        assert child.returncode == 0, child.stderr


def test_size(saved):
    model, folder = saved
    size = (folder / "model.safetensors").stat().st_size
    assert size <= 1.01 * size_report(model).bytes + 4096  # the header; 1 % of these few numbers would not hold it
    with safe_open(folder / "model.safetensors", framework="pt") as reader:
        assert sum(".rps.psi_" in key for key in reader.keys()) == 1  # noqa: SIM118 (not a dict)


@pytest.mark.slow
def test_size_of_a_model_of_real_shape(tiny, tmp_path):
    model = tiny("llama", hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
    get_rps_model(model, RPSConfig(ratio=0.1)).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 1.01 * size_report(model).bytes


def test_quantization_config_in_config_json(saved):
    config = json.loads((saved[1] / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["ratio"], config["seed"]) == ("rps", 0.1, 3)
    assert config["n"] == find_bank(saved[0]).weight_map.n
    assert AutoConfig.from_pretrained(saved[1]).quantization_config["quant_method"] == "rps"


def test_equal_models_are_saved_as_equal_checkpoints(saved, tmp_path):
    model, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    equal(load_file(tmp_path / "again" / "model.safetensors"), load_file(folder / "model.safetensors"))
    headers = []
    for path in (folder, tmp_path / "again"):
        with safe_open(path / "model.safetensors", framework="pt") as reader:
            headers.append(reader.metadata())
    assert headers[0] == headers[1]  # the library writes them in no fixed order
    equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict(), model.state_dict())


def test_shards(saved, tmp_path, ids):
    model, _ = saved
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    equal(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_dtype(saved, ids, dtype):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = copy.deepcopy(model)
    for parameter in expected.parameters() if dtype != "auto" else ():  # not buffers, as from_pretrained does
        parameter.data = parameter.data.to(dtype)
    assert find_bank(loaded).psi.dtype == find_bank(expected).psi.dtype
    equal(loaded(ids).logits, expected(ids).logits)
    loaded.float()


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"},
                   {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
                    "lm_head": "cpu"}])  # fmt: skip
def test_device_map(saved, ids, device_map):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("bank", ["cpu", "disk"])
def test_disk_offload(saved, ids, tmp_path, bank):
    model, folder = saved
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                  "model.layers.2": "disk", "model.norm": "disk", "model.rotary_emb": "cpu", "model.rps": bank,
                  "lm_head": "disk"}  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "options", [{"sharing": "block"}, {"mapping": "roast"}, {"mapping": "hash", "sign": "element"}, {"sign": "none"},
                {"grad_scaling": "norm"}, {"ratio": 1}])  # fmt: skip
def test_every_option_survives(tiny, ids, tmp_path, options):
    model = get_rps_model(tiny("gpt2"), RPSConfig(**options))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    equal(loaded(ids).logits, model(ids).logits)
    assert find_bank(loaded).grad_scaling == find_bank(model).grad_scaling
    for m in (model, loaded):
        m(ids, labels=ids).loss.backward()
    equal(find_bank(loaded).psi.grad, find_bank(model).psi.grad)


def test_deepcopy_pickle_and_load_state_dict(saved, ids, tiny):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        equal(twin(ids).logits, model(ids).logits)
        assert find_bank(twin) is not find_bank(loaded)
        twin.load_state_dict(model.state_dict(), strict=True)
    other = get_rps_model(tiny("llama"), RPSConfig(ratio=0.1, seed=3))
    other.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    equal(other.eval()(ids).logits, model(ids).logits)


def test_a_missing_bias(tmp_path, tiny):
    """Refused by every class where another layer has it; zero, as transformers has it, where no layer had one."""
    model = get_rps_model(tiny("bert", AutoModel), RPSConfig(ratio=0.2))
    model.save_pretrained(tmp_path)
    key = "encoder.layer.0.intermediate.dense.bias"
    rewrite(tmp_path, lambda t: t.pop(key), listed=True)
    for load, prefix in ((AutoModel, ""), (AutoModelForSequenceClassification, "bert.")):
        with pytest.raises(ValueError, match=f"no tensor for {prefix + key!r}, 1 such in all"):
            load.from_pretrained(tmp_path)
    get_rps_model(tiny("llama"), RPSConfig(ratio=0.2)).save_pretrained(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", attention_bias=True)
    assert not model.model.layers[0].self_attn.q_proj.bias.any()


def test_every_layer_must_be_in_the_file(saved, tmp_path):
    """A config that was changed to more layers would get them dense and at random."""
    _, folder = saved
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 2 * config["num_hidden_layers"]}))
    with pytest.raises(ValueError, match=r"no tensor for 'model\.layers\.3.* in config\.json"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"])
def test_a_damaged_name_in_the_file(saved, key):
    """As one flipped bit in the header makes it: the tensor would be drawn anew, and the file's own ignored."""
    _, folder = saved
    damaged = key[:-1] + chr(ord(key[-1]) ^ 1)
    rewrite(folder, lambda tensors: tensors.update({damaged: tensors.pop(key)}), listed=True)
    with pytest.raises(ValueError, match=f"no tensor for {key!r}.*one for {damaged!r}.*file is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_part_that_was_left_out_may_be_added(tmp_path):
    """A pooler that the saved model was built without is new, as in a dense model, and said to be so."""
    config = BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=61)
    get_rps_model(BertModel(config, add_pooling_layer=False), RPSConfig(ratio=0.5)).save_pretrained(tmp_path)
    assert BertModel.from_pretrained(tmp_path).pooler is not None
    assert BertModel.from_pretrained(tmp_path, add_pooling_layer=False).pooler is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("init_std", 5), ("modules", 5), ("modules", [5]), ("modules", True), ("unused_modules", "x"), ("ratio", "x")],
)
def test_a_field_of_the_wrong_type(saved, field, value):
    _, folder = saved
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"RPSConfig|quantization_config|fingerprint|recorded module"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_loading_allocates_no_dense_weight(tmp_path):
    """A 150M-parameter Llama at ratio 0.05, file mapping off: the peak stays at the compressed size and a little."""
    code = """
        import ctypes, gc, json, sys, torch, hf_rps
        from transformers import AutoModelForCausalLM, LlamaConfig
        from transformers.models.llama import modeling_llama
        folder, form = sys.argv[1:]
        if form in ("save", "save dense"):
            config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=11, num_attention_heads=16,
                                 vocab_size=8192)
            model = AutoModelForCausalLM.from_config(config)
            assert 1.45e8 < sum(p.numel() for p in model.parameters()) < 1.7e8
            if form == "save":
                hf_rps.get_rps_model(model, hf_rps.RPSConfig(ratio=0.05))
            model.save_pretrained(folder)
            sys.exit()
        status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1024
        before = status("VmRSS")
        if form == "capped":
            import resource
            limit = int((status("VmData") + 400) * 2**20)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        open("/proc/self/clear_refs", "w").write("5")
        AutoModelForCausalLM.from_pretrained(folder, disable_mmap=True)
        print(json.dumps(status("VmHWM") - before))
    """
    script = tmp_path / "load.py"
    script.write_text(textwrap.dedent(code))

    def run(folder, form):
        command = [sys.executable, str(script), str(tmp_path / folder), form]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"))

    run("small", "save")
    run("dense", "save dense")
    small, dense = (float(run(folder, "peak").stdout.splitlines()[-1]) for folder in ("small", "dense"))
    run("small", "capped")
    size = (tmp_path / "small" / "model.safetensors").stat().st_size / 2**20
    assert small < 2 * size + 60 < 0.3 * dense, (small, size, dense)
    print(f"load peak {small:.0f} MiB, dense {dense:.0f} MiB, file {size:.0f} MiB")
