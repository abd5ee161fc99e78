"""A part of the compressed layers can't be frozen: refused before compressing, and noticed afterwards."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_rps import RPSConfig, get_rps_model, to_dense
from hf_rps.conversion import find_bank
from hf_rps.layers.base import RPSLayer

FROZEN = r"frozen after compressing.*exclude_modules.*get_rps_model\(model\.part.*layer\.requires_grad_\(True\)"
LABELS = torch.tensor([0, 1])


@pytest.fixture
def bert(tiny):
    return tiny("bert", AutoModelForSequenceClassification)


@pytest.fixture
def compressed(bert):
    return get_rps_model(bert, RPSConfig(ratio=0.25))


def step(model, ids):
    model(ids, labels=LABELS).loss.backward()


def layers(model):
    return [module for module in model.modules() if isinstance(module, RPSLayer)]


# ---- before compressing


def test_some_frozen_targets_are_refused_before_anything_changes(bert):
    bert.bert.encoder.layer[0].requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in bert.named_parameters()}
    message = r"'bert\.encoder\.layer\.0\.attention\.self\.query' is frozen \(6 of the 13 targets"
    with pytest.raises(ValueError, match=rf"{message}.*exclude_modules.*get_rps_model\(model\.part"):
        get_rps_model(bert, RPSConfig(ratio=0.25))
    assert not layers(bert)
    assert before.keys() == dict(bert.named_parameters()).keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in bert.named_parameters())


def test_the_remedies_hold_what_they_promise(bert, ids):
    """Left out, the frozen block does not move; compressed by itself, only the trained part does."""
    part = copy.deepcopy(bert)
    for model in (bert, part):
        model.bert.encoder.layer[0].requires_grad_(False)
    get_rps_model(bert, RPSConfig(ratio=0.25, exclude_modules=r".*layer\.0\..*"))
    get_rps_model(part.bert.encoder.layer[1], RPSConfig(ratio=0.25))
    for model in (bert, part):
        frozen = model.bert.encoder.layer[0]
        before = {name: parameter.clone() for name, parameter in frozen.named_parameters()}
        trained = model.bert.encoder.layer[1].attention.self.query.dense_weight().detach().clone()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        step(model, ids)
        optimizer.step()
        assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.named_parameters())
        assert not torch.equal(model.bert.encoder.layer[1].attention.self.query.dense_weight(), trained)


# ---- at a layer


def test_a_layer_is_frozen_and_unfrozen_with_the_array_only(compressed):
    layer, bank = compressed.bert.encoder.layer[0].attention.self.query, find_bank(compressed)
    with pytest.raises(
        RuntimeError, match=r"can't freeze 'encoder\.layer\.0\.attention\.self\.query'.*exclude_modules"
    ):
        layer.requires_grad_(False)
    assert layer.bias.requires_grad
    assert layer.requires_grad_(True) is layer
    for freeze in (lambda: setattr(layer.weight, "requires_grad", False), lambda: layer.weight.requires_grad_(False)):
        with pytest.raises(RuntimeError, match="exclude_modules"):
            freeze()
    compressed.requires_grad_(False)
    assert layer.requires_grad_(False) is layer
    with pytest.raises(RuntimeError, match=r"can't unfreeze .* by itself.*model\.requires_grad_\(True\)"):
        layer.requires_grad_(True)
    assert not layer.bias.requires_grad
    compressed.requires_grad_(True)
    assert bank.psi.requires_grad
    assert layer.bias.requires_grad


# ---- around layers


def freeze_by_loop(block):
    for parameter in block.parameters():
        parameter.requires_grad = False


WAYS = {"requires_grad_": lambda block: block.requires_grad_(False), "loop": freeze_by_loop}
COPIES = {"itself": lambda m: m, "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_block_that_is_frozen_afterwards_is_noticed(compressed, ids, way, copied):
    step(compressed, ids)
    WAYS[way](compressed.bert.encoder.layer[1])
    model = COPIES[copied](compressed)
    with torch.no_grad():
        expected = model(ids).logits
    for _ in range(2):  # as long as it is so
        with pytest.raises(RuntimeError, match=rf"'bert\.encoder\.layer\.1' were {FROZEN}"):
            step(model, ids)
    model.bert.encoder.layer[1].requires_grad_(True)
    step(model, ids)
    torch.testing.assert_close(model(ids).logits, expected)


def test_layers_without_a_bias_are_seen_by_their_norms(tiny, ids):
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.25))
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'model\.layers\.0' were frozen after compressing \(7 of 21 "):
        model(ids, labels=ids).loss.backward()


def test_a_loaded_checkpoint_is_watched_and_a_part_called_by_itself_too(compressed, ids, tmp_path):
    compressed.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model.bert.encoder.layer[0].requires_grad_(False)
    for call in (lambda: step(model, ids), lambda: model.bert(ids)):
        with pytest.raises(RuntimeError, match=FROZEN):
            call()
    base = AutoModel.from_pretrained(tmp_path)
    base.encoder.layer[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=rf"'encoder\.layer\.0' were {FROZEN}"):
        base(ids)


def test_what_is_meant_is_allowed(compressed, ids):
    def trains():
        step(compressed, ids)
        assert find_bank(compressed).psi.grad is not None
        compressed.zero_grad()

    biases = [layer.bias for layer in layers(compressed)]
    for bias in biases:  # all of them: just these parameters are meant
        bias.requires_grad_(False)
    trains()
    compressed.requires_grad_(True)
    compressed.bert.embeddings.requires_grad_(False)  # no compressed layer in it
    trains()
    compressed.requires_grad_(False)  # all but the array
    find_bank(compressed).psi.requires_grad_(True)
    trains()
    compressed.requires_grad_(True)
    compressed.bert.requires_grad_(False)  # the array with them
    step(compressed, ids)
    assert find_bank(compressed).psi.grad is None


def test_all_layers_frozen_without_the_array_is_told_once(tiny, ids, caplog):
    """Norms are all that a block has beside the array: they may be meant alone, so it is no error."""
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.25))
    model.model.layers.requires_grad_(False)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
    (record,) = [record for record in caplog.records if record.name == "hf_rps.freezing"]
    assert record.levelname == "WARNING"
    assert "psi.requires_grad_(False)" in record.message
    caplog.clear()
    model.requires_grad_(False)
    find_bank(model).psi.requires_grad_(True)  # nothing else is trained: that was meant
    copy.deepcopy(model)(ids, labels=ids).loss.backward()
    assert not [record for record in caplog.records if record.name == "hf_rps.freezing"]


def test_it_can_be_said_that_the_weights_of_a_block_stay_trained(compressed, ids):
    block = compressed.bert.encoder.layer[0]
    for layer in layers(block):
        layer.requires_grad_(True)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    step(compressed, ids)
    step(compressed, ids)
    assert find_bank(compressed).psi.grad.abs().sum() > 0
    block.requires_grad_(True)
    compressed.bert.encoder.layer[1].requires_grad_(False)  # of this one it was not said
    with pytest.raises(RuntimeError, match=rf"'bert\.encoder\.layer\.1' were {FROZEN}"):
        step(compressed, ids)


def test_what_was_frozen_before_compressing_says_nothing(bert, ids):
    for name, parameter in bert.bert.encoder.layer[0].named_parameters():
        parameter.requires_grad_(name.endswith("weight") and "LayerNorm" not in name)
    step(get_rps_model(bert, RPSConfig(ratio=0.25)), ids)


def test_parameters_may_be_replaced_and_moved(tiny, ids):
    """As loaders, FSDP and parametrizations do: witnesses are found by module and name, and found again."""
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.25))
    model(ids, labels=ids).loss.backward()
    for block in model.model.layers:
        block.input_layernorm.weight = nn.Parameter(block.input_layernorm.weight.detach().clone())
        parametrizations.weight_norm(block.post_attention_layernorm, dim=None)
    model(ids, labels=ids).loss.backward()
    model.model.layers[2].requires_grad_(False)
    with pytest.raises(RuntimeError, match=rf"'model\.layers\.2' were {FROZEN}"):
        model(ids, labels=ids)


def test_functional_call_with_tensors_is_no_freezing(compressed, ids):
    name = "bert.encoder.layer.0.attention.self.query.bias"
    bias = dict(compressed.named_parameters())[name].detach().clone()
    expected = compressed(ids, labels=LABELS).loss
    torch.testing.assert_close(
        torch.func.functional_call(compressed, {name: bias}, (ids,), {"labels": LABELS}).loss, expected
    )


def test_the_watch_keeps_no_model_alive_and_goes_with_the_compression(compressed, ids):
    step(compressed, ids)
    watched = find_bank(compressed).array.passes.before
    dense = to_dense(compressed)
    dense.bert.encoder.layer[0].requires_grad_(False)
    step(dense, ids)
    model = get_rps_model(copy.deepcopy(dense).requires_grad_(True), RPSConfig(ratio=0.25))
    step(model, ids)
    assert find_bank(model).array.passes.before is not watched
    reference = weakref.ref(model.bert.encoder.layer[0].output.LayerNorm)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{"ratio": 0.25}, {"mapping": "codebook", "bits": 2}])
def test_a_part_without_any_parameter_of_its_own(tiny, ids, options):
    """A Llama's MLP: its three weights are all that there is to freeze, and nothing beside them could be a witness.

    Codes of a learned map are parameters, too, which are frozen as it is.
    """
    model = get_rps_model(tiny("llama"), RPSConfig(**options))
    with pytest.raises(RuntimeError, match="exclude_modules"):
        model.model.layers[1].mlp.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)  # as it is
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(False)
    with pytest.raises(RuntimeError, match="Unfreeze the array"):
        model.model.layers[1].mlp.requires_grad_(True)
    nn.Identity().requires_grad_(False)  # what has no parameter at all
