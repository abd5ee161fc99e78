"""smaller_config: the nearest of all widths or depths, with fields that fit together."""

import pytest
import torch
from tiny_models import CASES, RESNET, TinyCase
from transformers import BartConfig, BartModel, LlamaConfig, LlamaForCausalLM, ResNetConfig

from studies.methods.smaller import _CHANGES, _changed, count_parameters, smaller_config

BOTTLENECK = RESNET | {"layer_type": "bottleneck", "embedding_size": 8, "hidden_sizes": [16, 32, 64, 128],
                       "depths": [1, 1, 2, 1], "out_features": ["stage4"], "num_labels": 5}  # fmt: skip
LLAMA = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 5,
         "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}  # fmt: skip
MODELS = {case.name: case for case in CASES if case.name in ("vit", "gpt2", "bert", "qwen2", "qwen3")} | {
    "resnet": TinyCase("resnet", "ResNetForImageClassification", "image", (), RESNET | {"num_labels": 5}),
    "resnet, bottleneck": TinyCase("resnet, bottleneck", "ResNetForImageClassification", "image", (), BOTTLENECK),
    "llama": TinyCase("llama", "LlamaForCausalLM", "text", (), LLAMA),
}


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]


def parts(case):
    return case.model_class, case.model_class.config_class(**case.arguments)


@pytest.mark.parametrize("how", ["width", "depth"])
def test_counts_ascend_and_every_model_runs(case, how):
    """All candidates, the config's own last; a step of the largest and of the smallest one."""
    build, config = parts(case)
    configs = [_changed(config, change) for change in _CHANGES[how](config)]
    counts = [count_parameters(build, each) for each in configs]
    assert counts == sorted(counts)
    assert len(set(counts)) > len(counts) / 2
    assert configs[-1].to_dict() == config.to_dict()
    for each in configs[:: max(1, len(configs) // 12)]:
        model = build(each).train()
        model(**case.batch())[0].square().mean().backward()


@pytest.mark.parametrize("how", ["width", "depth"])
def test_the_nearest_is_chosen(case, how):
    build, config = parts(case)
    counts = [count_parameters(build, _changed(config, change)) for change in _CHANGES[how](config)]
    before = config.to_dict()
    for wanted in range(counts[0], counts[-1] + counts[-1] // 5, counts[-1] // 11):
        nearest = min(counts, key=lambda count: (abs(count - wanted), count))
        if nearest <= 1.25 * wanted:
            assert count_parameters(build, smaller_config(build, config, wanted, how)) == nearest
    assert config.to_dict() == before


def test_of_two_equally_near_the_smaller_is_chosen():
    build, config = parts(MODELS["llama"])
    two, three = (count_parameters(build, _changed(config, {"num_hidden_layers": depth})) for depth in (2, 3))
    assert (two + three) % 2 == 0
    assert smaller_config(build, config, (two + three) // 2, "depth").num_hidden_layers == 2
    assert smaller_config(build, config, (two + three) // 2 + 1, "depth").num_hidden_layers == 3


def test_widths_keep_heads_that_divide():
    build, config = parts(MODELS["llama"])
    total = count_parameters(build, config)
    for share in (0.6, 0.3, 0.1, 0.03):
        small = smaller_config(build, config, round(share * total), "width")
        assert small.hidden_size == small.num_attention_heads * small.head_dim
        assert small.head_dim % 2 == 0
        assert small.num_attention_heads % small.num_key_value_heads == 0
        assert small.intermediate_size == round(176 * small.hidden_size / 64)
        assert small.num_hidden_layers == 5
        if small.hidden_size >= 8:
            assert (small.num_attention_heads, small.num_key_value_heads) == (4, 2)


def test_below_two_numbers_a_head_there_are_fewer_heads():
    build, config = parts(MODELS["llama"])
    change = next(change for change in _CHANGES["width"](config) if change["hidden_size"] == 6)
    assert change == {"hidden_size": 6, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2,
                      "intermediate_size": 16}  # fmt: skip
    small = _changed(config, change)
    assert build(small)(torch.arange(5)[None]).logits.shape == (1, 5, 96)
    assert small.head_dim == 2


def test_heads_of_a_size_of_their_own_scale_too():
    config = LlamaConfig(**LLAMA | {"head_dim": 32})  # twice hidden_size / heads
    total = count_parameters(LlamaForCausalLM, config)
    small = smaller_config(LlamaForCausalLM, config, total // 3, "width")
    assert small.head_dim == small.hidden_size // 4 * 2


def test_gpt2_by_its_own_names():
    build, config = parts(MODELS["gpt2"])
    total = count_parameters(build, config)
    narrow, shallow = (smaller_config(build, config, round(0.6 * total), how) for how in ("width", "depth"))
    assert narrow.n_embd < 32
    assert (narrow.n_embd % narrow.n_head, narrow.n_head, narrow.n_inner) == (0, 4, None)
    assert (narrow.n_layer, shallow.n_layer, shallow.n_embd) == (2, 1, 32)
    config.n_inner = 96
    narrow = smaller_config(build, config, total // 2, "width")
    assert narrow.n_inner == 3 * narrow.n_embd


def test_resnets_lose_blocks_of_their_deepest_stage_first():
    config = ResNetConfig(**BOTTLENECK | {"depths": [3, 4, 6, 3]})
    depths = [change["depths"] for change in reversed(_CHANGES["depth"](config))]
    assert depths[:5] == [[3, 4, 6, 3], [3, 4, 5, 3], [3, 4, 4, 3], [3, 4, 3, 3], [3, 3, 3, 3]]
    assert depths[5:] == [[3, 3, 3, 2], [3, 3, 2, 2], [3, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 1], [2, 2, 1, 1],
                          [2, 1, 1, 1], [1, 1, 1, 1]]  # fmt: skip


def test_resnets_narrow_by_one_factor():
    build, config = parts(MODELS["resnet, bottleneck"])
    small = smaller_config(build, config, count_parameters(build, config) // 4, "width")
    factor = small.hidden_sizes[-1] / 128
    assert 0.4 < factor < 0.6
    assert [small.embedding_size, *small.hidden_sizes] == [round(size * factor) for size in (8, 16, 32, 64, 128)]


def test_layers_of_several_kinds_lose_their_names_with_them():
    build, config = parts(MODELS["qwen2"])
    small = smaller_config(build, config, round(0.7 * count_parameters(build, config)), "depth")
    assert (small.num_hidden_layers, len(small.layer_types), len(config.layer_types)) == (1, 1, 2)


def test_more_than_there_is_gives_the_config_itself(case):
    build, config = parts(case)
    assert smaller_config(build, config, 10**9, "width").to_dict() == config.to_dict()


def test_configs_survive_saving(case, tmp_path):
    build, config = parts(case)
    small = smaller_config(build, config, round(0.7 * count_parameters(build, config)), "width")
    small.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert count_parameters(build, loaded) == count_parameters(build, small)


@pytest.mark.parametrize("how", ["width", "depth"])
def test_what_can_not_be_reached_is_refused(case, how):
    build, config = parts(case)
    least = count_parameters(build, _changed(config, _CHANGES[how](config)[0]))
    with pytest.raises(ValueError, match=rf"{how} can't bring .*Config to parameters=.* reached is {least:,}\. Ask"):
        smaller_config(build, config, least // 2, how)
    assert count_parameters(build, smaller_config(build, config, round(least / 1.2), how)) == least


def test_unknown_ways_and_configs_are_refused():
    build, config = parts(MODELS["vit"])
    with pytest.raises(ValueError, match=r"how='both' is not valid; expected one of \['width', 'depth'\]"):
        smaller_config(build, config, 1000, "both")
    with pytest.raises(
        ValueError, match="BartConfig does not have the fields to scale: looked for hidden_size, num_at"
    ):
        smaller_config(BartModel, BartConfig(), 1000, "width")
    config = ResNetConfig(**RESNET)
    del config.depths
    with pytest.raises(ValueError, match="looked for num_hidden_layers, or depths"):
        smaller_config(build, config, 1000, "depth")
