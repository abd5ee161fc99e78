"""A pretrained model compressed with a learned map: used, saved, loaded, trained, taken apart, refused."""

import copy
import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from tiny_models import CASES
from transformers import AutoModel, AutoModelForMaskedLM, ResNetConfig, ResNetForImageClassification

import hf_rps
from hf_rps import RPSConfig, get_rps_config, get_rps_model, size_report, to_dense
from hf_rps.conversion import find_bank, shared_layers
from hf_rps.mappings.codes import packed_size

BY_NAME = {case.name: case for case in CASES}
LEARNED = {"mapping": "codebook", "bits": 2}
VECTORS = {"mapping": "codebook", "bits": 4, "tile": 2}


def first(output):
    return next(value for value in output.values() if torch.is_tensor(value) and value.is_floating_point())


def distance(model, dense, batch):
    with torch.no_grad():
        expected = first(dense(**batch))
        return ((first(model(**batch)) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("name", "options"), [(name, LEARNED) for name in sorted(BY_NAME)] + [("llama", VECTORS), ("gpt2", VECTORS)]
)
def test_every_architecture(name, options, tmp_path):
    """Calibrated it is nearer to the dense model than by k-means alone, and reloads bit-equal."""
    case = BY_NAME[name]
    dense, batches = case.build(), [case.batch(seed) for seed in (1, 2)]
    plain = get_rps_model(copy.deepcopy(dense), RPSConfig(**options))
    model = copy.deepcopy(dense)
    mode, state = model.training, copy.deepcopy(model.state_dict())
    model = get_rps_model(model, RPSConfig(**options), calibration=batches)
    assert model.training == mode
    shared = {f"{layer_name}.{layer.parameter}" for layer_name, layer in shared_layers(model).items()}
    for key, value in model.state_dict().items():
        if key in state and key not in shared:
            assert torch.equal(value, state[key]), key
    seen = sum(distance(model, dense, batch) for batch in batches), sum(distance(plain, dense, b) for b in batches)
    assert seen[0] < seen[1] < 2 * 2, seen
    model.save_pretrained(tmp_path)
    again = case.model_class.from_pretrained(tmp_path).train(mode)
    with torch.no_grad():
        assert torch.equal(first(again(**batches[0])), first(model(**batches[0])))
    weights = {layer_name: layer.dense_weight() for layer_name, layer in shared_layers(model).items()}
    to_dense(again)
    for layer_name, weight in weights.items():
        assert torch.equal(again.get_submodule(layer_name).weight, weight)


@pytest.mark.parametrize("tile", [1, 2])
def test_convolutions_learn_from_their_weights(tile, tmp_path):
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3)
    torch.manual_seed(0)
    dense, x = ResNetForImageClassification(config).eval(), torch.randn(2, 3, 32, 32)
    model = get_rps_model(
        copy.deepcopy(dense), RPSConfig(mapping="codebook", bits=4 * tile, tile=tile), calibration=[{"pixel_values": x}]
    )
    assert distance(model, dense, {"pixel_values": x}) < 0.2
    model.save_pretrained(tmp_path)
    again = ResNetForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


@pytest.fixture
def llama():
    return BY_NAME["llama"].build(), BY_NAME["llama"].batch()


@pytest.mark.parametrize("options", [LEARNED, VECTORS])
def test_a_new_process_loads_it_and_a_mixed_file_is_refused(llama, options, tmp_path):
    dense, batch = llama
    model = get_rps_model(copy.deepcopy(dense), RPSConfig(**options), calibration=[batch])
    model.save_pretrained(tmp_path / "a")
    torch.save({"batch": batch, "output": first(model(**batch)).detach()}, tmp_path / "expected.pt")
    code = (
        f"import torch, hf_rps; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained("
        f"{str(tmp_path / 'a')!r}); e = torch.load({str(tmp_path / 'expected.pt')!r}); "
        f"assert torch.equal(m(**e['batch']).logits, e['output'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    # other codes of the same model have other names: neither its files nor its state dict load here
    other = get_rps_model(copy.deepcopy(dense), RPSConfig(**options))
    assert find_bank(other).weight_map.fingerprint != find_bank(model).weight_map.fingerprint
    with pytest.raises(RuntimeError, match="belongs to the map"):
        other.load_state_dict(model.state_dict())
    other.save_pretrained(tmp_path / "b")
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="rps_fingerprint"):
        type(model).from_pretrained(tmp_path / "a")


def test_the_file_is_as_small_as_its_parts(llama, tmp_path):
    dense, _ = llama
    model = get_rps_model(dense, RPSConfig(mapping="codebook", bits=3))
    model.save_pretrained(tmp_path)
    bank, layers = find_bank(model), shared_layers(model).values()
    codes = sum(layer.shared.target.out_features * packed_size(layer.shared.target.in_features, 3) for layer in layers)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert sum(t.numel() for key, t in found.items() if ".codes_" in key) == codes
    assert all(t.dtype == torch.uint8 for key, t in found.items() if ".codes_" in key)
    assert bank.psi.numel() == sum(layer.shared.target.out_features * 8 for layer in layers)
    report = size_report(model)
    assert report.code_bytes == codes
    assert report.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert report.dense_bytes == 4 * report.dense_parameters
    assert f"{8 * (codes + 4 * bank.psi.numel()) / report.n:.2f} bits" in str(report)
    # vectors: a code for two weights, books of the matrix, and two bytes of each row for its scale
    model = get_rps_model(BY_NAME["llama"].build(), RPSConfig(**VECTORS))
    targets = [layer.shared.target for layer in shared_layers(model).values()]
    assert find_bank(model).psi.numel() == len(targets) * 16 * 2
    found = sum(target.out_features * (packed_size(target.in_features // 2, 4) + 2) for target in targets)
    assert size_report(model).code_bytes == found


@pytest.mark.parametrize("options", [LEARNED, VECTORS])
def test_only_the_codebooks_are_trained(llama, options):
    dense, batch = llama
    model = get_rps_model(dense, RPSConfig(**options), calibration=[batch]).train()
    model.requires_grad_(False).requires_grad_(True)
    codes = {name: p.clone() for name, p in model.named_parameters() if not p.is_floating_point()}
    assert len(codes) == len(shared_layers(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, codes[name]) for name, p in model.named_parameters() if name in codes)


@pytest.mark.parametrize("options", [LEARNED, VECTORS])
def test_its_gradient_is_that_of_the_definition(llama, options):
    dense, batch = llama
    model = get_rps_model(dense, RPSConfig(**options, grad_scaling="none"))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    found = find_bank(model).psi.grad.clone()
    plain = to_dense(copy.deepcopy(model))
    plain.zero_grad()
    plain(**batch, labels=batch["input_ids"]).loss.backward()
    expected = torch.zeros_like(found)
    for name, layer in shared_layers(model).items():
        layer.shared.matrix.add_adjoint(expected, plain.get_submodule(name).weight.grad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_class_without_some_of_the_layers_trains(tmp_path):
    """Of the pooler's codebooks, which nobody reads there, the gradient is zero."""
    case = BY_NAME["bert"]
    model = get_rps_model(AutoModel.from_config(case.build().config), RPSConfig(**LEARNED))
    model.save_pretrained(tmp_path)
    headed = AutoModelForMaskedLM.from_pretrained(tmp_path)
    names = {layer.name for layer in shared_layers(headed).values()}
    unused = [t for t in find_bank(headed).weight_map.targets if t.name not in names]
    assert [target.name for target in unused] == ["pooler.dense"]
    headed(**case.batch()).logits.square().sum().backward()
    gradient = find_bank(headed).psi.grad
    assert gradient.isfinite().all()
    assert gradient.norm() > 0
    assert (find_bank(headed).array.matrices["pooler.dense"].books(gradient) == 0).all()


@pytest.mark.parametrize("options", [LEARNED, VECTORS])
def test_a_copy_a_cast_and_the_same_map_again(llama, options):
    dense, batch = llama
    model = get_rps_model(copy.deepcopy(dense), RPSConfig(**options))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        find_bank(twin).psi.mul_(2)
        assert not torch.equal(first(twin(**batch)), first(model(**batch)))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16, torch.uint8}
    assert torch.isfinite(first(half(**batch))).all()
    again = get_rps_model(copy.deepcopy(dense), get_rps_config(model))  # the same weights learn the same
    again.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="these weights and inputs give others"):
        get_rps_model(BY_NAME["llama"].build(seed=1), get_rps_config(model))


def test_texts_need_a_tokenizer(llama, caplog):
    dense, _ = llama

    class Tokenizer:
        def __call__(self, text, truncation, max_length, return_tensors):
            return {"input_ids": torch.tensor([[ord(letter) % 80 + 8 for letter in text]])}

    texts = ["one text", "and another one"]
    with pytest.raises(ValueError, match="no tokenizer is found"):
        get_rps_model(dense, RPSConfig(**LEARNED), calibration=texts)
    assert not shared_layers(dense)
    with pytest.raises(ValueError, match="calibration is empty"):  # and not the weights alone, without a word
        get_rps_model(dense, RPSConfig(**LEARNED), calibration=["", ""], tokenizer=Tokenizer())
    plain = get_rps_model(copy.deepcopy(dense), RPSConfig(**LEARNED))
    model = get_rps_model(copy.deepcopy(dense), RPSConfig(**LEARNED), calibration=texts, tokenizer=Tokenizer())
    batch = Tokenizer()(texts[0], True, 9, "pt")
    assert distance(model, dense, batch) < distance(plain, dense, batch)
    with caplog.at_level(logging.INFO, "hf_rps"):
        get_rps_model(dense, RPSConfig(**LEARNED))
    assert "learned from the weights alone" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": 4, "group_size": 0}, "group_size=0"),
        ({"tile": 0}, "tile=0"),
        ({"tile": 3, "group_size": 64}, "group_size=64 is no multiple of tile=3"),
        ({"mapping": "fold", "tile": 2}, "tile=2 has no meaning with mapping='fold'"),
        ({"ratio": 0.1}, "ratio=0.1 has no meaning with mapping='codebook': what is stored follows from bits=4"),
        ({"mode": "delta"}, "mode='delta' has no meaning"),
        ({"sharing": "block"}, "sharing='block' has no meaning"),
        ({"sign": "none"}, "sign='none' has no meaning"),
        ({"input_fold": 4}, "input_fold=4 has no meaning"),
        ({"init_weights": False}, "init_weights=False"),
        ({"mapping": "fold", "bits": 4}, "bits=4 has no meaning with mapping='fold'"),
        ({"mapping": "hash", "group_size": 4}, "group_size=4 has no meaning with mapping='hash'"),
    ],
)
def test_a_config_without_meaning(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        RPSConfig(**({"mapping": "codebook"} | options))


def test_refused_before_anything_is_changed(llama):
    dense, batch = llama
    state = copy.deepcopy(dense.state_dict())
    for options, calibration, message in (
        ({"ratio": 0.1}, [batch], "calibration is for a map that is learned"),
        (LEARNED, [], "calibration is empty"),
        (LEARNED, "a text", "list of texts"),
        (LEARNED, batch, "list of texts or of batches"),
        ({"mapping": "codebook", "bits": 8}, None, "more than the weights"),
    ):
        with pytest.raises(ValueError, match=message):
            get_rps_model(dense, RPSConfig(**options), calibration=calibration)
    assert not shared_layers(dense)
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())


def test_the_config_of_other_models_does_not_mention_it(llama, tmp_path):
    dense, _ = llama
    get_rps_model(dense, RPSConfig(ratio=0.5)).save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert not {"bits", "group_size", "tile", "learned"} & recorded.keys()
    assert hf_rps.RPSConfig().ratio == 0.1
