"""Networks whose convolutions share weights: in training, made dense, and in checkpoints."""

import copy
import subprocess
import sys
import textwrap
from contextlib import nullcontext

import pytest
import torch
from conversion_checks import (
    agrees_with_plain_reference,
    exact_at_ratio_one,
    plain_transformers_refuses,
    saves_and_loads,
)
from convolutional_models import RESNETS, pixels, resnet, vit
from model_outputs import equal, outputs
from paths import environment
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageClassification, ResNetConfig

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank
from hf_rps.layers.base import RPSLayer
from hf_rps.layers.convolution import RPSConv
from hf_rps.targets import find_targets
from studies.methods.magnitude import most_kept, prune_by_magnitude, remove_pruning


@pytest.mark.parametrize("case", RESNETS, ids=lambda case: case.name)
def test_architecture(case, tmp_path, monkeypatch):
    """The check of test_architectures.py, but that here all convolutions are shared."""
    dense, batch = case.build(), case.batch()
    convolutions = [name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d)]
    exact_at_ratio_one(dense, batch, outputs(dense, batch))
    model = get_rps_model(dense, RPSConfig(ratio=0.2))
    assert [name for name, module in model.named_modules() if isinstance(module, RPSConv)] == convolutions
    assert sum(isinstance(module, RPSLayer) for module in model.modules()) == len(convolutions)
    agrees_with_plain_reference(model, batch)
    saves_and_loads(case, model, batch, tmp_path)
    plain_transformers_refuses(case, tmp_path, monkeypatch)


def test_sgd_at_ratio_one_follows_the_dense_model():
    dense, model = resnet().double().train(), get_rps_model(resnet().double(), RPSConfig(ratio=1)).train()
    x, labels = pixels(torch.float64), torch.tensor([1, 3])
    torch.testing.assert_close(model(x).logits, dense(x).logits, rtol=1e-9, atol=1e-9)
    for m in (dense, model):
        m(pixel_values=x, labels=labels).loss.backward()
        torch.optim.SGD(m.parameters(), lr=0.1).step()
    expected = {name: value.detach() for name, value in dense.named_parameters()}
    found = {name: value.detach() for name, value in to_dense(model).named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_accumulation_counts_every_gradient_once():
    model, x = resnet(ratio=0.1).double(), pixels(torch.float64)
    psi = find_bank(model).psi
    each = [torch.autograd.grad(model(part).logits.square().sum(), psi)[0] for part in (x[:1], x[1:])]
    for part in (x[:1], x[1:]):
        model(part).logits.square().sum().backward()
    torch.testing.assert_close(psi.grad, each[0] + each[1])
    model.zero_grad()
    (model(x[:1]).logits.square().sum() + model(x[1:]).logits.square().sum()).backward()
    torch.testing.assert_close(psi.grad, each[0] + each[1])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_of_blocks(reentrant, autocast):
    model, x = resnet(ratio=0.1), pixels()
    psi, stages = find_bank(model).psi, model.resnet.encoder.stages
    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext()

    def gradient():
        model.zero_grad()
        with context:
            logits = model(x).logits
        logits.float().square().sum().backward()
        return psi.grad.clone()

    expected = gradient()
    for stage in stages:
        forward = stage.forward
        stage.forward = lambda hidden, forward=forward: checkpoint(forward, hidden, use_reentrant=reentrant)
    torch.testing.assert_close(gradient(), expected)


def test_deepcopy_reads_its_own_bank():
    model, x = resnet(ratio=0.1), pixels()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x).logits, model(x).logits, rtol=0, atol=0)
    twin(x).logits.sum().backward()
    assert find_bank(twin).psi.grad is not None
    assert find_bank(model).psi.grad is None


def test_compile_of_a_network():
    torch._dynamo.reset()
    model, x = resnet(ratio=0.2), pixels()
    expected = model(x).logits
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x).logits, expected)


def test_pruning_by_magnitude():
    model = resnet()
    weights = [candidate.module.weight.detach().clone() for candidate in find_targets(model, RPSConfig())]
    assert all(weight.ndim == 4 for weight in weights)
    kept = prune_by_magnitude(model, 0.25)
    remove_pruning(model)
    after = [candidate.module.weight for candidate in find_targets(model, RPSConfig())]
    assert sum(weight.count_nonzero().item() for weight in after) == kept
    assert kept == most_kept(0.25, sum(weight.numel() for weight in weights))


# ---- checkpoints


def test_in_a_fresh_process(tmp_path):
    model = resnet(ratio=0.1)
    model.save_pretrained(tmp_path)
    torch.save((pixels(), model(pixels()).logits), tmp_path / "expected.pt")
    code = f"""
        import torch, hf_rps
        from transformers import AutoModelForImageClassification
        torch.set_num_threads(1)
        model = AutoModelForImageClassification.from_pretrained({str(tmp_path)!r})
        x, expected = torch.load({str(tmp_path / "expected.pt")!r})
        assert torch.equal(model(x).logits, expected), "logits differ"
        assert sum(p.ndim == 4 for p in model.parameters()) == 0, "dense convolutions"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment(HF_HUB_OFFLINE="1"))


def test_wrong_maps_and_shapes_are_refused(tmp_path):
    model = resnet(ratio=0.1)
    model.save_pretrained(tmp_path)
    config = ResNetConfig.from_pretrained(tmp_path)
    config.hidden_sizes = [8, 24]
    message = r"stages\.1.*has shape \(16, 8\), but in ResNetForImageClassification it is \(24, 8\)"
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(tmp_path, config=config)
    other = resnet(ratio=0.1, seed=1)
    before = find_bank(other).psi.clone()
    dense = resnet().state_dict()
    with pytest.raises(RuntimeError, match="is a dense weight"):
        other.load_state_dict(dense, strict=False)
    assert torch.equal(find_bank(other).psi, before)


def test_a_convolution_of_another_kind_is_not_built_from_a_checkpoint(tmp_path, monkeypatch):
    resnet(ratio=0.1).save_pretrained(tmp_path)

    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

    monkeypatch.setattr("transformers.models.resnet.modeling_resnet.nn.Conv2d", Standardised)
    with pytest.raises(ValueError, match="it is Standardised"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_dense_checkpoint_is_compressed_while_loading(tmp_path):
    dense = resnet()
    dense.save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=RPSConfig(ratio=1))
    assert find_bank(model).weight_map.n == sum(p.numel() for p in dense.parameters() if p.ndim == 4)
    torch.testing.assert_close(model(pixels()).logits, dense(pixels()).logits)


def test_a_bias_that_the_checkpoint_lacks_is_zero(tmp_path):
    """The patch projection of a ViT, shared by name, has one."""
    model = get_rps_model(vit(), RPSConfig(target_modules=["projection", "value"], ratio=0.5))
    key = next(name for name in model.state_dict() if name.endswith("projection.bias"))
    layer = model.get_submodule(key.removesuffix(".bias"))
    assert isinstance(layer, RPSConv)
    layer.bias = None
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict()[key].abs().sum() == 0
    equal({key: loaded.state_dict()[key]}, {key: torch.zeros(32)})
