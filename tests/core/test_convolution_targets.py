"""Which convolutions are chosen to share weights, by default and by name, and which are refused."""

import pytest
import torch
from convolutional_models import pixels, resnet, vit
from peft import get_peft_model
from torch import nn
from transformers import AutoModel

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank
from hf_rps.layers.convolution import RPSConv
from hf_rps.layers.kinds import shareable_kind
from hf_rps.targets import find_targets


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
    with pytest.raises(ValueError, match="'a', which is tied to 'b'"):
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
