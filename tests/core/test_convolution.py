"""Convolutions that share weights: against the plain path, in networks, in checkpoints, and which of them are chosen.

What autograd does to one such layer among others is in test_layers.py, whose kinds of layers include it.
"""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from model_outputs import equal, outputs
from paths import environment
from peft import get_peft_model
from tiny_models import IMAGE, RESNET, VIT, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForImageClassification, ResNetConfig

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank
from hf_rps.initial import check_weight, initial_std
from hf_rps.layers.base import RPSLayer
from hf_rps.layers.convolution import RPSConv
from hf_rps.layers.kinds import Candidate, kind_of, shareable_kind
from hf_rps.mappings import definition
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.psi import sink
from hf_rps.psi.bank import Bank
from hf_rps.targets import find_targets
from studies.methods.magnitude import most_kept, prune_by_magnitude, remove_pruning

RESNETS = [
    tiny("resnet", "ResNetForImageClassification", "image", **RESNET, num_labels=5),
    tiny("resnet, bottlenecks", "ResNetForImageClassification", "image",
         **RESNET | {"layer_type": "bottleneck", "hidden_sizes": [16, 32]}, num_labels=5),
    tiny("mobilenet_v2", "MobileNetV2ForImageClassification", "image", num_labels=5, depth_multiplier=0.25,
         image_size=IMAGE, classifier_dropout_prob=0.0),
    tiny("regnet", "RegNetForImageClassification", "image", num_labels=5, embedding_size=8, hidden_sizes=[8, 16],
         depths=[1, 1], groups_width=4),
]  # fmt: skip

# arguments of a convolution: (in_channels, out_channels, kernel_size) and options, and the size of its input
SHAPES = {
    "plain": ((4, 6, 3), {}, (9, 8)),
    "stride": ((4, 6, 3), {"stride": 2, "padding": 1}, (9, 8)),
    "unequal": ((4, 6, (3, 2)), {"stride": (1, 3), "padding": (2, 0), "dilation": (2, 1)}, (9, 8)),
    "padding by name": ((4, 6, 3), {"padding": "same", "dilation": 2}, (9, 8)),
    "groups": ((4, 6, 3), {"groups": 2}, (9, 8)),
    "depthwise": ((5, 5, 3), {"groups": 5, "padding": 1}, (9, 8)),
    "pointwise": ((4, 6, 1), {}, (9, 8)),
    "patches": ((3, 6, 4), {"stride": 4}, (8, 8)),
    "reflect": ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (9, 8)),
    "circular": ((4, 6, 3), {"padding": (1, 0), "padding_mode": "circular"}, (9, 8)),
    "one dimension": ((4, 6, 3), {"padding": 1, "groups": 2}, (9,)),
    "three dimensions": ((2, 3, 2), {"stride": 2}, (4, 5, 4)),
}


def layer_of(shape, options, size, bias=True, dtype=torch.float64, ratio=0.3, **map_options):
    """One shared convolution over a bank of its own."""
    torch.manual_seed(0)
    dense = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)](*shape, **options, bias=bias).to(dtype)
    weight = Candidate("conv", dense, kind_of(dense)).weight
    weight_map = WeightMap([Target("conv", *weight.shape, std=0.3)], ratio=ratio, **map_options)
    bank = Bank(weight_map, "none", dtype=dtype)
    nn.init.normal_(bank.psi)
    return RPSConv("conv", bank, dense)


def reference(layer, x):
    """The convolution of the replaced class with the weight that is written out by definition."""
    weight = definition.weight(layer.bank.psi, layer.bank.weight_map, layer.name)
    return layer._shell._conv_forward(x, weight.view(layer.weight.shape), layer.bias)


def agrees(layer, x):
    """Output and all gradients of ``layer`` are those of the definition."""
    inputs = [x, layer.bank.psi, *([] if layer.bias is None else [layer.bias])]
    y, expected = layer(x), reference(layer, x)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, direction), torch.autograd.grad(expected, inputs, direction)
    )


def resnet(index=0, **options):
    model = RESNETS[index].build()
    return get_rps_model(model, RPSConfig(**options)) if options else model


def pixels(dtype=torch.float32):
    return torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0)).to(dtype)


# ---- one layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", SHAPES)
def test_output_and_gradients_follow_the_definition(case, bias):
    shape, options, size = SHAPES[case]
    layer = layer_of(shape, options, size, bias)
    x = torch.randn(2, shape[0], *size, dtype=torch.float64, requires_grad=True)
    agrees(layer, x)
    agrees(layer, x.detach()[0].requires_grad_())  # without a batch


@pytest.mark.parametrize("options", [{"mapping": "roast"}, {"mapping": "hash"}, {"sign": "element"}, {"sign": "none"}])
def test_other_maps(options):
    shape, conv, size = SHAPES["stride"]
    agrees(
        layer_of(shape, conv, size, **options),
        torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True),
    )


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3), per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)), kernel=st.integers(1, 3),
    stride=st.integers(1, 3), padding=st.integers(0, 2), dilation=st.integers(1, 2), dimensions=st.integers(1, 3),
    ratio=st.floats(0.01, 1), channels_last=st.booleans(),
)  # fmt: skip
def test_any_shape(groups, per_group, kernel, stride, padding, dilation, dimensions, ratio, channels_last):
    shape = (groups * per_group[0], groups * per_group[1], kernel)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    layer = layer_of(shape, options, (6,) * dimensions, ratio=ratio)
    x = torch.randn(2, shape[0], *(6,) * dimensions, dtype=torch.float64)
    if channels_last and dimensions == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    agrees(layer, x.requires_grad_())


def test_matrix_and_attributes():
    """The weight is row-major, whatever order it lies in, and what model code reads of a convolution is there."""
    dense = nn.Conv2d(3, 5, (2, 4), stride=2, padding=1, dilation=(1, 2), padding_mode="reflect")
    weight = dense.weight.detach().clone()
    dense = dense.to(memory_format=torch.channels_last)
    assert not dense.weight.is_contiguous()
    candidate = Candidate("conv", dense, kind_of(dense))
    assert torch.equal(candidate.weight, weight.view(5, 24))
    holder = nn.ModuleDict({"conv": dense})
    model = nn.Module()
    model.holder = holder
    get_rps_model(model, RPSConfig(ratio=1))
    layer = model.holder["conv"]
    assert isinstance(layer, RPSConv)
    torch.testing.assert_close(layer.dense_weight(), weight)
    assert (layer.weight.shape, layer.weight.ndim) == (weight.shape, 4)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(dense, name)
    assert "kernel_size=(2, 4)" in repr(layer)
    assert "padding_mode='reflect'" in repr(layer)


def test_weights_that_are_all_zero_or_not_finite():
    conv = nn.Conv2d(4, 8, 3)
    nn.init.zeros_(conv.weight)
    assert initial_std(Candidate("conv", conv, kind_of(conv)).weight) == pytest.approx(1 / 6, rel=1e-2)
    conv.weight.data[1, 2, 0, 1] = float("inf")
    with pytest.raises(ValueError, match="'conv' holds values that are not finite"):
        check_weight(Candidate("conv", conv, kind_of(conv)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    shape, options, size = SHAPES["stride"]
    layer = layer_of(shape, options, size, dtype=torch.float32)
    x = torch.randn(2, 4, *size, requires_grad=True)
    (layer(x).square().sum()).backward()
    expected = layer.bank.psi.grad.clone(), x.grad.clone(), layer.bias.grad.clone()
    layer.zero_grad()
    layer.bank.zero_grad()
    x.grad = None
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        assert layer(x.double()).dtype == dtype
    assert y.dtype == dtype
    y.float().square().sum().backward()
    found = layer.bank.psi.grad, x.grad, layer.bias.grad
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert (value - wanted).norm() < 0.02 * wanted.norm()


def test_gradients_of_a_bfloat16_model_are_summed_in_float32():
    """256 weights on a slot: sums in bfloat16 would be off by more."""
    layer = layer_of((32, 32, 3), {}, (8, 8), dtype=torch.float32, ratio=1 / 256)
    low = copy.deepcopy(layer).bfloat16()
    low.bank.psi.data = low.bank.psi.data.bfloat16()
    assert low.bank is not layer.bank
    x = torch.randn(2, 32, 8, 8).bfloat16()
    with torch.no_grad():
        layer.bank.psi.copy_(low.bank.psi)
        layer.bias.copy_(low.bias)
    layer(x.float()).square().sum().backward()
    low(x).float().square().sum().backward()
    assert low.bank.psi.grad.dtype == torch.bfloat16
    assert (low.bank.psi.grad.float() - layer.bank.psi.grad).norm() < 0.01 * layer.bank.psi.grad.norm()


def test_the_gradient_is_one_buffer_and_not_an_array_a_run(monkeypatch):
    """The plain path would add up an array of the size of psi for each of the many runs."""
    layer = layer_of((8, 16, 3), {}, (6, 6), ratio=0.05)
    made = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(sink.torch, "zeros_like", lambda *a, **k: made.append(1) or zeros_like(*a, **k))
    assert len(layer.shared.matrix.layout.runs) >= 20
    y = layer(torch.randn(1, 8, 6, 6, dtype=torch.float64))
    names = set()

    def collect(node):
        if node is not None and node.name() not in names:
            names.add(node.name())
            for parent, _ in node.next_functions:
                collect(parent)

    collect(y.grad_fn)
    assert any("SharedWeight" in name for name in names)
    assert not any("Cat" in name for name in names)
    y.sum().backward()
    assert made == [1]


def test_double_backward():
    shape, options, size = SHAPES["groups"]
    layer = layer_of(shape, options, size)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    found = []
    for function in (layer, lambda x: reference(layer, x)):
        gx, gpsi = torch.autograd.grad(function(x).pow(3).sum(), (x, layer.bank.psi), create_graph=True)
        found.append(torch.autograd.grad(gx.square().sum() + gpsi.square().sum(), (x, layer.bank.psi, layer.bias)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", ["stride", "reflect", "one dimension"])
def test_compile(case, backend):
    torch._dynamo.reset()
    shape, options, size = SHAPES[case]
    layer = layer_of(shape, options, size)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    results = []
    for function in (compiled, layer):
        y = function(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), layer.bank.psi)
        results.append((y, gradient))
    torch.testing.assert_close(*results)


def test_a_model_that_reads_the_weight_itself():
    shape, options, size = SHAPES["plain"]
    layer = layer_of(shape, options, size)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    by_hand = nn.functional.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(by_hand, layer(x))
    (gradient,) = torch.autograd.grad(by_hand.square().sum(), layer.bank.psi)
    torch.testing.assert_close(gradient, *torch.autograd.grad(layer(x).square().sum(), layer.bank.psi))


# ---- convolutional networks


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


# ---- what is chosen


def vit():
    return tiny("vit", "ViTForImageClassification", "image", "classifier", **VIT).build()


def test_default_of_a_transformer_leaves_its_patch_embedding_dense():
    model = get_rps_model(vit(), RPSConfig())
    assert isinstance(model.vit.embeddings.patch_embeddings.projection, nn.Conv2d)
    assert not any(isinstance(module, RPSConv) for module in model.modules())


def test_a_named_patch_embedding_is_shared_beside_linear_layers():
    dense = vit()
    expected = dense(pixels()).logits
    names = r".*\.(projection|fc1|fc2|[qkv]_proj|query|key|value|intermediate\.dense|output\.dense)"
    model = get_rps_model(dense, RPSConfig(ratio=1, target_modules=names))
    assert isinstance(model.vit.embeddings.patch_embeddings.projection, RPSConv)
    assert len(find_bank(model).weight_map.targets) > 4
    torch.testing.assert_close(model(pixels()).logits, expected)
    model(pixels()).logits.sum().backward()
    to_dense(model)
    torch.testing.assert_close(model(pixels()).logits, expected)


def test_selection_in_a_convolutional_network():
    count = len(find_targets(resnet(), RPSConfig()))
    assert len(find_targets(resnet(), RPSConfig(exclude_modules=["shortcut.convolution"]))) == count - 1
    assert len(find_targets(resnet(), RPSConfig(target_modules=["shortcut.convolution"]))) == 1
    assert len(find_targets(AutoModel.from_config(resnet().config), RPSConfig())) == count
    with pytest.raises(ValueError, match=r"linear layers are \['1'\] and its convolutions are \['convolution'\]"):
        find_targets(resnet(), RPSConfig(target_modules="all-linear"))


def test_convolutions_that_can_not_be_shared():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

    class Masked(nn.Conv2d):
        def __init__(self):
            super().__init__(2, 2, 3)
            self.register_buffer("mask", torch.ones(2, 2, 3, 3))

    class Named(nn.Conv2d):
        pass

    assert shareable_kind(Named(2, 2, 3)).noun == "convolutions"
    unfit = [
        Standardised(2, 2, 3), Masked(), nn.ConvTranspose2d(2, 2, 3), nn.LazyConv2d(2, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), nn.utils.spectral_norm(nn.Conv1d(2, 2, 3)),
    ]  # fmt: skip
    assert not any(shareable_kind(module) for module in unfit)
    model = nn.Module()
    model.stem = unfit[0]
    with pytest.raises(ValueError, match="'stem', which is a Standardised, not a plain linear layer or convolution"):
        get_rps_model(model, RPSConfig(target_modules=["stem"]))


def test_tied_quantised_and_empty_convolutions():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    model = Pair()
    model.b.weight = model.a.weight
    assert [c.name for c in find_targets(model, RPSConfig())] == ["c"]
    with pytest.raises(ValueError, match="'a', which is tied to another module"):
        get_rps_model(model, RPSConfig(target_modules=["a"]))
    model = Pair()
    model.b.weight = nn.Parameter(torch.zeros(4, 4, 3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'b' has a weight of dtype torch\.int8"):
        get_rps_model(model, RPSConfig())
    model = Pair()
    model.b.weight = nn.Parameter(torch.empty(0, 4, 3, 3))
    with pytest.raises(ValueError, match="'b', which is empty"):
        get_rps_model(model, RPSConfig(target_modules=["b"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["convolution"]}, "which is a Conv2d .hf_rps.get_rps_model shares convolutions, adapters"),
        ({}, "its convolutions are shared by hf_rps.get_rps_model, not by adapters"),
    ],
)
@pytest.mark.parametrize("mode", ["replace", "delta"])
def test_adapters_refuse_them(mode, options, message):
    model = resnet()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, RPSConfig(mode=mode, **options))
    assert list(model.state_dict()) == keys


def test_reference_is_the_plain_form():
    shape, options, size = SHAPES["plain"]
    layer = layer_of(shape, options, size)
    matrix = layer.shared.matrix.weight(layer.bank.psi)
    torch.testing.assert_close(layer.dense_weight(), matrix.view(6, 4, 3, 3), rtol=0, atol=0)
