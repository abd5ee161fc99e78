"""Checkpoints of models that transformers does not load in one dtype, and models with parts in several."""

import copy
import functools

import pytest
import torch
from model_outputs import close, equal, outputs
from safetensors.torch import load_file
from tiny_models import CASES, IMAGE_TOKEN, T5, VIT, VOCAB, seq2seq, tiny

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank
from hf_rps.layers.base import RPSLayer

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32

# fmt: off
QFORMER = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 64, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
BLIP = {"vision_config": VIT, "qformer_config": QFORMER, "num_query_tokens": 16, "image_token_index": IMAGE_TOKEN,
        "text_config": {"model_type": "opt", "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64,
                        "word_embed_proj_dim": 32}}
KEPT = {case.name: case for case in (  # with modules that transformers keeps in float32
    seq2seq("t5", "T5ForConditionalGeneration", **T5),
    seq2seq("t5, gated", "T5ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu"),
    seq2seq("mt5", "MT5ForConditionalGeneration", **T5),
    seq2seq("umt5", "UMT5ForConditionalGeneration", **T5),
    tiny("blip-2", "Blip2ForConditionalGeneration", "image in text", **BLIP),
    tiny("blip-2 with t5", "Blip2ForConditionalGeneration", "image in text",
         **BLIP | {"text_config": T5 | {"model_type": "t5"}}),
    tiny("instructblip with t5", "InstructBlipForConditionalGeneration", "image in text",
         **BLIP | {"text_config": T5 | {"model_type": "t5"}}),
)}
# fmt: on
LLAMA = next(case for case in CASES if case.name == "llama")
LLAVA = next(case for case in CASES if case.name == "llava")


def batch_of(case, dtype=FLOAT):
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.batch().items()}
    if "t5" in case.name and "input_ids" in batch:
        batch["decoder_input_ids"] = batch["input_ids"][:, -4:]
    if "instructblip" in case.name:
        batch["qformer_input_ids"] = batch["input_ids"][:, -6:]
    return batch | {"use_cache": False}


def logits(model, case, dtype):
    model_outputs = outputs(model.eval(), batch_of(case, dtype))
    return {"logits": model_outputs["logits"]}


def dtypes(model):
    """By name, the dtypes of all dense parameters and of the weights that stand in for them."""
    found = {name: p.dtype for name, p in model.named_parameters() if p is not getattr(find_bank(model), "psi", None)}
    return found | {
        f"{name}.weight": module.weight.dtype for name, module in model.named_modules() if isinstance(module, RPSLayer)
    }


def widest(model):
    return functools.reduce(torch.promote_types, (m.weight.dtype for m in model.modules() if isinstance(m, RPSLayer)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``folders(name)``: a model of ``KEPT``, saved dense and compressed, in float32."""

    @functools.cache
    def make(name):
        folder, model = tmp_path_factory.mktemp("kept"), KEPT[name].build()
        model.save_pretrained(folder / "dense")
        get_rps_model(model, RPSConfig(ratio=0.5)).save_pretrained(folder / "compressed")
        return folder

    return make


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("name", KEPT)
def test_a_checkpoint_is_loaded_in_the_dtypes_of_its_dense_form(folders, tmp_path, name, dtype):
    case, folder = KEPT[name], folders(name)
    dense = case.model_class.from_pretrained(folder / "dense", dtype=dtype)
    model = case.model_class.from_pretrained(folder / "compressed", dtype=dtype)
    kept = {weight for weight, found in dtypes(dense).items() if found == FLOAT}
    assert bool(kept) == (dtype == HALF)
    assert dtypes(model) == dtypes(dense)
    assert find_bank(model).psi.dtype == widest(model) == (FLOAT if dtype == HALF else BF16)
    plain = to_dense(copy.deepcopy(model))
    assert dtypes(plain) == dtypes(dense)
    found = logits(model, case, dtype)
    assert found["logits"].dtype == logits(dense, case, dtype)["logits"].dtype
    assert found["logits"].isfinite().all()
    close(found, logits(plain, case, dtype), name, tolerance=0.03 if dtype == HALF else 0.2)

    model.save_pretrained(tmp_path / "again")
    dense.save_pretrained(tmp_path / "dense")
    for asked in ("auto", dtype):  # BLIP-2's first parameter is kept in float32, which "auto" takes for all
        again = case.model_class.from_pretrained(tmp_path / "again", dtype=asked)
        assert dtypes(again) == dtypes(case.model_class.from_pretrained(tmp_path / "dense", dtype=asked))
        equal(find_bank(again).state_dict(), find_bank(model).state_dict())
    equal(logits(again, case, dtype), found)
    equal(again.state_dict(), model.state_dict())
    again.save_pretrained(tmp_path / "third")
    equal(load_file(tmp_path / "third" / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors"))
    assert (tmp_path / "third" / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()


@pytest.mark.parametrize("route", ["get_rps_model", "quantization_config"])
def test_a_model_that_was_loaded_in_half_precision(folders, tmp_path, route):
    case, folder, config = KEPT["t5"], folders("t5") / "dense", RPSConfig(ratio=0.5)
    dense = case.model_class.from_pretrained(folder, dtype=HALF)
    if route == "get_rps_model":
        model = get_rps_model(copy.deepcopy(dense), config)
    else:
        model = case.model_class.from_pretrained(folder, dtype=HALF, quantization_config=config)
    assert find_bank(model).psi.dtype == FLOAT
    assert dtypes(model) == dtypes(dense)
    model.save_pretrained(tmp_path)
    for asked in (HALF, "auto"):
        again = case.model_class.from_pretrained(tmp_path, dtype=asked)
        equal(again.state_dict(), model.state_dict())
        equal(logits(again, case, HALF), logits(model, case, HALF))
    assert dtypes(to_dense(again)) == dtypes(dense)


def test_what_overflows_float16_does_not_where_the_layer_is_kept_in_float32(folders):
    case = KEPT["t5"]
    model = case.model_class.from_pretrained(folders("t5") / "compressed", dtype=HALF)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    x = torch.full((1, wo.in_features), 3e4) * wo.dense_weight()[0].sign().detach()
    assert x.half().isfinite().all()
    assert 65504 < wo(x.to(wo.weight.dtype)).abs().max() < torch.inf
    assert wo(x.half()).isinf().any()


def test_a_model_without_kept_modules_is_loaded_in_the_dtype_that_was_asked_for(tmp_path):
    get_rps_model(LLAMA.build(), RPSConfig(ratio=0.5)).save_pretrained(tmp_path)
    for dtype in (HALF, BF16, FLOAT):
        model = LLAMA.model_class.from_pretrained(tmp_path, dtype=dtype)
        assert set(dtypes(model).values()) == {dtype}
        assert find_bank(model).psi.dtype == dtype


def test_modules_that_are_kept_in_bfloat16_too(tmp_path, monkeypatch):
    monkeypatch.setattr(LLAMA.model_class, "_keep_in_fp32_modules_strict", ["layers.*.down_proj"])
    get_rps_model(LLAMA.build(), RPSConfig(ratio=0.5)).save_pretrained(tmp_path)
    model = LLAMA.model_class.from_pretrained(tmp_path, dtype=BF16)
    wide = {name for name, dtype in dtypes(model).items() if dtype == FLOAT}
    assert wide == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert find_bank(model).psi.dtype == FLOAT


def test_a_module_with_a_dtype_of_its_own(tmp_path, monkeypatch):
    """Some models build a layer in float32, whatever is asked for."""
    build = LLAMA.model_class.__init__

    def wide(self, config):
        build(self, config)
        self.model.layers[1].mlp.float()

    monkeypatch.setattr(LLAMA.model_class, "__init__", wide)
    get_rps_model(LLAMA.build(), RPSConfig(ratio=0.5)).save_pretrained(tmp_path)
    model = LLAMA.model_class.from_pretrained(tmp_path, dtype=HALF)
    assert {name for name, dtype in dtypes(model).items() if dtype == FLOAT} == {
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert find_bank(model).psi.dtype == FLOAT


# ---- a vision tower in float32, a language model in bfloat16


@pytest.fixture
def llava():
    model = LLAVA.build()
    model.model.language_model.to(BF16)
    model.lm_head.to(BF16)
    return model


def test_a_model_with_parts_in_two_dtypes(llava, tmp_path):
    dense = copy.deepcopy(llava)
    model = get_rps_model(llava, RPSConfig(ratio=0.5))
    assert find_bank(model).psi.dtype == FLOAT
    assert dtypes(model) == dtypes(dense)
    found, plain = logits(model, LLAVA, FLOAT), to_dense(copy.deepcopy(model))
    assert found["logits"].dtype == logits(dense, LLAVA, FLOAT)["logits"].dtype == BF16
    assert dtypes(plain) == dtypes(dense)
    close(found, logits(plain, LLAVA, FLOAT), "parts in two dtypes", tolerance=0.2)
    model.save_pretrained(tmp_path / "compressed")
    dense.save_pretrained(tmp_path / "dense")
    for dtype in (BF16, FLOAT, "auto"):
        again = LLAVA.model_class.from_pretrained(tmp_path / "compressed", dtype=dtype)
        assert dtypes(again) == dtypes(LLAVA.model_class.from_pretrained(tmp_path / "dense", dtype=dtype))
    assert torch.equal(find_bank(again).psi, find_bank(model).psi)


@pytest.mark.parametrize("autocast", [False, True])
def test_training_reaches_the_array_from_both_parts(llava, autocast):
    model = get_rps_model(llava, RPSConfig(ratio=0.5))
    plain = to_dense(copy.deepcopy(model))
    bank, gradients = find_bank(model), {}
    for name, net in {"compressed": model, "dense": plain}.items():
        with torch.autocast("cpu", BF16, enabled=autocast):
            net(**batch_of(LLAVA)).logits.float().square().mean().backward()
        gradients[name] = net
    found = bank.psi.grad
    assert found.dtype == FLOAT
    # R^T of the dense model's gradients
    expected, one_part = torch.zeros_like(found), {}
    for name, module in model.named_modules():
        if isinstance(module, RPSLayer):
            gradient = plain.get_submodule(name).weight.grad.flatten(1).float()
            before = expected.clone()
            module.shared.matrix.add_adjoint(expected, gradient)
            part = "vision" if "vision" in name else "language"
            one_part[part] = one_part.get(part, 0) + expected - before
    bank.array.divisor.divide_(expected)
    size = expected.norm()
    assert (found - expected).norm() < 0.05 * size
    for gradient in one_part.values():
        bank.array.divisor.divide_(gradient)
        assert gradient.norm() > 0.15 * size  # so that neither is missing


def test_a_training_step_of_kept_modules_under_autocast(folders):
    case = KEPT["t5"]
    model = case.model_class.from_pretrained(folders("t5") / "compressed", dtype=HALF)
    exact = case.model_class.from_pretrained(folders("t5") / "compressed", dtype=FLOAT)
    gradients = []
    for net in (model, exact):
        with torch.autocast("cpu", BF16, enabled=net is model):
            net(**batch_of(case)).logits.float().square().mean().backward()
        gradients.append(find_bank(net).psi.grad)
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()
    before = find_bank(model).psi.detach().clone()
    torch.optim.SGD([find_bank(model).psi], lr=1e-5).step()
    torch.testing.assert_close(find_bank(model).psi.detach(), before - 1e-5 * gradients[0])


def test_a_cast_of_the_whole_model(folders):
    model = KEPT["t5"].model_class.from_pretrained(folders("t5") / "compressed", dtype=HALF)
    for cast, dtype in ((model.half, HALF), (model.float, FLOAT), (model.bfloat16, BF16)):
        cast()
        assert find_bank(model).psi.dtype == dtype
        assert set(dtypes(model).values()) == {dtype}
        assert logits(model, KEPT["t5"], dtype)["logits"].dtype == dtype
