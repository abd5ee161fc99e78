"""A state dict says which map its shared array belongs to, through everything that carries one."""

import copy
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from checkpoints import equal
from peft import get_peft_model
from peft_adapters import MODES, config
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_rps import RPSConfig, get_rps_config, get_rps_model, to_dense
from hf_rps.conversion import find_bank


@pytest.fixture
def pair(tiny):
    """Two models that differ in the seed of their maps only."""
    return [get_rps_model(tiny("llama"), RPSConfig(ratio=0.2, seed=seed)) for seed in (0, 1)]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def maps(*models):
    """What an error must name: both maps, and the remedy."""
    names = ".*".join(find_bank(model).weight_map.fingerprint[:12] for model in models)
    return rf"(?s){names}.*get_rps_config"


def load_saved(source, target, folder):
    torch.save(source.state_dict(), folder / "state.pt")
    target.load_state_dict(torch.load(folder / "state.pt"))


def load_not_strict(source, target, folder):
    target.load_state_dict(source.state_dict(), strict=False)


def load_assigned(source, target, folder):
    target.load_state_dict(source.state_dict(), assign=True)


def load_averaged(source, target, folder):
    averaged = AveragedModel(source)
    averaged.update_parameters(source)
    target.load_state_dict({name.removeprefix("module."): t for name, t in averaged.state_dict().items()}, strict=False)


def load_into_average(source, target, folder):
    average = AveragedModel(target)
    average.load_state_dict(AveragedModel(source).state_dict())
    target.load_state_dict(average.module.state_dict())


def load_accelerate(source, target, folder):
    one, two = Accelerator(cpu=True), Accelerator(cpu=True)
    one.prepare(source)
    one.save_state(folder / "state")
    two.prepare(target)
    two.load_state(folder / "state")


def load_distributed(source, target, folder):
    set_model_state_dict(target, get_model_state_dict(source))


def load_distributed_whole(source, target, folder):
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(target, get_model_state_dict(source, options=options), options=options)


def load_safetensors(source, target, folder):
    save_model(source, str(folder / "model.safetensors"))
    load_model(target, str(folder / "model.safetensors"), strict=False)


def load_wrapped(source, target, folder):
    nn.Sequential(target).load_state_dict(nn.Sequential(source).state_dict())


CARRIERS = [
    load_saved, load_not_strict, load_assigned, load_averaged, load_into_average, load_accelerate, load_distributed,
    load_distributed_whole, load_safetensors, load_wrapped,
]  # fmt: skip


@pytest.mark.parametrize("carry", CARRIERS)
def test_another_map_is_refused_and_both_are_named(pair, tmp_path, carry):
    source, target = pair
    with pytest.raises(RuntimeError, match=maps(source, target)):
        carry(source, target, tmp_path)


@pytest.mark.parametrize("carry", CARRIERS)
def test_the_same_map_loads(pair, tiny, ids, tmp_path, carry):
    source, _ = pair
    with torch.no_grad():
        find_bank(source).psi.mul_(1.5)
    fresh = tiny("llama", initializer_range=0.05)  # whose own standard deviations would give another map
    target = get_rps_model(fresh, get_rps_config(source))
    assert find_bank(target).weight_map.fingerprint == find_bank(source).weight_map.fingerprint
    carry(source, target, tmp_path)
    equal(logits(target, ids), logits(source, ids))


def test_the_same_config_on_other_weights_is_another_map(tiny):
    """The standard deviations that go into the map are measured on the weights at hand."""
    one = get_rps_model(tiny("llama"), RPSConfig(ratio=0.2))
    two = get_rps_model(tiny("llama", initializer_range=0.05), RPSConfig(ratio=0.2))
    with pytest.raises(RuntimeError, match=maps(one, two)):
        two.load_state_dict(one.state_dict())


def test_distributed_checkpoint_of_another_map(pair, ids, tmp_path):
    source, target = pair
    before = logits(target, ids)
    dcp.save(source.state_dict(), checkpoint_id=tmp_path / "state", no_dist=True)
    with pytest.raises(BaseException, match=find_bank(target).psi_name):
        dcp.load(target.state_dict(), checkpoint_id=tmp_path / "state", no_dist=True)
    equal(logits(target, ids), before)


def test_from_pretrained_with_a_state_dict(pair, ids, tmp_path):
    source, other = pair
    source.save_pretrained(tmp_path)
    recorded = AutoConfig.from_pretrained(tmp_path)
    loaded = type(source).from_pretrained(None, config=recorded, state_dict=source.state_dict())
    equal(logits(loaded, ids), logits(source, ids))
    with pytest.raises(ValueError, match=maps(other, source)):
        type(source).from_pretrained(None, config=recorded, state_dict=other.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_adapters(tiny, ids, mode):
    one, two = (get_peft_model(tiny(), config(mode, seed=seed)) for seed in (0, 1))
    psi = [next(n for n, _ in model.named_parameters() if "psi_" in n).rpartition("_")[2] for model in (one, two)]
    with pytest.raises(RuntimeError, match="(?s)" + ".*".join(psi)):
        two.load_state_dict(one.state_dict())
    three = get_peft_model(tiny(), config(mode, seed=0))
    three.load_state_dict(one.state_dict())
    equal(logits(three, ids), logits(one, ids))


def test_resuming_a_trainer_with_another_map(pair, tiny, tmp_path):
    source, _ = pair
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    options = {"max_steps": 1, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    Trainer(source, TrainingArguments(tmp_path / "a", **options), train_dataset=data).train()
    other = get_rps_model(tiny("llama"), RPSConfig(ratio=0.2, seed=1))
    options["max_steps"] = 2
    with pytest.raises(RuntimeError, match=maps(source, other)):
        Trainer(other, TrainingArguments(tmp_path / "b", **options), train_dataset=data).train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1")
        )


def test_a_config_that_records_the_map_survives_its_file(pair, tiny, ids, tmp_path):
    source, _ = pair
    get_rps_config(source).save_pretrained(tmp_path)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    target = get_rps_model(tiny("llama", initializer_range=0.05), RPSConfig.from_pretrained(tmp_path))
    target.load_state_dict(torch.load(tmp_path / "state.pt"))
    equal(logits(target, ids), logits(source, ids))
    assert not (tmp_path / "README.md").exists()  # which would speak of an adapter


def test_what_a_recorded_config_refuses(pair, tiny):
    source, _ = pair
    recorded = get_rps_config(source)
    with pytest.raises(ValueError, match="has shape"):
        get_rps_model(tiny("llama", intermediate_size=96), copy.deepcopy(recorded))
    with pytest.raises(ValueError, match="has none of them"):
        get_rps_model(tiny("gpt2"), copy.deepcopy(recorded))
    recorded.seed = 7
    with pytest.raises(ValueError, match="records the map"):
        get_rps_model(tiny("llama"), recorded)
    with pytest.raises(ValueError, match="no shared array"):
        get_rps_config(tiny("llama"))


def legacy(folder, state):
    """Rewrite a checkpoint as format 2 had it."""
    file = folder / "config.json"
    changed = json.loads(file.read_text())
    changed["quantization_config"]["format_version"] = 2
    file.write_text(json.dumps(changed))
    return {("model.rps.psi" if "rps.psi_" in name else name): tensor for name, tensor in state.items()}


def test_state_dicts_of_the_older_format(pair, ids, tmp_path):
    """Its array has no map in its name: the empty tensor that checkpoints have beside it tells, or nothing does."""
    source, other = pair
    with torch.no_grad():
        find_bank(source).psi.mul_(1.5)
    source.save_pretrained(tmp_path)
    state = legacy(tmp_path, load_file(tmp_path / "model.safetensors"))
    target = copy.deepcopy(source)
    with torch.no_grad():
        find_bank(target).psi.zero_()
    target.load_state_dict(state)
    equal(logits(target, ids), logits(source, ids))
    with pytest.raises(RuntimeError, match=r"another map"):
        other.load_state_dict(state)
    bare = {name: tensor for name, tensor in state.items() if tensor.numel()}
    with pytest.raises(RuntimeError, match="does not name its map"):
        target.load_state_dict(bare)
    loaded = type(source).from_pretrained(None, config=AutoConfig.from_pretrained(tmp_path), state_dict=dict(bare))
    equal(logits(loaded, ids), logits(source, ids))  # here the config tells


def test_checkpoints_of_the_older_format_load_and_are_saved_in_the_new_one(pair, ids, tmp_path):
    source, _ = pair
    source.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as reader:
        metadata = reader.metadata() | {"rps_format_version": "2"}
    save_file(legacy(tmp_path, load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", metadata)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    equal(logits(loaded, ids), logits(source, ids))
    loaded.save_pretrained(tmp_path / "new")
    recorded = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert recorded["format_version"] == 3
    assert any("rps.psi_" in name for name in load_file(tmp_path / "new" / "model.safetensors"))
    equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), ids), logits(source, ids))


def test_plain_modules(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return self.b(self.a(x))

    torch.manual_seed(0)
    one = get_rps_model(Net(), RPSConfig(ratio=0.5))
    get_rps_config(one).save_pretrained(tmp_path)
    two = get_rps_model(Net(), RPSConfig.from_pretrained(tmp_path))
    x = torch.randn(2, 8)
    assert not torch.equal(one(x), two(x))
    two.load_state_dict(one.state_dict())
    equal(two(x), one(x))
    equal(to_dense(two)(x), to_dense(one)(x))
