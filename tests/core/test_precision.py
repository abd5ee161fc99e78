"""Low precision: psi's gradient is accumulated in float32, and training in it ends where float32 ends."""

import statistics

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import ViTConfig, ViTForImageClassification

from hf_rps import RPSConfig, get_rps_model
from hf_rps.layers.linear import RPSLinear
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.psi.bank import Bank

ROWS, COLS, LAYERS = 400, 320, 8  # 1,024,000 weights on 1,024 slots
ROUNDING = 2.0**-8  # what rounding to bfloat16 changes a number by, relatively: at most this, at random less than half


class Shared(nn.Module):
    """Layers side by side over one bank whose array is shared 1000-fold."""

    def __init__(self):
        super().__init__()
        targets = [Target(f"layers.{i}", ROWS, COLS, 0.1) for i in range(LAYERS)]
        self.bank = Bank(WeightMap(targets, ratio=0.001), "none")
        nn.init.normal_(self.bank.psi, std=self.bank.weight_map.init_std)
        dense = [nn.Linear(COLS, ROWS, bias=False) for _ in targets]
        self.layers = nn.ModuleList(RPSLinear(t.name, self.bank, d) for t, d in zip(targets, dense, strict=True))
        self.bank.array.passes.watch(self)

    def forward(self, x):
        return torch.stack([layer(part) for layer, part in zip(self.layers, x, strict=True)])


@pytest.fixture
def case():
    """The model, inputs x and gradients gy of the outputs that bfloat16 holds exactly, and psi's exact gradient (m,).

    One token a layer: the gradient of a weight is one product, and a slot's gradient the sum of about 1000 of them.
    """
    torch.manual_seed(0)
    model = Shared()
    x, gy = torch.randn(LAYERS, 1, COLS).bfloat16(), torch.randn(LAYERS, 1, ROWS).bfloat16()
    weight_map = model.bank.weight_map
    exact = torch.zeros(weight_map.m, dtype=torch.float64)
    for i, target in enumerate(weight_map.targets):
        signs = torch.from_numpy(weight_map.signs(target.name)).double()
        products = gy[i].double().t() @ x[i].double() * signs * weight_map.scale(target.name)
        exact.index_add_(0, torch.from_numpy(weight_map.slots(target.name)).flatten(), products.flatten())
    return model, x, gy, exact


def error(gradient, exact):
    return ((gradient.double() - exact).norm() / exact.norm()).item()


def accumulated_in_bfloat16(model, x, gy):
    """What autograd makes of a psi that is cast before its uses."""
    weight_map = model.bank.weight_map
    psi = model.bank.psi.detach().bfloat16().requires_grad_()
    outputs = []
    for i, target in enumerate(weight_map.targets):
        outputs.append(F.linear(x[i], weight_map.matrix(target.name).weight(psi)))
    torch.stack(outputs).backward(gy)
    return psi.grad


def test_autocast_accumulates_in_float32(case):
    model, x, gy, exact = case
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x.float())
    assert y.dtype == torch.bfloat16
    y.backward(gy)
    assert model.bank.psi.grad.dtype == torch.float32
    low = error(model.bank.psi.grad, exact)
    assert low < ROUNDING  # gy with its scale is rounded, and every product
    assert error(accumulated_in_bfloat16(model, x, gy), exact) > 10 * low


def test_float32_is_exact_to_its_rounding(case):
    model, x, gy, exact = case
    model(x.float()).backward(gy.float())
    assert error(model.bank.psi.grad, exact) < 1e-6


def test_bfloat16_array_is_rounded_once(case):
    model, x, gy, exact = case
    model.bfloat16()
    model(x).backward(gy)
    assert model.bank.psi.grad.dtype == torch.bfloat16
    assert error(model.bank.psi.grad, exact) < ROUNDING


@pytest.mark.parametrize("reduce_dtype", [torch.bfloat16, torch.float32])
def test_fsdp2_that_casts_the_array(case, reduce_dtype, tmp_path):
    """FSDP's mixed precision hands the layers a bfloat16 array; the sum over its uses is float32 all the same."""
    model, x, gy, exact = case
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        model(x).backward(gy)
        gradient = model.bank.psi.grad.full_tensor()
    finally:
        dist.destroy_process_group()
    assert error(gradient, exact) < ROUNDING


# ---- training


PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16 with GradScaler": torch.float16}


def accuracy(dtype, seed):
    """Test accuracy (%) of a small ViT, ratio 0.1, trained on real digits in autocast's ``dtype``."""
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = (images.float() / 8 - 1).view(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:500], order[500:]
    torch.manual_seed(seed)
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, hidden_size=64, intermediate_size=128,
                       num_hidden_layers=2, num_attention_heads=4, num_labels=10, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0)  # fmt: skip
    model = get_rps_model(ViTForImageClassification(config), RPSConfig(ratio=0.1, grad_scaling="norm", seed=seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = [batch for _ in range(20) for batch in train[torch.randperm(len(train))].split(64)]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(batches))
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for batch in batches:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(images[batch], labels=labels[batch]).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        found = model(images[test]).logits.argmax(-1)
    return 100 * (found == labels[test]).float().mean().item()


@pytest.mark.slow
def test_low_precision_trains_as_float32_does():
    """The means over three seeds agree to 1.5 points: twice the standard error of such an accuracy on 500 images."""
    table = {name: [accuracy(dtype, seed) for seed in range(3)] for name, dtype in PRECISIONS.items()}
    means = [statistics.mean(row) for row in table.values()]
    assert min(means) > 95, table
    assert max(means) - min(means) < 1.5, table
