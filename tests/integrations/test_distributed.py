"""Two gloo processes agree with one: DDP (also with checkpointing) and FSDP2, gradients and parameters after steps.

For compressed models ("native", "learned") and for PEFT models with an RPS adapter ("replace", "delta", "codebooks").
Then: the bytes that DDP reduces.
"""

import pytest
import torch
from processes import run_processes

from hf_rps import RPSConfig, get_rps_model, size_report
from hf_rps.conversion import find_bank

FORMS = ["ddp", "ddp checkpoint", "ddp static checkpoint reentrant", "fsdp", "fsdp reshard", "fsdp reshard checkpoint"]
MODES = ["native", "learned", "replace", "delta", "codebooks"]
SCRIPT = """
    from peft import get_peft_model
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM
    from hf_rps import RPSConfig, get_rps_model
    from ways import read

    mode, way, out, *forms = sys.argv[1:]
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    def train(form):
        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                             vocab_size=50)
        base = LlamaForCausalLM(config)
        if mode == "native":
            model = get_rps_model(base, RPSConfig(ratio=0.15))
        elif mode == "learned":
            model = get_rps_model(base, RPSConfig(mapping="codebook", bits=3))
        elif mode == "codebooks":
            base = get_rps_model(base, RPSConfig(mapping="codebook", bits=3))
            model = get_peft_model(base, RPSConfig(mapping="codebook"))
        else:
            model = get_peft_model(base, RPSConfig(ratio=0.15, mode=mode))
        read(model, way)
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
        adapters = base.adapters_rps if mode == "codebooks" else None if model is base else base.rps
        psi = base.model.rps.psi if adapters is None else adapters.rps_banks["default"].psi
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
    os._exit(0)
"""


def run(tmp_path, mode, forms, processes, check=True, way="views"):
    out = tmp_path / f"{mode}-{processes}.pt"
    errors = run_processes(tmp_path, SCRIPT, [mode, way, out, *forms], processes, check)
    return torch.load(out) if check else errors


@pytest.fixture(scope="module", params=[*((mode, "views") for mode in MODES), (MODES[0], "made")], ids=" ".join)
def results(request, tmp_path_factory):
    """What one process gives, and by form what two give; by views and, once, by made weights."""
    (mode, way), folder = request.param, tmp_path_factory.mktemp("results")
    alone = run(folder, mode, ["plain"], 1, way=way)["plain"]
    return alone, run(folder, mode, FORMS, 2, way=way)


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
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.1))
    model(ids, labels=ids).loss.backward()
    reduced = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    assert reduced == size_report(model).parameters
    assert find_bank(model).psi.grad.shape == (size_report(model).m,)


BYTES = """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM
    from hf_rps import RPSConfig, get_rps_model, size_report

    dist.init_process_group("gloo")
    reports = []
    for ratio in (None, 1.0, 0.1, 0.01):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=104, num_hidden_layers=3,
                                             num_attention_heads=4, vocab_size=97))
        if ratio is not None:
            get_rps_model(model, RPSConfig(ratio=ratio))
        wrapped, reduced = DistributedDataParallel(model), []

        def count(state, bucket):
            reduced.append(bucket.buffer().numel() * bucket.buffer().element_size())
            return allreduce_hook(None, bucket)

        wrapped.register_comm_hook(None, count)
        for _ in range(2):
            wrapped(input_ids=torch.ones(1, 9, dtype=torch.long), labels=torch.ones(1, 9, dtype=torch.long)
                    ).loss.backward()
        report = size_report(model)
        reports.append((sum(reduced), report.n, report.m, report.parameters))
    if dist.get_rank() == 0:
        torch.save(reports, sys.argv[1])
    dist.barrier()
    os._exit(0)
"""


def test_bytes_that_ddp_reduces_in_a_step(tmp_path):
    """What the communication hook gets is the ratio of the targeted bytes, and all that is not compressed."""
    run_processes(tmp_path, BYTES, [tmp_path / "out.pt"], 2)
    (dense, *_), *compressed = torch.load(tmp_path / "out.pt")
    for ratio, (reduced, n, m, parameters) in zip((1.0, 0.1, 0.01), compressed, strict=True):
        assert reduced == 2 * 4 * parameters  # two steps of float32
        assert dense - reduced == 2 * 4 * (n - m)
        assert m == pytest.approx(ratio * n, rel=0.02)
