"""get_rps_model and to_dense on real models: exact at ratio 1, projected or rescaled below, stable in training."""

import copy
import math

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_rps import RPSConfig, get_rps_model, size_report, to_dense
from hf_rps.conversion import find_bank
from hf_rps.layers.linear import RPSLinear
from hf_rps.mappings import definition

SMALLEST = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}  # for dense (n, m) matrices


def rps_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, RPSLinear)]


def dense_step(model, ids, optimizer_class=torch.optim.SGD, **options):
    optimizer = optimizer_class(model.parameters(), **options)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def flat_weights(model, names):
    """All targeted weights, as (out, in), end to end."""
    parts = []
    for name in names:
        module = model.get_submodule(name)
        weight = module.dense_weight() if isinstance(module, RPSLinear) else module.weight
        conv1d = getattr(module, "transposed", type(module).__name__ == "Conv1D")
        parts.append((weight.t() if conv1d else weight).detach().flatten())
    return torch.cat(parts)


def sharing_matrix(bank):
    """R with W = R psi, dense (n, m)."""
    weight_map = bank.weight_map
    matrix = torch.zeros(weight_map.n, weight_map.m, dtype=torch.float64)
    start = 0
    for target in weight_map.targets:
        slots = torch.from_numpy(weight_map.slots(target.name)).flatten()
        signs = torch.from_numpy(weight_map.signs(target.name)).expand(target.out_features, target.in_features)
        rows = torch.arange(start, start + target.numel)
        matrix[rows, slots] = signs.flatten().double() * weight_map.scale(target.name)
        start += target.numel
    return matrix


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("sharing", ["global", "block"])
@pytest.mark.parametrize("init_weights", ["project", "rescale"])
def test_ratio_one_is_the_dense_model_and_to_dense_gives_it_back(tiny, ids, kind, sharing, init_weights):
    model = tiny(kind)
    before, keys = model(ids).logits, list(model.state_dict())
    kind_of_layers = {name: type(module) for name, module in model.named_modules()}
    same = get_rps_model(model, RPSConfig(ratio=1, sharing=sharing, init_weights=init_weights))
    assert same is model
    torch.testing.assert_close(model(ids).logits, before)
    assert to_dense(model) is model
    torch.testing.assert_close(model(ids).logits, before)
    assert sorted(model.state_dict()) == sorted(keys)
    assert {name: type(module) for name, module in model.named_modules()} == kind_of_layers
    assert not hasattr(model.config, "quantization_config")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_default_targets(tiny):
    assert rps_names(get_rps_model(tiny("gpt2"), RPSConfig())) == [
        f"transformer.h.{i}.{name}"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    model = get_rps_model(tiny("bert", AutoModelForSequenceClassification), RPSConfig())
    assert len(rps_names(model)) == 2 * 6 + 1  # and the pooler
    assert isinstance(model.classifier, torch.nn.Linear)
    assert len(rps_names(get_rps_model(tiny("llama"), RPSConfig()))) == 3 * 7


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 6),
        ({"target_modules": r".*\.mlp\..*"}, 9),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 18),
        ({"layers_to_transform": 1}, 7),
        ({"layers_to_transform": [0, 2], "target_modules": ["q_proj"]}, 2),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, 7),
        ({"modules_to_save": ["mlp"]}, 12),
        ({"exclude_modules": r".*self_attn.*"}, 9),
    ],
)
def test_target_selection(tiny, options, count):
    assert len(rps_names(get_rps_model(tiny("llama"), RPSConfig(**options)))) == count


def test_projection_is_the_least_squares_fit(tiny):
    model = tiny("llama", **SMALLEST).double()
    dense = copy.deepcopy(model)
    get_rps_model(model, RPSConfig(ratio=0.3, init_weights="project"))
    matrix = sharing_matrix(find_bank(model))
    best = torch.linalg.lstsq(matrix, flat_weights(dense, rps_names(model))[:, None]).solution[:, 0]
    torch.testing.assert_close(find_bank(model).psi.detach(), best)


@pytest.mark.parametrize("ratio", [0.5, 0.05])
def test_random_models_keep_every_modules_own_std(tiny, ratio):
    model = tiny("llama", hidden_size=128, intermediate_size=256)
    for i, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.weight.data *= 3 + i
    stds = {name: module.weight.std().item() for name, module in model.named_modules() if name.endswith("_proj")}
    get_rps_model(model, RPSConfig(ratio=ratio))
    for name in rps_names(model):
        assert model.get_submodule(name).dense_weight().std().item() == pytest.approx(stds[name], rel=0.12)


def test_automatic_init_projects_trained_and_rescales_random_models(tiny):
    for trained in (False, True):
        model = tiny("llama")
        if trained:  # rows of unequal size, as training leaves them
            for name, parameter in model.named_parameters():
                if name.endswith("_proj.weight"):
                    parameter.data.mul_(torch.rand(len(parameter), 1) + 0.5)
        std = model.model.layers[0].mlp.up_proj.weight.std().item() * (math.sqrt(0.1) if trained else 1)
        get_rps_model(model, RPSConfig(ratio=0.1))
        assert model.model.layers[0].mlp.up_proj.dense_weight().std().item() == pytest.approx(std, rel=0.15)


def test_fresh_draws_follow_torchs_generator_and_the_map_does_not(tiny):
    banks = []
    for seed in (0, 0, 1):
        model = tiny("llama")
        torch.manual_seed(seed)
        banks.append(find_bank(get_rps_model(model, RPSConfig(init_weights=False))))
    assert torch.equal(banks[0].psi, banks[1].psi)
    assert not torch.equal(banks[0].psi, banks[2].psi)
    assert banks[0].weight_map.fingerprint == banks[2].weight_map.fingerprint
    assert banks[0].psi.std().item() == pytest.approx(banks[0].weight_map.init_std, rel=0.05)


def test_one_sgd_step_is_the_orthogonal_projection_of_the_dense_step(tiny, ids):
    model = get_rps_model(tiny("llama", **SMALLEST).double(), RPSConfig(ratio=0.2, grad_scaling="projection"))
    dense, names = to_dense(copy.deepcopy(model)), rps_names(model)
    matrix = sharing_matrix(find_bank(model))
    before = flat_weights(dense, names)
    torch.testing.assert_close(flat_weights(model, names), before)
    dense_step(dense, ids, lr=0.1)
    dense_step(model, ids, lr=0.1)
    step, dense_moved = flat_weights(model, names) - before, flat_weights(dense, names) - before
    orthonormal, _ = torch.linalg.qr(matrix)
    torch.testing.assert_close(step, orthonormal @ (orthonormal.t() @ dense_moved), rtol=1e-9, atol=1e-13)
    assert 0 < step.norm() < dense_moved.norm()


def test_sgd_trajectory_does_not_depend_on_init_std(tiny, ids):
    def weights(**options):
        model = get_rps_model(tiny("llama"), RPSConfig(ratio=0.1, **options))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(10):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return flat_weights(model, rps_names(model))

    reference = weights()
    for init_std in (1e-3, 0.1, 10.0):
        torch.testing.assert_close(weights(init_std=init_std), reference, rtol=1e-3, atol=1e-5)
    unstable = weights(init_std=1e-3, grad_scaling="none")
    assert not torch.allclose(unstable, reference, rtol=0.1, atol=1e-2)


def test_sgd_at_ratio_one_follows_the_dense_model(tiny, ids):
    model, dense = get_rps_model(tiny("llama").double(), RPSConfig(ratio=1)), tiny("llama").double()
    names = rps_names(model)
    for m in (model, dense):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            m(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(flat_weights(model, names), flat_weights(dense, names))


def test_an_adamw_step_moves_weights_by_the_learning_rate_times_cube_root_of_the_compression(tiny, ids):
    """The default C makes every scale about (n / m)**(1/3), the growth of the best learning rate that was measured."""
    ratio, lr = 0.1, 1e-3
    model = get_rps_model(tiny("llama"), RPSConfig(ratio=ratio, grad_scaling="norm"))
    names = rps_names(model)
    before = flat_weights(model, names)
    dense_step(model, ids, torch.optim.AdamW, lr=lr, weight_decay=0.0)
    rms = (flat_weights(model, names) - before).square().mean().sqrt().item()
    assert rms == pytest.approx((1 / ratio) ** (1 / 3) * lr, rel=0.05)


def test_norm_scaling_keeps_the_size_of_gradients_at_ratio_a_thousandth(tiny, ids):
    """Clipping and Adam's eps keep their meaning: psi's gradient has the norm of the projected dense gradient."""
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3}
    norms = {}
    for scaling in ("norm", "projection"):
        model = get_rps_model(tiny("llama", **sizes), RPSConfig(ratio=0.001, grad_scaling=scaling))
        dense, names, bank = to_dense(copy.deepcopy(model)), rps_names(model), find_bank(model)
        dense(ids, labels=ids).loss.backward()
        gradient = torch.cat([dense.get_submodule(name).weight.grad.flatten() for name in names])
        model(ids, labels=ids).loss.backward()
        norms[scaling] = bank.psi.grad.norm().item()
    summed = sharing_matrix(bank).float().t() @ gradient
    projected = (summed / torch.from_numpy(definition.gamma(bank.weight_map)).sqrt().float()).norm().item()
    assert norms["norm"] == pytest.approx(projected, rel=1e-4)
    k = bank.weight_map.n / bank.weight_map.m
    # Gamma = k scale**2 with a scale of about k**(1/3)
    assert norms["projection"] == pytest.approx(norms["norm"] / k ** (5 / 6), rel=0.2)


def test_size_report_counts(tiny):
    model = tiny("llama")
    dense = sum(p.numel() for p in model.parameters())
    get_rps_model(model, RPSConfig(ratio=0.1))
    report = size_report(model)
    assert report.dense_parameters == dense
    assert report.parameters == sum(p.numel() for p in model.parameters()) == dense - report.n + report.m
    assert (report.dense_bytes, report.bytes) == (4 * report.dense_parameters, 4 * report.parameters)
    assert report.m == pytest.approx(0.1 * report.n, abs=8)
    assert f"{report.n:,}" in str(report)
    assert size_report(to_dense(model)).parameters == dense


def test_frozen_weights_stay_frozen(tiny, ids):
    model = tiny("bert", AutoModelForSequenceClassification)
    model.bert.requires_grad_(False)
    get_rps_model(model, RPSConfig())
    assert not find_bank(model).psi.requires_grad
    model(ids, labels=torch.tensor([0, 1])).loss.backward()
    assert find_bank(model).psi.grad is None


def test_what_stays_dense_is_named_in_one_log_line(tiny, caplog):
    with caplog.at_level("INFO", logger="hf_rps.targets"):
        get_rps_model(tiny("llama"), RPSConfig(exclude_modules=["down_proj"]))
    (record,) = caplog.records
    assert "Embedding model.embed_tokens" in record.message
    assert "Linear model.layers.*.mlp.down_proj (3)" in record.message


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_compile_of_a_whole_model(tiny, ids, kind):
    torch._dynamo.reset()
    model = get_rps_model(tiny(kind), RPSConfig(ratio=0.2))
    expected = model(ids, labels=ids).loss
    expected.backward()
    gradient = find_bank(model).psi.grad.clone()
    model.zero_grad()
    loss = torch.compile(model, backend="aot_eager")(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(find_bank(model).psi.grad, gradient, rtol=1e-3, atol=1e-6)


def test_to_dense_keeps_what_is_frozen(tiny):
    model = tiny("llama").requires_grad_(False)
    to_dense(get_rps_model(model, RPSConfig()))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_base_model_alone_and_encoder_called_by_itself(tiny, ids):
    model = tiny("bert", AutoModel)
    get_rps_model(model, RPSConfig(ratio=1))
    assert find_bank(model) is model.rps
    full = model(ids).last_hidden_state
    hidden = model.embeddings(ids)
    torch.testing.assert_close(model.encoder(hidden, attention_mask=None).last_hidden_state, full)


@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_every_dense_weight_has_memory_of_its_own(tiny, kind, ratio):
    """What is saved after to_dense or merge_and_unload is as large as the dense model, and no larger."""
    native = to_dense(get_rps_model(tiny(kind, AutoModel), RPSConfig(ratio=ratio)))
    merged = get_peft_model(tiny(kind, AutoModel), RPSConfig(ratio=ratio)).merge_and_unload()
    for model in (native, merged):
        parameters = [p for p in model.parameters() if p.ndim == 2]
        assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in parameters)
        assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
        assert all(p.is_contiguous() for p in parameters)
