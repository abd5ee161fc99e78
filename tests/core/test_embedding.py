"""Embeddings with a shared table: the rows, their gradient, what chooses them, and what is refused."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from forks import forks
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from hf_rps import RPSConfig, get_rps_config, get_rps_model, size_report, to_dense
from hf_rps.conversion import find_bank, shared_layers
from hf_rps.layers.embedding import RPSEmbedding
from hf_rps.layers.linear import RPSLinear

MAPS = {
    "ratio 1": {"ratio": 1.0},
    "fold": {"ratio": 0.15},
    "rows longer than the array": {"ratio": 0.01},
    "sign per weight": {"ratio": 0.15, "sign": "element"},
    "roast": {"ratio": 0.15, "mapping": "roast"},
    "hash": {"ratio": 0.15, "mapping": "hash"},
    "folded input": {"ratio": 0.15, "input_fold": 5},
    "codebook": {"mapping": "codebook", "bits": 3},
    "codebooks of groups": {"mapping": "codebook", "bits": 2, "group_size": 12},
    "vectors": {"mapping": "codebook", "bits": 4, "tile": 3},
    "vectors of groups": {"mapping": "codebook", "bits": 3, "tile": 2, "group_size": 16},
}


class Table(nn.Module):
    """Two tables, of which one has a row of padding, and a layer that multiplies."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(29, 40, padding_idx=3, dtype=dtype)
        self.places = nn.Embedding(7, 40, dtype=dtype)
        self.proj = nn.Linear(40, 40, dtype=dtype)

    def forward(self, ids):
        return self.proj(self.words(ids) + self.places(ids % 7))


def compressed(dtype=torch.float32, **options):
    return get_rps_model(Table(dtype), RPSConfig(**{"share_embeddings": True, "grad_scaling": "none"} | options))


def small_bert(**options):
    torch.manual_seed(0)
    return BertModel(BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=300,
        max_position_embeddings=64, **options,
    )).eval()  # fmt: skip


def causal(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": True,
    } | options)).eval()  # fmt: skip


def seq2seq():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": 300}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def masked():
    """Its head has a bias, which is tied, too, and its class names what is tied by patterns."""
    return BertForMaskedLM(small_bert().config).eval()


IDS = torch.tensor([[3, 0, 28, 28, 5], [7, 3, 3, 1, 28]])


# ---- rows and their gradient


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_those_of_the_whole_table(options, dtype):
    layer = compressed(dtype, **options).words
    assert isinstance(layer, RPSEmbedding)
    for ids in (IDS, IDS.int(), IDS[0, 0], IDS[:, :0]):
        rows, expected = layer(ids), F.embedding(ids, layer.dense_weight())
        assert rows.shape == expected.shape
        assert rows.dtype == layer.weight.dtype == dtype
        torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
@settings(max_examples=10, deadline=None)
@given(ids=st.lists(st.integers(0, 28), min_size=1, max_size=20))
def test_the_gradient_is_that_of_the_whole_table(options, ids):
    """In float64, rows that come several times and padding among them."""
    model = compressed(torch.float64, **options)
    layer, psi, ids = model.words, find_bank(model).psi, torch.tensor(ids)
    factor = torch.linspace(-1, 1, len(ids) * 40, dtype=torch.float64).view(-1, 40)
    (found,) = torch.autograd.grad((layer(ids) * factor).sum(), psi)
    whole = F.embedding(ids, layer.dense_weight(), padding_idx=3)
    (expected,) = torch.autograd.grad((whole * factor).sum(), psi)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
def test_the_gradient_can_be_differentiated(options):
    model = compressed(torch.float64, **options)
    psi = find_bank(model).psi

    def twice(rows):
        (gradient,) = torch.autograd.grad(rows.pow(3).sum(), psi, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), psi)[0]

    expected = twice(F.embedding(IDS, model.words.dense_weight(), padding_idx=3))
    torch.testing.assert_close(twice(model.words(IDS)), expected)


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("bad", [29, -1])
def test_an_id_that_is_no_row_raises(options, bad):
    """As in torch, whose tables do not count from their end either: no row of another weight is read."""
    layer = compressed(**options).words
    with pytest.raises(IndexError, match="out of range"):
        layer(torch.tensor([0, bad]))


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
def test_a_model_is_its_dense_self(options):
    model = compressed(**options)
    dense = to_dense(copy.deepcopy(model))
    assert (type(dense.words), dense.words.padding_idx) == (nn.Embedding, 3)
    torch.testing.assert_close(model(IDS), dense(IDS))
    with torch.autocast("cpu", torch.bfloat16):  # which leaves tables as they are
        assert model.words(IDS).dtype == dense.words(IDS).dtype == torch.float32
    for name in ("words", "places"):
        assert getattr(model, name).num_embeddings == getattr(dense, name).num_embeddings


@pytest.mark.parametrize("name", ["fold", "codebook", "vectors"])
def test_compiled_and_trained(name):
    torch._dynamo.reset()
    model = compressed(**MAPS[name])
    expected = model(IDS)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(IDS), expected)
    psi = find_bank(model).psi
    (one,), (other,) = (torch.autograd.grad(m(IDS).square().sum(), psi) for m in (compiled, model))
    torch.testing.assert_close(one, other)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(IDS).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- which tables


def names_of(model):
    return {name for name, layer in shared_layers(model).items() if isinstance(layer, RPSEmbedding)}


def _projections(model):
    return sum(layer.weight.numel() for layer in shared_layers(model).values() if not isinstance(layer, RPSEmbedding))


ALL = {f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, set()),
        ({"target_modules": "all-linear"}, set()),
        ({"share_embeddings": True}, ALL),
        ({"share_embeddings": True, "target_modules": "all-linear"}, ALL),
        ({"share_embeddings": True, "target_modules": ["query"]}, ALL),
        ({"target_modules": ["query", "word_embeddings"]}, {"embeddings.word_embeddings"}),
        ({"target_modules": r"embeddings\.\w+_embeddings"}, ALL),
        ({"share_embeddings": True, "exclude_modules": ["word_embeddings"]}, ALL - {"embeddings.word_embeddings"}),
    ],
)
def test_what_chooses_them(options, expected):
    model = small_bert()
    tables = sum(model.get_submodule(name).weight.numel() for name in expected)
    get_rps_model(model, RPSConfig(**options))
    assert names_of(model) == expected
    assert size_report(model).n - _projections(model) == tables


def test_a_convolutional_network_keeps_its_convolutions():
    """They are chosen where there is no linear layer, whether or not there are tables."""
    network = nn.Module()
    network.words, network.body = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3)
    get_rps_model(network, RPSConfig(ratio=0.5, share_embeddings=True))
    assert {type(layer).__name__ for layer in shared_layers(network).values()} == {"RPSEmbedding", "RPSConv"}


def test_a_table_that_computes_something_else_stays_dense():
    """OPT's positions are counted from two on: another forward, which is left alone and can't be named."""
    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=99, word_embed_proj_dim=32,
        max_position_embeddings=16,
    )  # fmt: skip
    model = get_rps_model(OPTModel(config), RPSConfig(share_embeddings=True))
    assert names_of(model) == {"decoder.embed_tokens"}
    with pytest.raises(ValueError, match=r"OPTLearnedPositionalEmbedding"):
        get_rps_model(OPTModel(config), RPSConfig(target_modules=["embed_positions"]))


# ---- what is refused, before anything changes


def test_tables_whose_weight_is_read_otherwise_are_refused():
    """A head that holds the same parameter the other way round, as transformers' Conv1D would."""
    model = Table()
    model.words = nn.Embedding(40, 40)
    model.head = Conv1D(40, 40)
    model.head.weight = model.words.weight
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"chooses 'words', which is tied to 'head', which reads it otherwise"):
        get_rps_model(model, RPSConfig(share_embeddings=True))
    assert not shared_layers(model)
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    get_rps_model(model, RPSConfig(share_embeddings=True, exclude_modules=["words"]))
    assert names_of(model) == {"places"}


def test_a_tied_head_is_not_shared_by_itself():
    with pytest.raises(ValueError, match=r"matches 'lm_head', which is tied to 'model.embed_tokens'"):
        get_rps_model(causal(), RPSConfig(target_modules=["lm_head"]))


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_tables_that_do_more_than_look_up_are_refused(option):
    model = Table()
    model.words = nn.Embedding(29, 40, **option)
    with pytest.raises(ValueError, match="chooses 'words'"):
        get_rps_model(model, RPSConfig(share_embeddings=True))
    with pytest.raises(ValueError, match="matches 'words'"):
        get_rps_model(model, RPSConfig(target_modules=["words", "proj"]))
    assert type(model.words) is nn.Embedding


def test_adapters_refuse_them():
    with pytest.raises(ValueError, match=r"hf_rps\.get_rps_model shares embeddings, adapters don't"):
        get_peft_model(small_bert(), RPSConfig(share_embeddings=True))


@pytest.mark.parametrize("make", [small_bert, causal])
def test_a_vocabulary_cannot_grow_without_a_word(make):
    model = get_rps_model(make(), RPSConfig(share_embeddings=True))
    with pytest.raises(ValueError, match=r"needs an input embedding of 310 rows.*to_dense"):
        model.resize_token_embeddings(310)
    assert model.config.vocab_size == 300
    assert isinstance(model.get_input_embeddings(), RPSEmbedding)
    model = to_dense(model)
    model.resize_token_embeddings(310)
    get_rps_model(model, RPSConfig(share_embeddings=True))
    assert model.get_input_embeddings().num_embeddings == 310


@pytest.mark.parametrize("value", [None, "yes", 1])
def test_the_field_is_true_or_false(value):
    with pytest.raises(ValueError, match="share_embeddings"):
        RPSConfig(share_embeddings=value)


# ---- checkpoints and calibration


@pytest.mark.parametrize("name", ["fold", "folded input", "codebook", "vectors"])
def test_a_fresh_process_reads_the_same(tmp_path, name):
    options = {key: 32 if key == "group_size" else value for key, value in MAPS[name].items()}
    model = get_rps_model(small_bert(), RPSConfig(share_embeddings=True, **options)).eval()
    model.save_pretrained(tmp_path / "model")
    torch.save(ids := torch.arange(40).view(2, 20) * 7 % 300, tmp_path / "ids.pt")
    code = (
        "import sys, torch, hf_rps\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    torch.save(model(torch.load(sys.argv[2])).last_hidden_state, sys.argv[3])\n"
    )
    done = forks().run_code(code, [tmp_path / "model", tmp_path / "ids.pt", tmp_path / "out.pt"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        assert torch.load(tmp_path / "out.pt").equal(model(ids).last_hidden_state)


def test_records_say_it_only_where_it_is_so():
    """Versions that know no such field read all other checkpoints."""
    for asked in (False, True):
        model = get_rps_model(small_bert(), RPSConfig(share_embeddings=asked))
        assert ("share_embeddings" in model.config.quantization_config.to_dict()) == asked


@torch.no_grad()
def test_calibration_takes_tables_as_they_are_and_goes_on_from_them():
    """Their codes do not depend on inputs; those of the layers after them are learned on what they give out."""
    ids = [torch.arange(64).view(4, 16) * step % 300 for step in (7, 11)]
    dense = small_bert()
    plain, calibrated = (
        get_rps_model(copy.deepcopy(dense), RPSConfig(mapping="codebook", bits=3, share_embeddings=True), **options)
        for options in ({}, {"calibration": [{"input_ids": batch} for batch in ids]})
    )
    expected = dense(ids[0]).last_hidden_state
    errors = [(m.eval()(ids[0]).last_hidden_state - expected).norm() for m in (plain, calibrated)]
    assert errors[1] < errors[0]
    tables = [m.embeddings.word_embeddings.dense_weight() for m in (plain, calibrated)]
    assert tables[0].equal(tables[1])


def test_bits_of_their_own(tmp_path):
    """A part that is compressed by itself has an array, and settings, of its own."""
    model = small_bert()
    get_rps_model(model.embeddings, RPSConfig(mapping="codebook", bits=8, tile=2, share_embeddings=True))
    get_rps_model(model.encoder, RPSConfig(mapping="codebook", bits=3))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again.embeddings.word_embeddings) is RPSEmbedding
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert again(ids).last_hidden_state.equal(model(ids).last_hidden_state)


# ---- tied tables and heads


TIED = {"llama": causal, "t5": seq2seq, "bert": masked}
TIED_MAPS = {"fold": {"ratio": 0.2}, "codebook": {"mapping": "codebook", "bits": 4}}


def logits_of(model, ids):
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("options", TIED_MAPS.values(), ids=TIED_MAPS)
@pytest.mark.parametrize("make", TIED.values(), ids=TIED)
def test_a_head_reads_what_the_table_does(make, options, tmp_path):
    """One target, several readers: counted once, trained by all of them, and saved once."""
    dense, ids = make(), torch.arange(32).view(2, 16) * 7 % 300
    model = get_rps_model(make(), RPSConfig(share_embeddings=True, **options))
    head = model.get_output_embeddings()
    table = model.get_input_embeddings()
    assert (type(table), type(head)) == (RPSEmbedding, RPSLinear)
    assert head.bias is None or head.bias is model.cls.predictions.bias
    assert head.dense_weight().equal(table.dense_weight())
    targets = find_bank(model).weight_map.targets
    assert len({target.name for target in targets}) == len(targets) < len(shared_layers(model))
    untied = to_dense(copy.deepcopy(model))
    torch.testing.assert_close(logits_of(model, ids), logits_of(untied, ids))
    assert untied.get_output_embeddings().weight is untied.get_input_embeddings().weight
    assert untied.all_tied_weights_keys == dense.all_tied_weights_keys
    untied.tie_weights()
    model.tie_weights()  # nothing is left to tie

    expected = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert logits_of(again, ids).equal(expected)
    assert type(again.get_output_embeddings()) is RPSLinear
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    untied.save_pretrained(tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense")
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    torch.testing.assert_close(logits_of(plain.eval(), ids), expected)


@pytest.mark.parametrize("options", [{"ratio": 0.2}, {"mapping": "codebook", "bits": 4}])
def test_a_tied_table_is_counted_once(options):
    """Its bytes, dense and now, are those of the parameters; a look-up multiplies nothing, its head does."""
    dense = causal()
    model = get_rps_model(causal(), RPSConfig(share_embeddings=True, **options))
    report = size_report(model)
    assert report.dense_parameters == sum(p.numel() for p in dense.parameters())
    assert report.dense_bytes == 4 * report.dense_parameters
    assert report.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert report.code_bytes == sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    assert report.dense_multiplications == report.n


def test_a_table_that_is_a_head_is_calibrated_as_one():
    """Where the head has inputs of very unequal size, what it gives out is kept better."""
    ids = [{"input_ids": torch.arange(128).view(4, 32) * step % 300} for step in (7, 11, 13, 17)]
    dense = causal()
    with torch.no_grad():
        dense.model.norm.weight[:4] *= 50
        expected = dense(**ids[0]).logits

    @torch.no_grad()
    def error(**calibration):
        model = copy.deepcopy(dense)
        config = RPSConfig(mapping="codebook", bits=3, target_modules=["embed_tokens"])
        return (get_rps_model(model, config, **calibration)(**ids[0]).logits - expected).norm()

    assert error(calibration=ids) < 0.75 * error()


def test_the_gradient_of_a_tied_table_is_that_of_both_readers():
    model = get_rps_model(causal(), RPSConfig(share_embeddings=True, ratio=0.3, grad_scaling="none")).double()
    ids = torch.arange(20).view(2, 10) * 7 % 300
    model(input_ids=ids, labels=ids).loss.backward()
    dense = to_dense(copy.deepcopy(model))
    dense.zero_grad()
    dense(input_ids=ids, labels=ids).loss.backward()
    psi, expected = find_bank(model).psi, torch.zeros_like(find_bank(model).psi)
    for name, matrix in find_bank(model).array.matrices.items():
        matrix.add_adjoint(expected, dense.model.get_submodule(name).weight.grad)
    torch.testing.assert_close(psi.grad, expected)


@pytest.mark.parametrize("options", TIED_MAPS.values(), ids=TIED_MAPS)
def test_a_head_is_put_on_and_taken_off(tmp_path, options):
    """The base model's files have no head; the class ties one to the table, as with dense files."""
    model, ids = get_rps_model(causal(), RPSConfig(share_embeddings=True, **options)), torch.arange(16)[None]
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    base.save_pretrained(tmp_path / "base")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert again(ids).logits.equal(expected)
    again.save_pretrained(tmp_path / "again")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "again").eval()(ids).logits.equal(expected)


@pytest.mark.parametrize("shared", ["embed_tokens", "lm_head"])
def test_what_was_untied_stays_untied(tmp_path, shared):
    """Also where the config still says that the two are tied."""
    model, ids = causal(), torch.arange(16)[None]
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    get_rps_model(model, RPSConfig(target_modules=[shared, "q_proj"], ratio=0.5))
    kept = model.lm_head if shared == "embed_tokens" else model.model.embed_tokens
    assert type(kept) in (nn.Linear, nn.Embedding)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again(ids).logits.equal(model.eval()(ids).logits)


@pytest.mark.parametrize("shared", ["embed_tokens", "lm_head"])
def test_what_is_shared_by_itself_is_not_tied_afterwards(shared):
    model, ids = causal(tie_word_embeddings=False), torch.arange(16)[None]
    get_rps_model(model, RPSConfig(target_modules=[shared, "q_proj"], ratio=0.5))
    before, model.config.tie_word_embeddings = model(ids).logits, True
    with pytest.raises(ValueError, match=r"tie_weights\(\) would tie.*share_embeddings=True"):
        model.tie_weights()
    assert model(ids).logits.equal(before)


def test_a_record_of_ties_that_is_none_is_refused(tmp_path):
    model = get_rps_model(causal(), RPSConfig(share_embeddings=True))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["tied"] == {"/lm_head": "embed_tokens"}
    config["quantization_config"]["tied"] = ["lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantization_config\.tied must be names by name"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_config_of_the_map_gives_it_again():
    model = get_rps_model(causal(), RPSConfig(share_embeddings=True, ratio=0.3))
    again = get_rps_model(causal(), get_rps_config(model))
    again.load_state_dict(model.state_dict())
    assert type(again.lm_head) is RPSLinear
    ids = torch.arange(16)[None]
    assert again(ids).logits.equal(model(ids).logits)


def test_adapters_of_a_learned_map_with_a_tied_head(tmp_path):
    """Its codebooks are those of all compressed layers, the table and its head among them."""
    ids = torch.arange(32).view(2, 16) * 7 % 300
    base = get_rps_model(causal(), RPSConfig(mapping="codebook", bits=4, share_embeddings=True))
    base.save_pretrained(tmp_path / "base")
    before = base(input_ids=ids).logits.detach()
    model = get_peft_model(base, RPSConfig(mapping="codebook"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.eval()(input_ids=ids).logits.detach()
    assert (after - before).abs().max() > 0.1
    with model.disable_adapter():
        assert model(input_ids=ids).logits.equal(before)
    model.save_pretrained(tmp_path / "adapter")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert PeftModel.from_pretrained(again, tmp_path / "adapter").eval()(input_ids=ids).logits.equal(after)
    assert model.merge_and_unload().eval()(input_ids=ids).logits.equal(after)
