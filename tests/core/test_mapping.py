"""The weight map: its fast descriptions (layouts, pieces of Gamma) against the slow ones (slots), for every mapping."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers

from hf_rps import RPSConfig
from hf_rps.mappings import definition
from hf_rps.mappings.base import SharedMatrix, Target
from hf_rps.mappings.fold import FoldMatrix
from hf_rps.mappings.table import MAPPINGS, register
from hf_rps.mappings.weight_map import WeightMap, sharing_group
from hf_rps.psi.divisor import Divisor, load
from hf_rps.targets import find_targets

TARGETS = [
    Target("encoder.layer.0.query", 24, 16, 0.02),
    Target("encoder.layer.0.up", 40, 24, 0.03),
    Target("encoder.layer.1.query", 24, 16, 0.05),
    Target("pooler", 16, 40, 0.01),
]

DRAWN = [name for name, mapping in MAPPINGS.items() if not mapping.is_learned]


def make(**changes):
    return WeightMap(TARGETS, **({"ratio": 0.15} | changes))


@pytest.mark.parametrize("sharing", ["global", "block", "module"])
@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.02])
def test_layout_and_gamma_agree_with_slots(sharing, ratio):
    weight_map = make(sharing=sharing, ratio=ratio)
    for target in TARGETS:
        runs = weight_map.matrix(target.name).layout.runs
        flat = [slot for a, length in runs for slot in range(a, a + length)]
        assert weight_map.slots(target.name).ravel().tolist() == flat
    matrices = [weight_map.matrix(target.name) for target in TARGETS]
    np.testing.assert_allclose(load(matrices, weight_map.m).numpy(), definition.gamma(weight_map), rtol=1e-12)
    divisor = Divisor(matrices, weight_map.m, "projection").tensor(torch.device("cpu"), torch.float64)
    np.testing.assert_allclose(divisor.numpy(), definition.gamma(weight_map), rtol=1e-12)


@pytest.mark.parametrize("sign", ["row", "element", "none"])
@pytest.mark.parametrize("mapping", DRAWN)
def test_every_method_of_a_matrix_follows_the_definition(mapping, sign):
    """The default methods of the protocol, and those that the mapping has of its own."""
    weight_map = make(mapping=mapping, sign=sign)
    psi = torch.randn(weight_map.m, dtype=torch.float64, requires_grad=True)
    total = torch.zeros(weight_map.m, dtype=torch.float64)
    for target in TARGETS:
        expected = definition.weight(psi, weight_map, target.name)
        matrix, base = weight_map.matrix(target.name), torch.randn(target.out_features, target.in_features).double()
        torch.testing.assert_close(matrix.weight(psi), expected)
        gradient = torch.randn_like(expected)
        (adjoint,) = torch.autograd.grad(expected, psi, gradient, retain_graph=True)
        loads = []
        for one in (matrix, Plain(matrix)):
            torch.testing.assert_close(one.make(psi.detach()), expected.detach())
            torch.testing.assert_close(one.make(psi.detach(), base), base + expected.detach())
            into = torch.ones_like(psi, requires_grad=False)
            one.add_adjoint(into, gradient)
            torch.testing.assert_close(into, 1 + adjoint)
            into = torch.zeros_like(psi, requires_grad=False)
            one.add_load(into, 2.0)
            loads.append(into / 2)
        torch.testing.assert_close(*loads)
        total += loads[0]
    np.testing.assert_allclose(total.numpy(), definition.gamma(weight_map), rtol=1e-12)


class Plain(SharedMatrix):
    """A matrix with nothing but its definition."""

    def __init__(self, matrix):
        self.rows, self.cols, self.weight = matrix.rows, matrix.cols, matrix.weight

    def weight(self, psi):
        """Taken from the matrix."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mapping", DRAWN)
def test_gamma_does_not_depend_on_the_default_dtype(mapping, dtype):
    """transformers sets it while it builds a model that is loaded in half precision."""
    targets = [Target("a", 40, 24, std=0.03), Target("b", 16, 40, std=0.3)]
    weight_map = WeightMap(targets, ratio=0.1, mapping=mapping)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = load([weight_map.matrix(target.name) for target in targets], weight_map.m)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), definition.gamma(weight_map), rtol=1e-12)


def test_a_mapping_has_a_name_of_its_own():
    with pytest.raises(ValueError, match="there is a mapping 'fold' already"):
        register(type("Other", (MAPPINGS["hash"],), {"name": "fold"}))


@pytest.mark.parametrize("mapping", ["fold", "roast", "hash"])
@pytest.mark.parametrize("sharing", ["global", "block", "module"])
def test_groups_use_segments_of_their_own(mapping, sharing):
    weight_map = make(mapping=mapping, sharing=sharing)
    used = {}
    for target in TARGETS:
        used.setdefault(sharing_group(target.name, sharing), set()).update(
            weight_map.slots(target.name).ravel().tolist()
        )
    groups = list(used.values())
    assert sum(len(slots) for slots in groups) == len(set().union(*groups))
    assert max(max(slots) for slots in groups) < weight_map.m
    assert abs(weight_map.m - 0.15 * weight_map.n) <= len(groups)


def test_roast_tiles_are_contiguous_and_hash_is_spread():
    slots = make(mapping="roast").slots("encoder.layer.0.query").ravel()
    tiles = slots[: slots.size // 64 * 64].reshape(-1, 64)
    assert (np.diff(tiles, axis=1) == 1).all()
    hashed = make(mapping="hash", ratio=0.02).slots("encoder.layer.0.up").ravel()
    load = np.bincount(hashed, minlength=make(ratio=0.02).m)
    assert load.std() == pytest.approx(math.sqrt(load.mean()), rel=0.4)  # Poisson, unlike RANDOMFOLD's exact load


def test_signs():
    assert make(sign="row").signs("pooler").shape == (16, 1)
    assert make(sign="element").signs("pooler").shape == (16, 40)
    assert (make(sign="none").signs("pooler") == 1).all()
    assert isinstance(make().matrix("pooler"), FoldMatrix)
    assert not isinstance(make(sign="element").matrix("pooler"), FoldMatrix)


def test_default_init_std_is_rms_times_cube_root_of_the_ratio():
    weight_map = make()
    mean_square = sum(t.numel * t.std**2 for t in TARGETS) / weight_map.n
    assert weight_map.init_std == pytest.approx(math.sqrt(mean_square) * (weight_map.m / weight_map.n) ** (1 / 3))
    assert weight_map.scale("pooler") == pytest.approx(0.01 / weight_map.init_std)


def test_fingerprint_tells_maps_apart():
    changed = [dataclasses.replace(TARGETS[0], **change) for change in ({"name": "x"}, {"std": 0.0201})]
    maps = [
        make(), make(seed=1), make(ratio=0.16), make(sharing="block"), make(mapping="roast"), make(sign="none"),
        make(init_std=1.0), WeightMap(TARGETS[::-1], ratio=0.15), WeightMap(TARGETS[1:], ratio=0.15),
        *(WeightMap([target, *TARGETS[1:]], ratio=0.15) for target in changed),
    ]  # fmt: skip
    assert len({weight_map.fingerprint for weight_map in maps}) == len(maps)
    # golden: a checkpoint of today opens tomorrow. Configs record C, whose default may round differently elsewhere
    assert make(init_std=0.011368883259763983).fingerprint == "17573e5ae5fd7880d8a05f14e658e92d"


def test_block_groups():
    assert sharing_group("model.layers.12.mlp.up_proj", "block") == "model.layers.12"
    assert sharing_group("h.3.attn.c_attn", "block") == "h.3"
    assert sharing_group("pooler.dense", "block") == ""


REAL = {
    "bert-base": transformers.BertConfig(),
    "gpt2": transformers.GPT2Config(),
    "gpt2-xl": transformers.GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "llama-3.2-1b": transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8
    ),
    "qwen2.5-0.5b": transformers.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
    "vit-base": transformers.ViTConfig(),
    "t5-base": transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "whisper-small": transformers.WhisperConfig(d_model=768, encoder_layers=12, decoder_layers=12),
}


@pytest.mark.parametrize("sharing", ["global", "block"])
@pytest.mark.parametrize("name", list(REAL))
def test_views_of_real_shapes_start_on_16_bytes_in_bfloat16(name, sharing):
    """What tensor cores and vectorised loads ask of a matrix: its first row and its row length, multiples of 8."""
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(REAL[name])
    shapes = {c.name: c.weight.shape for c in find_targets(model, RPSConfig())}
    targets = [Target(name, *shape, 0.02) for name, shape in shapes.items()]
    for ratio in (0.5, 0.1, 0.01, 0.001):
        weight_map = WeightMap(targets, ratio=ratio, sharing=sharing)
        if weight_map.m < 8 * 4096:  # segments so small that alignment would cost them rotations
            continue
        for target in targets:
            starts = [slot for _, _, slot in weight_map.matrix(target.name).layout.blocks]
            if target.in_features % 8 == 0:
                assert all(slot % 8 == 0 for slot in starts), (target, ratio)
