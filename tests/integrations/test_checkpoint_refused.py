"""A checkpoint that does not fit, was changed, or was cut short in saving is refused and never half loaded."""

import json
import shutil

import pytest
import torch
from checkpoints import edit_config, equal, rewrite
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers import auto as quantizers

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank
from hf_rps.integrations.transformers.keys import psi_key
from hf_rps.integrations.transformers.quantization_config import GUARD


def test_load_state_dict_of_another_map_is_refused(saved, tiny):
    file = saved[1] / "model.safetensors"
    for other in (get_rps_model(tiny("llama"), RPSConfig(ratio=0.1, seed=4)),):  # same m, other places
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="another map"):
                other.load_state_dict(load_file(file), strict=strict)
    dense = tiny("llama").state_dict()
    with pytest.raises(RuntimeError, match="dense weight"):
        get_rps_model(tiny("llama"), RPSConfig(ratio=0.1)).load_state_dict(dense, strict=False)


@pytest.fixture
def without_hf_rps(monkeypatch):
    monkeypatch.delitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "rps")


@pytest.mark.parametrize("load", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}, {"use_safetensors": True}])
def test_a_reader_without_hf_rps_gets_an_error(saved, without_hf_rps, load, options):
    """Also with the flag that the example scripts of transformers have."""
    with pytest.raises(OSError, match="import-hf_rps-before-loading"):
        load.from_pretrained(saved[1], **options)


def test_a_reader_without_hf_rps_of_an_older_checkpoint(saved, without_hf_rps):
    """Without the name of files that don't exist the empty tensor in place of a weight stops a reader."""
    file = saved[1] / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("transformers_weights") == GUARD
    file.write_text(json.dumps(config))
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(saved[1])


def test_the_guard_is_in_files_only(saved, ids, tmp_path):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for config in (model.config, loaded.config):
        assert not hasattr(config, "transformers_weights")
        assert "transformers_weights" not in config.to_dict()
    read = AutoConfig.from_pretrained(folder)  # a config that was read by itself has it
    assert read.transformers_weights == GUARD
    again = AutoModelForCausalLM.from_pretrained(folder, config=read)
    equal(again(ids).logits, loaded(ids).logits)
    equal(AutoModelForCausalLM.from_pretrained(folder, config=loaded.config)(ids).logits, loaded(ids).logits)
    fresh = to_dense(AutoModelForCausalLM.from_config(read))
    fresh.save_pretrained(tmp_path / "dense")
    assert "transformers_weights" not in (tmp_path / "dense" / "config.json").read_text()
    equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(ids).logits, fresh.eval()(ids).logits)


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
    model, folder = saved
    whole = (folder / "model.safetensors").read_bytes()
    key = psi_key(model, find_bank(model))

    def without_psi(tensors):
        del tensors[key]

    rewrite(folder, without_psi)
    refused(folder, "tensors")
    rewrite(folder, metadata=lambda m: m.update(rps_tensors=str(int(m["rps_tensors"]) - 1)))
    refused(folder, "rps.psi")
    for value in (float("nan"), float("inf")):
        (folder / "model.safetensors").write_bytes(whole)
        rewrite(folder, lambda t, value=value: t[key].view(-1)[5:6].fill_(value), listed=True)
        refused(folder, "not finite", "rps.psi")
    (folder / "model.safetensors").write_bytes(whole)
    rewrite(folder, lambda t: t.update({key: t[key][:-8].clone()}))
    refused(folder, "rps.psi", f"({find_bank(model).weight_map.m},)")


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
