"""The native checkpoint: compact, bit-equal after reload through every door, refused when anything does not fit."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from forks import forks
from paths import environment
from processes import AS_LARGE
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.quantizers import auto as quantizers

from hf_rps import RPSConfig, get_rps_model, mapping, size_report, to_dense
from hf_rps.convert import find_bank
from hf_rps.layers import RPSLinear


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture
def saved(tiny, tmp_path):
    """A compressed Llama that was trained a little, and the folder it was saved to."""
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.1, seed=3))
    with torch.no_grad():
        find_bank(model).psi.mul_(1.5)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


def rewrite(folder, change=lambda tensors: None, metadata=lambda metadata: None):
    """Write the weights file again with changed tensors or metadata."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as reader:
        kept = reader.metadata()
    tensors = load_file(file)
    change(tensors)
    metadata(kept)
    save_file(tensors, file, metadata=kept)


# ---- what must work


@pytest.mark.parametrize("large", [True, False])
def test_in_a_fresh_process(saved, ids, large, monkeypatch):
    """Bit for bit, whichever way the weights are read."""
    model, folder = saved
    if not large:
        monkeypatch.setattr(mapping, "UNFOLD_UP_TO", 1 << 20)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert find_bank(model).weight_map.unfolds
    torch.save(model(ids).logits, folder / "logits.pt")
    code = f"""
        import sys, torch, hf_rps
        from transformers import AutoModelForCausalLM
        folder = {str(folder)!r}
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(folder)
        logits = model(torch.arange(18).view(2, 9) * 5 % 97).logits
        assert torch.equal(logits, torch.load(folder + "/logits.pt")), "logits differ"
    """
    code = (AS_LARGE if large else "") + textwrap.dedent(code)
    if large:  # an interpreter that shares nothing with this one, not even what was imported
        subprocess.run([sys.executable, "-c", code], check=True, env=environment(HF_HUB_OFFLINE="1"))
    else:
        child = forks().run_code(code, [], folder.parent)
        assert child.returncode == 0, child.stderr


def test_size(saved):
    model, folder = saved
    size = (folder / "model.safetensors").stat().st_size
    assert size <= 1.01 * size_report(model).bytes + 4096  # the header; 1 % of these few numbers would not hold it
    with safe_open(folder / "model.safetensors", framework="pt") as reader:
        assert sum(key.endswith("psi") for key in reader.keys()) == 1  # noqa: SIM118 (not a dict)


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


def test_head_to_base_to_head(saved, ids, tmp_path):
    model, folder = saved
    base = AutoModel.from_pretrained(folder)
    equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    equal(back.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    model.model.save_pretrained(tmp_path / "part")
    equal(AutoModel.from_pretrained(tmp_path / "part")(ids).last_hidden_state, base(ids).last_hidden_state)


def test_a_head_class_without_the_pooler_and_its_own_checkpoint(tiny, ids, tmp_path):
    model = get_rps_model(tiny("bert", AutoModelForSequenceClassification), RPSConfig(ratio=0.2))
    model.save_pretrained(tmp_path / "a")
    masked = AutoModelForMaskedLM.from_pretrained(tmp_path / "a")
    equal(masked.bert(ids).last_hidden_state, model.bert(ids).last_hidden_state)
    masked.save_pretrained(tmp_path / "b")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "b")
    equal(again(ids).logits, masked(ids).logits)
    pooled = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    equal(pooled.bert.pooler.dense.dense_weight(), model.bert.pooler.dense.dense_weight())  # psi still holds it
    equal(pooled.bert(ids).last_hidden_state, model.bert(ids).last_hidden_state)


def test_explicit_targets_in_a_head(tiny, ids, tmp_path):
    model = tiny("bert", AutoModelForMaskedLM)
    get_rps_model(model, RPSConfig(ratio=0.2, target_modules=["query", "transform.dense"]))
    assert isinstance(model.cls.predictions.transform.dense, RPSLinear)
    model.save_pretrained(tmp_path)
    equal(AutoModelForMaskedLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


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


def test_load_state_dict_of_another_map_is_refused(saved, tiny):
    file = saved[1] / "model.safetensors"
    for other in (get_rps_model(tiny("llama"), RPSConfig(ratio=0.1, seed=4)),):  # same m, other places
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="another map"):
                other.load_state_dict(load_file(file), strict=strict)
    dense = tiny("llama").state_dict()
    with pytest.raises(RuntimeError, match="dense weight"):
        get_rps_model(tiny("llama"), RPSConfig(ratio=0.1)).load_state_dict(dense, strict=False)


def test_generate_with_a_cache(saved, ids):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    tokens = loaded.generate(ids, **options)
    equal(tokens, to_dense(copy.deepcopy(model)).generate(ids, **options))
    equal(tokens, loaded.generate(ids, use_cache=False, **options))


def test_pipeline(saved):
    from transformers import ByT5Tokenizer

    model, folder = saved
    tokenizer = ByT5Tokenizer(extra_ids=0)
    model = get_rps_model(to_dense(model), RPSConfig(ratio=0.5))
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert pipeline("text-generation", model=str(folder), max_new_tokens=3)("hello")[0]["generated_text"].startswith(
        "hello"
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(saved, ids, reentrant):
    _, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder).train()
    loaded(ids, labels=ids).loss.backward()
    expected = find_bank(loaded).psi.grad.clone()
    loaded.zero_grad()
    loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        loaded.enable_input_require_grads()
    loaded(ids, labels=ids).loss.backward()
    torch.testing.assert_close(find_bank(loaded).psi.grad, expected)


def test_dense_checkpoint_with_a_quantization_config(tiny, ids, tmp_path):
    dense = tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=RPSConfig(ratio=1))
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=RPSConfig(ratio=0.1))
    assert find_bank(model).weight_map.ratio == 0.1
    model.save_pretrained(tmp_path / "small")
    equal(AutoModelForCausalLM.from_pretrained(tmp_path / "small")(ids).logits, model(ids).logits)
    assert model.train()(ids, labels=ids).loss.requires_grad


def test_dequantize_is_to_dense(saved, ids):
    model, folder = saved
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert find_bank(dense) is None
    torch.testing.assert_close(dense(ids).logits, model(ids).logits)
    dense.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)


def test_a_missing_bias_is_zero(saved, tmp_path, tiny, ids):
    model = get_rps_model(tiny("bert", AutoModel), RPSConfig(ratio=0.2))
    model.save_pretrained(tmp_path)
    key = "encoder.layer.0.intermediate.dense.bias"
    rewrite(tmp_path, lambda t: t.pop(key), lambda m: m.update(rps_tensors=str(int(m["rps_tensors"]) - 1)))
    assert not AutoModel.from_pretrained(tmp_path).get_parameter(key).any()


def trainer(model, folder, **options):
    data = [{"input_ids": torch.arange(i, i + 8) % 97, "labels": torch.arange(i, i + 8) % 97} for i in range(16)]
    arguments = {"per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True,
                 "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2,
                 "logging_steps": 100}  # fmt: skip
    return Trainer(
        model, TrainingArguments(str(folder), **(arguments | options)), train_dataset=data, eval_dataset=data
    )


def test_trainer_resumes(tiny, tmp_path):
    full = trainer(get_rps_model(tiny("llama"), RPSConfig(ratio=0.2)), tmp_path / "full", max_steps=6)
    full.train()
    trainer(get_rps_model(tiny("llama"), RPSConfig(ratio=0.2)), tmp_path / "part", max_steps=4).train()
    resumed = trainer(get_rps_model(tiny("llama"), RPSConfig(ratio=0.2)), tmp_path / "part", max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(resumed.model.state_dict(), full.model.state_dict(), rtol=1e-4, atol=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "checkpoint-6")
    equal(loaded.state_dict(), full.model.state_dict())


def test_trainer_loads_the_best_model(tiny, tmp_path):
    run = trainer(get_rps_model(tiny("llama"), RPSConfig(ratio=0.2)), tmp_path, max_steps=6, eval_strategy="steps",
                  eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss")  # fmt: skip
    run.train()
    best = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    equal(best.state_dict(), run.model.state_dict())
    assert isinstance(run.model.model.layers[0].mlp.up_proj, RPSLinear)


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


# ---- what must be refused


@pytest.fixture
def without_hf_rps(monkeypatch):
    monkeypatch.delitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "rps")


@pytest.mark.parametrize("load", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
def test_a_reader_without_hf_rps_gets_an_error(saved, without_hf_rps, load):
    with pytest.raises(RuntimeError):
        load.from_pretrained(saved[1])


def refused(folder, *parts, error=ValueError):
    with pytest.raises(error) as raised:
        AutoModelForCausalLM.from_pretrained(folder)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"n": 1}, "n is 1"), ({"m": 77}, "m is 77"), ({"seed": 4}, "seed=4"), ({"ratio": 0.11}, "ratio=0.11"),
     ({"fingerprint": "0" * 32}, "fingerprint"), ({"format_version": 1}, "format_version=1"),
     ({"sharing": "block"}, "sharing='block'"), ({"sign": "none"}, "sign='none'"), ({"modules": None}, "modules"),
     ({"modules": ["x 3 std"]}, "x 3 std"), ({"colour": "red"}, "colour"), ({"save_id": "f" * 32}, "save_id"),
     ({"ratio": 7}, "ratio=7")],
)  # fmt: skip
def test_a_changed_config_is_refused(saved, changes, field):
    edit_config(saved[1], **changes)
    refused(saved[1], field)


def test_a_map_that_fits_itself_but_not_the_weights_is_refused(saved, tiny, tmp_path):
    other = get_rps_model(tiny("llama"), RPSConfig(ratio=0.1, seed=4))  # the same m
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", saved[1] / "config.json")
    refused(saved[1], "rps_fingerprint", "model.safetensors")


def test_a_changed_architecture_is_refused(saved):
    file = saved[1] / "config.json"
    original = json.loads(file.read_text())
    for changes, part in (({"num_hidden_layers": 2}, "layers.2.self_attn.q_proj"),
                          ({"intermediate_size": 96}, "(104, 48)"),
                          ({"model_type": "gpt2", "n_layer": 2}, "layers.0.self_attn.q_proj")):  # fmt: skip
        file.write_text(json.dumps(original | changes))
        refused(saved[1], part)


def test_foreign_weights_are_refused(saved, tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    shutil.copy(tmp_path / "dense" / "model.safetensors", saved[1] / "model.safetensors")
    refused(saved[1], "not written by hf_rps")


def test_missing_or_bad_psi_is_refused(saved):
    _, folder = saved
    whole = (folder / "model.safetensors").read_bytes()

    def without_psi(tensors):
        del tensors["model.rps.psi"]

    rewrite(folder, without_psi)
    refused(folder, "tensors")
    rewrite(folder, metadata=lambda m: m.update(rps_tensors=str(int(m["rps_tensors"]) - 1)))
    refused(folder, "rps.psi")
    for value in (float("nan"), float("inf")):
        (folder / "model.safetensors").write_bytes(whole)
        rewrite(folder, lambda t, value=value: t["model.rps.psi"].view(-1)[5:6].fill_(value))
        refused(folder, "not finite", "rps.psi")
    (folder / "model.safetensors").write_bytes(whole)
    rewrite(folder, lambda t: t.update({"model.rps.psi": t["model.rps.psi"][:-8].clone()}))
    refused(folder, "rps.psi", f"({find_bank(saved[0]).weight_map.m},)")


def test_a_truncated_file_is_refused(saved):
    file = saved[1] / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(saved[1], "model.safetensors", "truncated")


@pytest.mark.parametrize("existing", [False, True], ids=["new folder", "over an old checkpoint"])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_save_interrupted_at_any_point_is_never_half_loaded(tiny, tmp_path, existing, shards, ids):
    """Files are written in the order of their time stamps; stop before each, and in the middle of each."""
    size = {"max_shard_size": "8KB" if shards else "1GB"}
    old, new = (get_rps_model(tiny("llama"), RPSConfig(ratio=0.1)) for _ in range(2))
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.5)
    old.save_pretrained(tmp_path / "old", **size)
    new.save_pretrained(tmp_path / "new", **size)
    order = sorted((tmp_path / "new").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert order[0].name == "config.json"
    loads = 0
    for done in range(len(order) + 1):
        for part in (0.0, 0.5):
            folder = tmp_path / "cut"
            shutil.rmtree(folder, ignore_errors=True)
            if existing:
                shutil.copytree(tmp_path / "old", folder)
            else:
                folder.mkdir()
            for file in order[:done]:
                shutil.copy(file, folder)
            if done < len(order) and part:
                content = order[done].read_bytes()
                (folder / order[done].name).write_bytes(content[: int(part * len(content))])
            try:
                model = AutoModelForCausalLM.from_pretrained(folder)
            except (ValueError, OSError):
                continue
            loads += 1
            equal(model.state_dict(), (old if done == 0 else new).state_dict())
    assert loads >= 1
