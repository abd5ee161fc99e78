"""torch.jit.trace, and the ONNX exporter that is made of it."""

import io

import pytest
import torch
import transformers
from networks import Network, inputs
from peft import get_peft_model
from torch import nn

from hf_rps import RPSConfig, get_rps_model
from hf_rps.conversion import find_bank


class Logits(nn.Module):
    """A transformers model as a function of one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


@pytest.mark.parametrize("options", [{"ratio": 0.2}, {"mapping": "hash", "sign": "element"}, {"kind": "convolution"}])
def test_a_traced_layer_computes_what_the_layer_does(options):
    network = Network(dtype=torch.float32, **options).eval()
    x = inputs(torch.float32).detach()
    with torch.no_grad():
        traced = torch.jit.trace(network, (x,))
        for batch in (x, torch.cat([x, 2 * x])):
            torch.testing.assert_close(traced(batch), network(batch))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_traced_model_takes_any_number_of_tokens_and_reads_the_array_anew(tiny, ids, kind):
    """The choice among products depends on the number of tokens, and must not be recorded."""
    model = tiny(kind, transformers.AutoModelForMaskedLM) if kind == "bert" else tiny(kind, use_cache=False)
    model = Logits(get_rps_model(model, RPSConfig(ratio=0.1)))
    with torch.no_grad():
        traced = torch.jit.trace(model, (ids,))
        for batch in (ids, ids.repeat(8, 1), ids.repeat(8, 1) % 31):
            torch.testing.assert_close(traced(batch), model(batch))
        find_bank(model).psi.mul_(1.5)
        torch.testing.assert_close(traced(ids), model(ids))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(ids), model(ids))


def test_tracing_a_pass_that_is_to_be_trained_is_refused(tiny, ids):
    """The gradient of the array would not be divided."""
    model = Logits(get_rps_model(tiny("gpt2", use_cache=False), RPSConfig(ratio=0.1)))
    with pytest.raises(RuntimeError, match=r"for inference only: trace it under torch\.no_grad\(\)"):
        torch.jit.trace(model, (ids,))
    with torch.no_grad():
        traced = torch.jit.trace(model, (ids,))
    traced(ids).sum().backward()
    assert find_bank(model).psi.grad is None
    model.requires_grad_(False)
    torch.testing.assert_close(torch.jit.trace(model, (ids,))(ids), model(ids))


def native(tiny):
    return get_rps_model(tiny("gpt2", use_cache=False), RPSConfig(ratio=0.1))


def adapted(tiny):
    return get_peft_model(tiny("gpt2", use_cache=False), RPSConfig(ratio=0.1, mode="delta"))


@pytest.mark.parametrize("make", [native, adapted])
def test_the_exporter_made_of_tracing_is_refused(tiny, ids, tmp_path, make):
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"dynamo=False\)\) can't export.*Pass dynamo=True"):
        torch.onnx.export(Logits(make(tiny)), (ids,), tmp_path / "model.onnx", dynamo=False)


def test_the_other_exporter_writes_the_array_once(tiny, ids, tmp_path):
    pytest.importorskip("onnxscript")
    model = native(tiny)
    torch.onnx.export(Logits(model), (ids,), tmp_path / "model.onnx", dynamo=True)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert written < 400_000 + 4 * sum(parameter.numel() for parameter in model.parameters())
