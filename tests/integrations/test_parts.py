"""What is compressed is what is saved: compressed models inside other models, several arrays, shared config objects."""

import copy
import gc
import json

import pytest
import torch
from checkpoints import equal
from huggingface_hub import PyTorchModelHubMixin
from sentences import TEXTS, sentence_transformer
from tiny_configs import tiny_config
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    CLIPVisionConfig,
    EncoderDecoderModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedModel,
)

from hf_rps import RPSConfig, get_rps_config, get_rps_model, size_report, to_dense
from hf_rps.conversion import find_banks
from hf_rps.integrations.model_card import write_model_card
from hf_rps.names import Place

RPS = RPSConfig(ratio=0.25)


def bert(**changes):
    return tiny_config("bert", **changes)


class Tagger(PreTrainedModel):
    """An encoder under a head of one's own."""

    config_class, base_model_prefix = type(bert()), "encoder"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.encoder, self.head = BertModel(config), nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids):
        return self.head(self.encoder(input_ids)[0])


class Towers(PreTrainedModel):
    """Two encoders that share a config object, under a prefix that is none of theirs."""

    config_class, base_model_prefix = type(bert()), "none"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.query, self.key = BertModel(config), nn.ModuleDict({"inner": BertModel(config)})
        self.post_init()

    def forward(self, input_ids):
        return self.query(input_ids)[0] - self.key["inner"](input_ids)[0]


class Plain(nn.Module):
    """No transformers model, but it holds two."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = BertModel(bert()), BertModel(bert()), nn.Linear(32, 8)

    def forward(self, input_ids):
        return self.out(self.query(input_ids)[0] - self.key(input_ids)[0])


def encoder_decoder():
    decoder = BertLMHeadModel(bert(is_decoder=True, add_cross_attention=True))
    return EncoderDecoderModel(encoder=BertModel(bert()), decoder=decoder).eval()


def llava():
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                              image_size=16, patch_size=8)  # fmt: skip
    text = tiny_config("llama")
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=96,
                                                     vision_feature_layer=-1)).eval()  # fmt: skip


def outputs(model, ids):
    """The model's outputs, whatever it is."""
    with torch.no_grad():
        if isinstance(model, EncoderDecoderModel):
            return model(input_ids=ids, decoder_input_ids=ids).logits
        if isinstance(model, (LlavaForConditionalGeneration, LlavaModel)):
            ids = torch.cat([torch.full((2, 4), 96), ids % 90], 1)
            pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
            return model(input_ids=ids, pixel_values=pixels)[0]
        found = model(input_ids=ids)
        return found if torch.is_tensor(found) else found[0]


def changed(model):
    """Let no array be what a fresh conversion would give."""
    with torch.no_grad():
        for bank in find_banks(model):
            bank.psi.mul_(1.5)
    return model


CASES = {
    "a head of one's own": (lambda: Tagger(bert()).eval(), ["encoder"]),
    "two towers": (lambda: Towers(bert()).eval(), ["query", "key.inner"]),
    "one of two towers": (lambda: Towers(bert()).eval(), ["key.inner"]),
    "encoder and decoder": (encoder_decoder, ["encoder", "decoder"]),
    "a decoder": (encoder_decoder, ["decoder"]),
    "the language model": (llava, ["model.language_model"]),
    "both parts": (llava, ["model.language_model", "model.vision_tower"]),
    "a base in its class": (lambda: BertForSequenceClassification(bert()).eval(), ["bert"]),
}


@pytest.mark.parametrize("name", CASES)
def test_compressed_parts_are_saved_and_loaded(name, ids, tmp_path):
    build, parts = CASES[name]
    model = build()
    dense = sum(p.numel() for p in model.parameters())
    for i, part in enumerate(parts):
        get_rps_model(model.get_submodule(part), RPSConfig(ratio=0.25, seed=i))
    changed(model)
    expected = outputs(model, ids)
    model.save_pretrained(tmp_path / "outer")
    loaded = type(model).from_pretrained(tmp_path / "outer")
    equal(outputs(loaded, ids), expected)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert size_report(loaded).dense_parameters == dense
    assert size_report(loaded).n > size_report(loaded).m > 0
    write_model_card(tmp_path / "outer")
    # what was loaded saves itself, and each of its parts by itself
    loaded.save_pretrained(tmp_path / "again")
    equal(outputs(type(model).from_pretrained(tmp_path / "again"), ids), expected)
    for part in parts:
        inner = loaded.get_submodule(part)
        inner.save_pretrained(tmp_path / "part")
        again = type(inner).from_pretrained(tmp_path / "part")
        assert len(find_banks(again)) == 1
        torch.testing.assert_close(again.state_dict(), inner.state_dict(), rtol=0, atol=0)
    close = outputs(to_dense(loaded), ids)
    torch.testing.assert_close(close, expected)
    assert not find_banks(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    assert "rps" not in (tmp_path / "dense" / "config.json").read_text()
    equal(outputs(type(model).from_pretrained(tmp_path / "dense"), ids), close)


def test_heads_are_put_on_and_taken_off(ids, tmp_path):
    model = llava()
    get_rps_model(model.model.language_model, RPS)
    changed(model).save_pretrained(tmp_path / "head")
    base = LlavaModel.from_pretrained(tmp_path / "head")
    equal(outputs(base, ids), outputs(model.model, ids))
    model.model.save_pretrained(tmp_path / "base")
    head = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    equal(outputs(head.model, ids), outputs(model.model, ids))


def test_parts_loaded_from_their_own_checkpoints(ids, tmp_path):
    for name, model in (("encoder", BertModel(bert())), ("decoder", BertLMHeadModel(bert(is_decoder=True)))):
        get_rps_model(model, RPS).save_pretrained(tmp_path / name)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder").eval()
    assert len(find_banks(model)) == 2
    model.save_pretrained(tmp_path / "both")
    equal(outputs(EncoderDecoderModel.from_pretrained(tmp_path / "both"), ids), outputs(model, ids))


def test_a_part_whose_array_is_outside_is_not_saved(tmp_path):
    model = get_rps_model(llava(), RPS)
    with pytest.raises(ValueError, match=r"belongs to the model around it.*Save that model"):
        model.model.language_model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="on the whole model"):
        to_dense(model.model.language_model)
    assert len(find_banks(model)) == 1


def test_a_base_whose_array_the_head_reads_is_not_made_dense_by_itself(tiny, ids, tmp_path):
    """The head would go on with an array that is in no module any more."""
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.25, target_modules=["lm_head", "q_proj"]))
    expected, base = outputs(model, ids), model.model
    with pytest.raises(ValueError, match=r"read outside of it, too, by 'lm_head'.*on the whole model"):
        to_dense(base)
    equal(outputs(model, ids), expected)
    del model  # nothing else reads the array now
    gc.collect()
    hidden = outputs(base, ids)
    torch.testing.assert_close(outputs(to_dense(base), ids), hidden)


def test_an_array_that_nothing_in_the_model_reads(tiny, tmp_path):
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.25, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"no layer in it reads, only 'lm_head' of the model .* Save that model"):
        model.model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_parts_that_were_replaced_since(ids, tmp_path):
    model = Tagger(bert()).eval()
    get_rps_model(model.encoder, RPS)
    model.save_pretrained(tmp_path / "compressed")
    model.encoder = BertModel(bert()).eval()
    model.save_pretrained(tmp_path / "dense")
    loaded = Tagger.from_pretrained(tmp_path / "dense")
    assert not find_banks(loaded)
    equal(outputs(loaded, ids), outputs(model, ids))


def test_a_plain_module_is_compressed_model_by_model(ids, tmp_path):
    model = Plain().eval()
    dense = sum(p.numel() for p in model.parameters())
    get_rps_model(model, RPS)
    report = size_report(model)
    assert report.dense_parameters == dense
    assert report.m == pytest.approx(0.25 * report.n, abs=2)
    assert [type(model.query.rps), type(model.out)] == [type(find_banks(model)[0]), nn.Linear]
    expected = outputs(changed(model), ids)
    for name in ("query", "key"):
        getattr(model, name).save_pretrained(tmp_path / name)
        setattr(model, name, BertModel.from_pretrained(tmp_path / name))
    equal(outputs(model, ids), expected)
    torch.testing.assert_close(outputs(to_dense(model), ids), expected)
    assert not find_banks(model)
    model.query.save_pretrained(tmp_path / "dense")
    assert not find_banks(BertModel.from_pretrained(tmp_path / "dense"))


def test_named_modules_of_a_plain_module(ids):
    model = Plain().eval()
    get_rps_model(model, RPSConfig(ratio=0.25, target_modules=["query.encoder.layer.0.attention.self.query", "out"]))
    assert [len(bank.weight_map.targets) for bank in find_banks(model)] == [1, 1]
    assert find_banks(model.query)[0].weight_map.targets[0].name == "encoder.layer.0.attention.self.query"
    assert not find_banks(model.key)
    model = Plain()
    with pytest.raises(ValueError, match="no module of Plain"):
        get_rps_model(model, RPSConfig(target_modules=["nowhere"]))


def test_nothing_changes_where_one_part_does_not_fit():
    model = Plain()
    with torch.no_grad():
        model.key.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        get_rps_model(model, RPS)
    assert not find_banks(model)
    assert not hasattr(model.query.config, "quantization_config")


def test_another_part_of_a_compressed_model():
    model = Plain()
    get_rps_model(model.query, RPS)
    with pytest.raises(ValueError, match=r"already compressed in its 'query'.*other parts"):
        get_rps_model(model, RPS)
    get_rps_model(model.key, RPS)
    assert len(find_banks(model)) == 2
    with pytest.raises(ValueError, match="2 shared arrays"):
        get_rps_config(model)


def test_a_shared_config_object_is_not_marked(ids, tmp_path):
    config = bert()
    teacher, student = (BertForSequenceClassification(config).eval() for _ in range(2))
    get_rps_model(student, RPS)
    assert not hasattr(config, "quantization_config")
    assert student.config is student.bert.config is not config
    assert student.bert.encoder.layer[0].attention.self.config is student.config  # which sets the attention's form
    student.set_attn_implementation("eager")
    assert student.bert.encoder.layer[0].attention.self.config._attn_implementation == "eager"
    assert config._attn_implementation == "sdpa"
    teacher.save_pretrained(tmp_path / "teacher")
    equal(outputs(BertForSequenceClassification.from_pretrained(tmp_path / "teacher"), ids), outputs(teacher, ids))
    before = student.config
    student.save_pretrained(tmp_path / "student")
    assert student.config is before
    twin = copy.deepcopy(student)
    assert twin.config is not student.config
    twin.save_pretrained(tmp_path / "twin")
    student.set_attn_implementation("sdpa")
    equal(outputs(BertForSequenceClassification.from_pretrained(tmp_path / "twin"), ids), outputs(student, ids))


def test_a_dense_model_with_the_config_of_a_compressed_one(ids, tmp_path):
    student = get_rps_model(BertForSequenceClassification(bert()), RPS)
    dense = BertForSequenceClassification(student.config).eval()
    dense.save_pretrained(tmp_path / "dense")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert not find_banks(loaded)
    equal(outputs(loaded, ids), outputs(dense, ids))
    assert student.config.quantization_config is not None  # it was the student's, and still is
    student.save_pretrained(tmp_path / "student")
    assert find_banks(BertForSequenceClassification.from_pretrained(tmp_path / "student"))


@pytest.mark.parametrize("source", ["memory", "file"])
def test_from_config_of_a_compressed_model(tiny, ids, tmp_path, source):
    """A model of the same class, compressed with the same map, whose array is fresh."""
    model = changed(get_rps_model(tiny("llama"), RPS))
    model.save_pretrained(tmp_path / "model")
    config = model.config if source == "memory" else AutoConfig.from_pretrained(tmp_path / "model")
    fresh = AutoModelForCausalLM.from_config(config).eval()
    assert not torch.equal(outputs(fresh, ids), outputs(model, ids))
    fresh.load_state_dict(model.state_dict())
    equal(outputs(fresh, ids), outputs(model, ids))
    fresh.save_pretrained(tmp_path / "fresh")
    equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "fresh"), ids), outputs(model, ids))


def test_from_config_of_a_model_with_compressed_parts(ids, tmp_path):
    model = Towers(bert()).eval()
    get_rps_model(model.key["inner"], RPS)
    model.save_pretrained(tmp_path)
    fresh = Towers._from_config(Towers.config_class.from_pretrained(tmp_path)).eval()
    fresh.load_state_dict(model.state_dict())
    equal(outputs(fresh, ids), outputs(model, ids))


def test_from_config_of_a_part_that_has_the_config_of_the_model_around_it(tmp_path):
    model = Tagger(bert())
    get_rps_model(model.encoder, RPS)
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(model.config)
    config.quantization_config.banks[0].place = Place("inner.", "inner.")
    with pytest.raises(ValueError, match=r"array in 'inner', and BertModel has no such module.*get_rps_config"):
        BertModel._from_config(config)


def test_from_config_of_another_size_is_refused(tiny):
    config = copy.deepcopy(get_rps_model(tiny("llama"), RPS).config)
    config.intermediate_size = 88
    with pytest.raises(ValueError, match="has shape"):
        AutoModelForCausalLM.from_config(config)


def test_the_hubs_mixin_refuses(tmp_path):
    class Mixed(Plain, PyTorchModelHubMixin):
        pass

    model = get_rps_model(Mixed(), RPS)
    with pytest.raises(ValueError, match="would build it dense"):
        model.save_pretrained(tmp_path / "model")
    to_dense(model).save_pretrained(tmp_path / "model")


def test_records_that_were_changed(tmp_path):
    model = Towers(bert())
    get_rps_model(model.query, RPS)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    whole = json.loads(file.read_text())
    record = whole["quantization_config"]["banks"][0]
    for banks, message in (
        ([], "list of records"),
        ("query", "list of records"),
        ([record | {"base": "key.inner."}], "map|tensor"),
        ([record | {"base": "nowhere."}], "no such module"),
        ([record | {"base": 3}], "restore"),
        ([record, record], "rps_fingerprint"),
    ):
        file.write_text(json.dumps(whole | {"quantization_config": whole["quantization_config"] | {"banks": banks}}))
        with pytest.raises((ValueError, RuntimeError), match=message):
            Towers.from_pretrained(tmp_path)


def test_sentence_transformers(tmp_path, tiny):
    from sentence_transformers import SentenceTransformer

    model = get_rps_model(sentence_transformer(tiny("bert", AutoModel), tmp_path / "bert"), RPS)
    assert len(find_banks(changed(model))) == 1
    expected = model.encode(TEXTS, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "sentences"))
    loaded = SentenceTransformer(str(tmp_path / "sentences"), device="cpu")
    assert len(find_banks(loaded)) == 1
    equal(loaded.encode(TEXTS, convert_to_tensor=True), expected)
    assert size_report(loaded).m == size_report(model).m > 0
    torch.testing.assert_close(to_dense(loaded).encode(TEXTS, convert_to_tensor=True), expected)
    loaded.save_pretrained(str(tmp_path / "dense"))
    assert not find_banks(SentenceTransformer(str(tmp_path / "dense"), device="cpu"))
