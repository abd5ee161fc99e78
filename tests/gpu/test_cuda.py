"""What only a GPU can show: the same numbers as on the CPU, in every precision, compiled, captured and reloaded.

HF_RPS_TEST_DEVICE=cpu runs those that a CPU can run there, to see that the tests themselves are sound.
"""

import copy
from dataclasses import replace

import pytest
import torch
from gpu_models import (
    CONFIGS,
    DEVICE,
    check_captured,
    check_compiled,
    distance,
    ids,
    loss_and_gradients,
    only_cuda,
)
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from hf_rps import RPSConfig, get_rps_model, size_report, to_dense
from hf_rps.layers.linear import RPSLinear
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.products.base import Made, always, choose
from hf_rps.products.triton import launch
from hf_rps.products.triton.product import TritonProduct
from hf_rps.psi.bank import Bank

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]
RATIOS = [1.0, 0.5, 0.1, 0.01]


def model_of(kind="llama", dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=dtype)
    return get_rps_model(model, RPSConfig(**({"ratio": 0.1} | options)))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_float32_equals_the_cpu(kind, ratio):
    model = model_of(kind, ratio=ratio)
    loss, gradients = loss_and_gradients(model, DEVICE)
    expected_loss, expected = loss_and_gradients(model, "cpu")
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert distance(gradient, expected[name]) < 1e-3, name


@pytest.mark.parametrize("options", [
    {"mapping": "hash", "sign": "element"}, {"mapping": "roast"}, {"sharing": "block"}, {"sharing": "module"},
    {"sign": "none", "grad_scaling": "none"}, {"grad_scaling": "norm"}, {"input_fold": 4}, {"input_fold": "full"},
    {"share_embeddings": True},
])  # fmt: skip
def test_every_map_equals_the_cpu(options):
    model = model_of(**options)
    _, gradients = loss_and_gradients(model, DEVICE)
    _, expected = loss_and_gradients(model, "cpu")
    assert all(distance(gradients[name], expected[name]) < 1e-3 for name in expected)


@pytest.mark.parametrize("options", [*({"ratio": ratio} for ratio in RATIOS), {"input_fold": "full"}])
@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_is_as_close_as_the_dense_model(kind, options):
    """The error of the compressed model in bfloat16 against its float32 self, beside the dense model's."""
    model = model_of(kind, **options)
    dense = to_dense(copy.deepcopy(model))
    batch = ids().to(DEVICE)

    @torch.no_grad()
    def error(model):
        exact, rounded = copy.deepcopy(model).to(DEVICE), copy.deepcopy(model).to(DEVICE, torch.bfloat16)
        return distance(rounded(batch).logits.float(), exact(batch).logits)

    assert error(model) < 2 * error(dense) + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype):
    model = model_of().to(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        with torch.autocast(DEVICE, dtype):
            loss = model(input_ids=ids().to(DEVICE), labels=ids().to(DEVICE)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert model.model.rps.psi.dtype == torch.float32
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    plain = model_of()
    _, expected = loss_and_gradients(plain, DEVICE)
    model = model_of().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, gradients = loss_and_gradients(model, DEVICE, use_cache=False)
    assert all(distance(gradients[name], expected[name]) < 1e-4 for name in expected)


def test_checkpointing_of_a_layer_by_hand():
    model = model_of().to(DEVICE)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 256, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (gradient,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("mode", ["delta", "replace"])
def test_adapters_equal_the_cpu(mode):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    config = RPSConfig(ratio=0.05, mode=mode, init_weights=mode == "replace", grad_scaling="norm")
    model = get_peft_model(model, config)
    loss, gradients = loss_and_gradients(model, DEVICE)
    expected_loss, expected = loss_and_gradients(model, "cpu")
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert all(distance(gradients[name], expected[name]) < 1e-3 for name in expected)
    merged = copy.deepcopy(model).to(DEVICE).merge_and_unload()
    with torch.no_grad():
        expected = model.to(DEVICE)(input_ids=ids().to(DEVICE)).logits
        torch.testing.assert_close(merged(ids().to(DEVICE)).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"ratio": 0.1}, {"ratio": 0.01}, {"input_fold": "full"}])
def test_compiled_inference_and_training(options):
    check_compiled(model_of(**options).to(DEVICE))


@only_cuda
@pytest.mark.parametrize("options", [{"ratio": 0.1}, {"ratio": 0.01}, {"input_fold": "full"}])
@torch.no_grad()
def test_a_pass_can_be_captured(options):
    check_captured(model_of(**options).to(DEVICE).eval(), ids())


def layer_of(rows, cols, ratio, dtype):
    """A layer that is the second of three on one array, with random numbers."""
    torch.manual_seed(0)
    targets = [Target(name, rows, cols, 0.02) for name in "abc"]
    bank = Bank(WeightMap(targets, ratio=ratio), "none", device=DEVICE, dtype=dtype)
    nn.init.normal_(bank.psi)
    return RPSLinear("b", bank, nn.Linear(cols, rows, device=DEVICE, dtype=dtype))


@only_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.07])
@pytest.mark.parametrize(("rows", "cols"), [(768, 768), (3072, 768), (520, 3000), (77, 99)])
def test_triton_is_chosen_and_equals_made_weights(rows, cols, ratio, dtype):
    layer = layer_of(rows, cols, ratio, dtype)
    array, exact = layer.bank.array, layer.dense_weight().double()
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for tokens in (1, 2, 5, 16, 17, 300):
        x = torch.randn(tokens, cols, device=DEVICE, dtype=dtype, requires_grad=True)
        assert isinstance(choose(layer.shared.products, x), TritonProduct)
        found = {}
        for name, choice in {"triton": choose, "made": always(Made)}.items():
            array.choose = choice
            y = layer(x)
            (y.float().square().sum() / rows).backward()
            found[name] = [y.detach(), x.grad, layer.bank.psi.grad, layer.bias.grad]
            x.grad = layer.bank.psi.grad = layer.bias.grad = None
        for one, other in zip(found["triton"], found["made"], strict=True):
            assert one.dtype == other.dtype
            assert distance(one, other) < tolerance
        assert distance(found["triton"][0], x.detach().double() @ exact.t() + layer.bias.double()) < tolerance
    assert not launch._failures


@only_cuda
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_triton_in_a_graph(tokens):
    """Forward and backward pass of a layer, captured after a warm-up, follow new inputs and a new array."""
    layer = layer_of(768, 768, 0.3, torch.bfloat16)
    x = torch.randn(tokens, 768, device=DEVICE, dtype=torch.bfloat16)

    def step():
        inputs = x.detach().requires_grad_()
        y = layer(inputs)
        return y.detach(), *torch.autograd.grad(y.float().square().sum(), [inputs, layer.bank.psi, layer.bias])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        layer.bank.psi.copy_(torch.randn_like(layer.bank.psi))
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        torch.testing.assert_close(one, other)
    assert not launch._failures


@only_cuda
def test_a_step_waits_for_nothing():
    """No synchronisation in forward and backward pass: the CPU runs ahead of the GPU."""
    model = model_of().to(DEVICE)
    x = torch.randn(32, 256, device=DEVICE, requires_grad=True)
    layer = model.model.layers[0].mlp.up_proj
    layer(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_reload_is_bit_equal(tmp_path, dtype):
    model = model_of(dtype=dtype).to(DEVICE).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map=DEVICE).eval()
    assert size_report(again) == replace(size_report(model), init_weights=None)  # a checkpoint does not say that
    torch.testing.assert_close(again(ids().to(DEVICE)).logits, model(ids().to(DEVICE)).logits, rtol=0, atol=0)


@torch.no_grad()
def test_generate():
    model = model_of().to(DEVICE).eval()
    dense = to_dense(copy.deepcopy(model))
    prompt = ids(1, 8).to(DEVICE)
    arguments = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **arguments), dense.generate(prompt, **arguments))
