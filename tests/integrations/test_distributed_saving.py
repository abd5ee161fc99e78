"""What is saved where the model is sharded, or the caller brings its state, is the model: whole, and once."""

import copy
import json
import pickle
import weakref

import pytest
import torch
from processes import run_processes
from safetensors import safe_open
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from hf_rps import RPSConfig, get_rps_model, size_report
from hf_rps.conversion import find_bank

SAVING = """
    import transformers
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from hf_rps import RPSConfig, get_rps_model

    out, *options = sys.argv[1:]
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    policy = {"mesh": mesh}
    if "mixed" in options:
        policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    if "offload" in options:
        policy["offload_policy"] = CPUOffloadPolicy(pin_memory=False)

    def shard(model):
        for layer in model.model.layers:
            fully_shard(layer, **policy)
        return fully_shard(model, **policy)

    def gather(model):  # as accelerator.get_state_dict does: whole on rank 0, empty elsewhere
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def train(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        batch = torch.arange(18).view(2, 9) * 5 % 97
        for _ in range(2):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=48, intermediate_size=104, num_hidden_layers=3,
                                      num_attention_heads=4, vocab_size=97, tie_word_embeddings="tied" in options)
    model = shard(get_rps_model(transformers.LlamaForCausalLM(config), RPSConfig(ratio=0.1)))
    train(model)
    model.save_pretrained(out + "/every", is_main_process=rank == 0)
    state = gather(model)
    if rank == 0:
        model.save_pretrained(out + "/main", state_dict=state)  # the other process takes no part
    model.save_pretrained(out + "/both", is_main_process=rank == 0, state_dict=state)
    dist.barrier()

    load = transformers.AutoModelForCausalLM.from_pretrained
    native = load(out + "/every", distributed_config=transformers.distributed.DistributedConfig(fsdp_size=2))
    native.save_pretrained(out + "/native", is_main_process=rank == 0)
    again = shard(load(out + "/every"))
    train(again)
    train(model)
    if rank == 0:
        torch.save(state, out + "/state.pt")
    torch.save([gather(model), gather(again)], f"{out}/trained-{rank}.pt")
    dist.barrier()
    os._exit(0)
"""


@pytest.mark.parametrize("options", [[], ["tied", "mixed", "offload"]], ids=" ".join)
def test_saving_a_sharded_model(tmp_path, options):
    run_processes(tmp_path, SAVING, [tmp_path, *options], 2)
    state = torch.load(tmp_path / "state.pt")
    ids = set()
    for name in ("every", "main", "both", "native"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(loaded.state_dict(), state, rtol=0, atol=0)
        loaded.save_pretrained(tmp_path / f"{name} whole")
        for folder in (name, f"{name} whole"):
            config = json.loads((tmp_path / folder / "config.json").read_text())
            ids.add(config["quantization_config"]["save_id"])
    assert len(ids) == 1
    trained, loaded_and_trained = torch.load(tmp_path / "trained-0.pt")
    psi = next(name for name in state if "rps.psi_" in name)
    assert not torch.equal(trained[psi], state[psi])
    torch.testing.assert_close(loaded_and_trained, trained, rtol=0, atol=0)  # a checkpoint loads and shards


@pytest.fixture
def compressed(tiny):
    return get_rps_model(tiny("llama"), RPSConfig(ratio=0.1))


def test_the_given_state_dict_is_saved(compressed, tmp_path):
    """transformers itself drops the argument where a model has a quantizer."""
    state = {name: tensor + 1 for name, tensor in compressed.state_dict().items()}
    compressed.save_pretrained(tmp_path, state_dict=state)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), state, rtol=0, atol=0)
    compressed.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), compressed.state_dict(), rtol=0, atol=0)


def test_a_process_that_is_not_the_main_one_writes_nothing(compressed, tmp_path):
    compressed.save_pretrained(tmp_path, is_main_process=False)
    compressed.save_pretrained(tmp_path, is_main_process=False, state_dict={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [lambda psi: None, lambda psi: psi[:7]], ids=["missing", "a part"])
def test_a_state_dict_without_the_whole_array_is_refused(compressed, tmp_path, change):
    state = compressed.state_dict()
    key = next(name for name in state if "rps.psi_" in name)
    psi = change(state.pop(key))
    if psi is not None:
        state[key] = psi
    with pytest.raises(ValueError, match=rf"state_dict must hold the whole shared array {key} of shape"):
        compressed.save_pretrained(tmp_path, state_dict=state)
    compressed.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tied_copies_in_a_state_dict_are_saved_once(tiny, tmp_path):
    model = get_rps_model(tiny("gpt2"), RPSConfig(ratio=0.1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), state, rtol=0, atol=0)


def test_copies_save_themselves_and_nothing_keeps_a_model_alive(compressed, tmp_path):
    for twin in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
        with torch.no_grad():
            find_bank(twin).psi.add_(1)
        twin.save_pretrained(tmp_path)
        twin.model.save_pretrained(tmp_path / "base")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded.state_dict(), twin.state_dict(), rtol=0, atol=0)
    alive = weakref.ref(twin)
    del twin
    assert alive() is None  # without the garbage collector: its memory is wanted now


def test_a_model_that_nobody_holds_saves_itself(tiny, tmp_path):
    get_rps_model(tiny("llama"), RPSConfig(ratio=0.1)).save_pretrained(tmp_path)
    assert size_report(AutoModelForCausalLM.from_pretrained(tmp_path)).m > 0


def test_the_stand_in_for_a_weight_keeps_its_name_in_wrapped_layers(compressed, tmp_path):
    """accelerate's activation checkpointing wraps the layers, which changes the names of modules, not of parameters."""
    for i, layer in enumerate(compressed.model.layers):
        compressed.model.layers[i] = checkpoint_wrapper(layer)
    compressed.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as reader:
        assert "model.layers.0.self_attn.q_proj.weight" in set(reader.keys())
    AutoModelForCausalLM.from_pretrained(tmp_path)
