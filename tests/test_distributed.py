"""Two gloo processes agree with one: DDP (also with checkpointing) and FSDP2, gradients and parameters after steps.

For compressed models ("native") and for PEFT models with an RPS adapter ("replace", "delta").
"""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

from hf_rps.convert import find_bank

FORMS = ["ddp", "ddp checkpoint", "ddp static checkpoint reentrant", "fsdp", "fsdp reshard", "fsdp reshard checkpoint"]
MODES = ["native", "replace", "delta"]
SCRIPT = """
    import os, sys, torch, torch.distributed as dist
    from peft import get_peft_model
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM
    from hf_rps import RPSConfig, get_rps_model

    mode, out, *forms = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    def train(form):
        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                             vocab_size=50)
        base = LlamaForCausalLM(config)
        if mode == "native":
            model = get_rps_model(base, RPSConfig(ratio=0.15))
        else:
            model = get_peft_model(base, RPSConfig(ratio=0.15, mode=mode))
        wrapped = model
        if "checkpoint" in form:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": "reentrant" in form})
            if "reentrant" in form:
                base.enable_input_require_grads()
        if form.startswith("ddp"):
            wrapped = DistributedDataParallel(model, static_graph="static" in form)
        if form.startswith("fsdp"):
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            mesh = init_device_mesh("cpu", (world,))
            reshard = "reshard" in form
            for layer in base.model.layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
            fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        psi = base.model.rps.psi if mode == "native" else base.rps.rps_psi["default"]
        optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        data = torch.arange(4 * 9).view(4, 9) * 7 % 50
        gradients = []
        for step in range(3):
            batch = ((data + step) % 50)[rank * (4 // world):(rank + 1) * (4 // world)]
            wrapped(input_ids=batch, labels=batch).loss.backward()
            gradient = psi.grad
            gradients.append((gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone())
            optimizer.step()
            optimizer.zero_grad()
        state = model.state_dict()
        return gradients, {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone()
                           for k, v in state.items()}

    results = {form: train(form) for form in forms}
    if rank == 0:
        torch.save(results, out)
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that is already done, with any model
"""


def run(tmp_path, mode, forms, processes, check=True):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / f"{mode}-{processes}.pt"
    children = [
        subprocess.Popen(
            [sys.executable, str(script), mode, str(out), *forms], stderr=subprocess.PIPE, text=True,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank),
                              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
        for rank in range(processes)
    ]  # fmt: skip
    errors = [child.communicate(timeout=180)[1] for child in children]
    if check:
        assert all(child.returncode == 0 for child in children), errors[0]
        return torch.load(out)
    return errors


@pytest.fixture(scope="module", params=MODES)
def results(request, tmp_path_factory):
    """What one process gives, and by form what two give."""
    folder = tmp_path_factory.mktemp(request.param)
    return run(folder, request.param, ["plain"], 1)["plain"], run(folder, request.param, FORMS, 2)


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_agree_with_one(results, form):
    (expected_gradients, expected_state), together = results
    gradients, state = together[form]
    assert all(gradient.abs().max() > 0 for gradient in expected_gradients)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_ddp_with_reentrant_checkpointing_and_no_static_graph_raises(tmp_path, mode):
    """Torch itself is silently wrong here if psi is the only trained parameter."""
    assert any(
        "static_graph=True" in error for error in run(tmp_path, mode, ["ddp checkpoint reentrant"], 2, check=False)
    )


def test_the_reduced_gradient_is_of_m_numbers(tiny, ids):
    from hf_rps import RPSConfig, get_rps_model, size_report

    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.1))
    model(ids, labels=ids).loss.backward()
    reduced = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    assert reduced == size_report(model).parameters
    assert find_bank(model).psi.grad.shape == (size_report(model).m,)
