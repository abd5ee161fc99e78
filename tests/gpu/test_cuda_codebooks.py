"""Learned maps on a GPU: the Triton kernels beside torch's gather, and models trained, saved, compiled and captured.

HF_RPS_TEST_DEVICE=cpu runs those that a CPU can run there.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from codebook_matrices import keep, matrix_of, psi_of
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
from torch import nn
from transformers import AutoModelForCausalLM

from hf_rps import RPSConfig, get_rps_model, size_report, to_dense
from hf_rps.conversion import find_bank
from hf_rps.mappings.base import SharedMatrix, Span
from hf_rps.mappings.codebook import BITS, CodebookMatrix
from hf_rps.mappings.codes import unpack
from hf_rps.products.base import Made, choose, products_of
from hf_rps.products.triton import launch
from hf_rps.products.triton.codebook import TritonCodebookProduct, TritonCodebooks

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]


def model_of(bits=4, dtype=torch.float32, kind="llama", **options):
    """With 8 bits, of which a codebook has 256 numbers, only rows longer than that are compressed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=dtype)
    if bits == 8:
        options["target_modules"] = ["down_proj"]
    return get_rps_model(model, RPSConfig(mapping="codebook", bits=bits, **options))


def codes_of(model):
    return {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}


@only_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "cols", "group"), [(768, 3072, None), (520, 1000, 128), (77, 99, 24)])
def test_triton_is_chosen_and_equals_torch(rows, cols, group, bits, dtype):
    matrix = matrix_of(rows, cols, bits, group, device=DEVICE)
    psi, products, faster = psi_of(matrix, dtype, DEVICE), products_of(matrix), TritonCodebooks()
    weight, bias = matrix.weight(psi), torch.randn(rows, device=DEVICE).to(dtype)
    assert faster.make(matrix, psi).equal(weight)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for tokens in (1, 2, 16, 17):
        x = torch.randn(tokens, cols, device=DEVICE).to(dtype)
        product = choose(products, x)
        assert isinstance(product, TritonCodebookProduct if tokens <= 16 else Made)
        for _ in range(2):  # the second time by the remembered launch
            y = product.linear(x, psi, bias)
            assert distance(y, F.linear(x.double(), weight.double(), bias.double())) < tolerance
    for kind in (torch.float32, dtype):
        into, gradient = torch.randn(len(psi), device=DEVICE), torch.randn(rows, cols, device=DEVICE).to(kind)
        expected, again = into.double(), into.clone()
        SharedMatrix.add_adjoint(matrix, expected, gradient.double())
        assert faster.add_adjoint(matrix, into, gradient)
        assert distance(into, expected) < 1e-5
        assert faster.add_adjoint(matrix, again, gradient)
        assert again.equal(into)
    assert not launch._failures


@only_cuda
def test_more_than_2_to_the_31_weights():
    rows, cols = 2**16 + 3, 2**15 + 40
    matrix = CodebookMatrix(Span(0, rows, cols), 2, cols, 0)
    keep(matrix, torch.randint(0, 256, (rows, cols // 4), dtype=torch.uint8, device=DEVICE))
    psi, x = torch.randn(matrix.size, device=DEVICE).bfloat16(), torch.randn(2, cols, device=DEVICE).bfloat16()
    last = unpack(matrix.codes[-5:], cols, 2).long()
    expected = matrix.books(psi)[-5:].gather(1, last)
    weight = TritonCodebooks().make(matrix, psi)
    assert weight[-5:].equal(expected)
    for tokens in (1, 2):
        y = TritonCodebookProduct(matrix).linear(x[:tokens], psi, None)
        assert distance(y[:, -5:], x[:tokens].double() @ expected.double().t()) < 1e-2
    into = torch.zeros(matrix.size, device=DEVICE)
    assert TritonCodebooks().add_adjoint(matrix, into, weight)
    sums = torch.zeros(5, 4, device=DEVICE, dtype=torch.float64).scatter_add_(1, last, expected.double())
    assert distance(matrix.books(into)[-5:], sums) < 1e-5
    assert not launch._failures


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", [
    *({"bits": bits} for bits in BITS[:3]), {"bits": 4, "tile": 2}, {"bits": 4, "tile": 3},
    {"bits": 3, "share_embeddings": True}, {"bits": 4, "tile": 2, "share_embeddings": True},
])  # fmt: skip
def test_float32_equals_the_cpu(options, kind):
    model = model_of(kind=kind, **options)
    loss, gradients = loss_and_gradients(model, DEVICE)
    expected_loss, expected = loss_and_gradients(model, "cpu")
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert gradients.keys() == expected.keys()
    assert all(distance(gradients[name], expected[name]) < 1e-3 for name in expected)
    assert not launch._failures


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 4, "group_size": 64}, {"bits": 4, "tile": 2}])
def test_learned_on_the_gpu_as_well_as_on_the_cpu(options):
    """Sums in another order may choose another code here and there; what the layers give out is as close."""
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    batches = [{"input_ids": (ids(4, 64) * factor) % 251} for factor in (1, 3)]

    @torch.no_grad()
    def error(device):
        model = copy.deepcopy(dense).to(device)
        get_rps_model(model, RPSConfig(mapping="codebook", **options), calibration=batches)
        assert find_bank(model).psi.device.type == torch.device(device).type
        model.cpu()
        return distance(model(**batches[0]).logits, dense(**batches[0]).logits)

    assert error(DEVICE) == pytest.approx(error("cpu"), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_autocast_with_gradient_checkpointing(bits, dtype):
    model = model_of(bits).to(DEVICE).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    codes, losses = codes_of(model), []
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        with torch.autocast(DEVICE, dtype):
            loss = model(input_ids=ids().to(DEVICE), labels=ids().to(DEVICE), use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert find_bank(model).psi.dtype == torch.float32
    assert codes
    assert all(p.equal(codes[name]) for name, p in model.named_parameters() if name in codes)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing(reentrant):
    model = model_of(3, group_size=64)
    _, expected = loss_and_gradients(model, DEVICE)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, gradients = loss_and_gradients(model, DEVICE, use_cache=False)
    assert all(distance(gradients[name], expected[name]) < 1e-4 for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_reload_is_bit_equal(tmp_path, bits, dtype):
    model = model_of(bits, dtype).to(DEVICE).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map=DEVICE).eval()
    assert size_report(again) == replace(size_report(model), init_weights=None)  # a checkpoint does not say that
    for batch in (ids(1, 1), ids()):  # few tokens, and many
        assert torch.equal(again(batch.to(DEVICE)).logits, model(batch.to(DEVICE)).logits)


@pytest.mark.parametrize("bits", [3, 4])  # codes that cross bytes, and that do not
def test_compiled_inference_and_training(bits):
    check_compiled(model_of(bits).to(DEVICE))


@only_cuda
@pytest.mark.parametrize("tokens", [1, 24])
@torch.no_grad()
def test_a_pass_can_be_captured(tokens):
    check_captured(model_of(4).to(DEVICE).eval(), ids(1, tokens))


@torch.no_grad()
def test_half_precision_is_as_close_as_made_weights():
    """Decoding from codes in half precision is no further from float32 than the dense weights' product."""
    model = model_of(4)
    dense = to_dense(copy.deepcopy(model))
    batch = ids(1, 4).to(DEVICE)

    def error(model, dtype):
        exact, rounded = copy.deepcopy(model).to(DEVICE), copy.deepcopy(model).to(DEVICE, dtype)
        return distance(rounded(batch).logits.float(), exact(batch).logits)

    for dtype in (torch.bfloat16, torch.float16):
        assert error(model, dtype) < 2 * error(dense, dtype) + 1e-3
