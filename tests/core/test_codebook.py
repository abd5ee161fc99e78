"""Codebooks: packed codes, their matrix beside its definition, and how they are learned."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_rps.layers.kinds import Candidate, kind_of
from hf_rps.learning.calibration import Walk
from hf_rps.learning.codebooks import RowCodebooks, kmeans
from hf_rps.learning.matrix import CORRECTION, DAMPING, corrected, damped, learn
from hf_rps.learning.vectors import VectorCodebooks
from hf_rps.mappings.base import Span, Target
from hf_rps.mappings.codebook import BITS, CodebookMatrix, VectorMatrix, pack_vectors
from hf_rps.mappings.codes import pack, packed_size, unpack
from hf_rps.mappings.weight_map import WeightMap
from hf_rps.psi.divisor import Divisor


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), cols=st.integers(1, 40), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_codes_are_packed_without_a_gap(bits, rows, cols, seed):
    codes = torch.randint(0, 2**bits, (rows, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_size(cols, bits))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, cols, bits), codes)
    # a bit string by Python's own integers, row by row
    for row, found in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * i) for i, code in enumerate(row))
        assert int.from_bytes(bytes(found), "little") == number


@pytest.mark.parametrize("bits", BITS)
def test_the_packed_form_stays(bits):
    """Checkpoints hold it."""
    golden = {2: [228, 228], 3: [136, 198, 250], 4: [16, 50, 84, 118], 8: [0, 1, 2, 3, 4, 5, 6, 7]}
    codes = torch.arange(8)[None] % 2**bits
    assert pack(codes.to(torch.uint8), bits)[0].tolist() == golden[bits]


def matrix_of(rows, cols, bits, group, start=3):
    torch.manual_seed(rows + cols)
    matrix = CodebookMatrix(Span(0, rows, cols), bits, group, start)
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8)
    matrix.keep_in({"codes": pack(codes, bits)}, {"codes": "codes"})
    return matrix, codes, torch.randn(start + matrix.size + 2, dtype=torch.float64)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "cols", "group"), [(5, 12, 12), (7, 13, 13), (4, 20, 8), (3, 9, 4)])
def test_every_method_follows_the_definition(bits, rows, cols, group):
    matrix, codes, psi = matrix_of(rows, cols, bits, group)
    groups, gradient = -(-cols // group), torch.randn(rows, cols, dtype=torch.float64)
    expected, adjoint, load = torch.empty(rows, cols, dtype=torch.float64), torch.zeros_like(psi), torch.zeros_like(psi)
    for r in range(rows):
        for c in range(cols):
            slot = 3 + (r * groups + c // group) * 2**bits + int(codes[r, c])
            expected[r, c] = psi[slot]
            adjoint[slot] += gradient[r, c]
            load[slot] += 2.0
    torch.testing.assert_close(matrix.weight(psi), expected)
    torch.testing.assert_close(matrix.make(psi), expected)
    into = torch.zeros_like(psi)
    matrix.add_adjoint(into, gradient)
    torch.testing.assert_close(into, adjoint)
    into = torch.zeros_like(psi)
    matrix.add_load(into, 2.0)
    torch.testing.assert_close(into, load)
    divisor = Divisor([matrix], len(psi), "projection").tensor(psi.device, psi.dtype)
    torch.testing.assert_close(divisor, (load / 2).masked_fill(load == 0, 1.0))


def vectors_of(rows, cols, bits, group, tile, start=3):
    torch.manual_seed(rows + cols)
    matrix = VectorMatrix(Span(0, rows, cols), bits, group, start, tile)
    codes = torch.randint(0, 2**bits, (rows, -(-cols // tile)), dtype=torch.uint8)
    scales = (torch.randn(rows) + 2).bfloat16()
    matrix.keep_in({"codes": pack_vectors(codes, scales, bits)}, {"codes": "codes"})
    assert matrix.codes.shape == (rows, matrix.row_bytes)
    return matrix, codes, scales.double(), torch.randn(start + matrix.size + 2, dtype=torch.float64)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("rows", "cols", "group", "tile"), [(5, 12, 12, 4), (7, 13, 13, 2), (4, 20, 8, 4), (3, 11, 6, 3), (1, 7, 7, 8)]
)
def test_vectors_follow_the_definition(bits, rows, cols, group, tile):
    matrix, codes, scales, psi = vectors_of(rows, cols, bits, group, tile)
    gradient, expected = torch.randn(rows, cols, dtype=torch.float64), torch.empty(rows, cols, dtype=torch.float64)
    adjoint, load = torch.zeros_like(psi), torch.zeros_like(psi)
    for r in range(rows):
        for c in range(cols):
            slot = 3 + (c // group * 2**bits + int(codes[r, c // tile])) * tile + c % tile
            expected[r, c] = scales[r] * psi[slot]
            adjoint[slot] += scales[r] * gradient[r, c]
            load[slot] += 2.0 * scales[r] ** 2
    torch.testing.assert_close(matrix.weight(psi), expected)
    torch.testing.assert_close(matrix.make(psi), expected)
    into = torch.zeros_like(psi)
    matrix.add_adjoint(into, gradient)
    torch.testing.assert_close(into, adjoint)
    into = torch.zeros_like(psi)
    matrix.add_load(into, 2.0)
    torch.testing.assert_close(into, load)


def test_a_tile_of_one_is_no_other_map():
    """Checkpoints from before there were tiles have their fingerprints without."""
    target, options = Target("a", 8, 16, 0.1), {"bits": 4, "group_size": None}
    maps = [
        WeightMap([target], ratio=None, mapping="codebook", options=options | more, learned="0")
        for more in ({}, {"tile": 1}, {"tile": 2})
    ]
    assert maps[0].fingerprint == maps[1].fingerprint != maps[2].fingerprint


def test_gamma_waits_for_the_codes():
    """A model that is loaded has none at first."""
    matrix, codes, psi = matrix_of(4, 10, 2, 10, start=0)
    empty = CodebookMatrix(Span(0, 4, 10), 2, 10, 0)
    assert empty.stored()["codes"].is_meta
    divisor = Divisor([empty], len(psi), "norm")
    empty.keep_in({"codes": pack(codes, 2)}, {"codes": "codes"})
    expected = Divisor([matrix], len(psi), "norm").tensor(psi.device, psi.dtype)
    torch.testing.assert_close(divisor.tensor(psi.device, psi.dtype), expected)


def test_kmeans_is_where_lloyds_algorithm_ends():
    torch.manual_seed(0)
    weight, importance = torch.randn(6, 300), torch.rand(300) + 0.1
    centres = kmeans(weight, importance, 4)
    assert (centres.diff(dim=1) > 0).all()
    nearest = (weight[:, :, None] - centres[:, None]).abs().argmin(-1)
    for row in range(6):
        for i in range(4):
            mine = nearest[row] == i
            mean = (weight[row, mine] * importance[mine]).sum() / importance[mine].sum()
            assert abs(mean - centres[row, i]) < 0.02


def error(weight, made, hessian):
    difference = made - weight
    return ((difference @ hessian) * difference).sum().item()


def correlated(cols, tokens=400):
    x = torch.randn(tokens, cols) @ torch.randn(cols, cols) * torch.linspace(0.2, 2, cols)
    return x.t() @ x / tokens


def errors_of_steps(state, hessian):
    """The error of the nearest codes, and those after feedback and each of three rounds' two steps."""

    def now():
        return error(state.weight, state.made(), hessian)

    state.round()
    nearest = now()
    state.feed_back(hessian)
    errors = [now()]
    for _ in range(3):
        for step in (state.refit, state.descend):
            step(hessian)
            errors.append(now())
    return nearest, errors


@pytest.mark.parametrize("group", [48, 16])
def test_each_step_makes_the_error_smaller(group):
    torch.manual_seed(1)
    weight, hessian = torch.randn(10, 48), damped(correlated(48))
    state = RowCodebooks(weight, 8, group, hessian.diagonal().sqrt())
    nearest, errors = errors_of_steps(state, hessian)
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.6 * nearest
    # no single code could be better
    gradient = (state.made() - weight) @ hessian
    books = state.books.repeat_interleave(group, dim=1)[:, :48]  # (rows, cols, entries)
    step = books - state.made()[..., None]
    gain = 2 * step * gradient[..., None] + step.square() * hessian.diagonal()[None, :, None]
    state.descend(hessian)
    assert gain.min() > -0.05 * errors[-1]


def test_books_are_the_best_for_their_codes():
    torch.manual_seed(2)
    weight, hessian = torch.randn(3, 24), damped(correlated(24))
    state = RowCodebooks(weight, 4, 24, torch.ones(24))
    state.round()
    state.refit(hessian)
    for row in range(3):
        chosen = nn.functional.one_hot(state.codes[row], 4).float()
        best = torch.linalg.lstsq(chosen.t() @ hessian @ chosen, (chosen.t() @ hessian @ weight[row])[:, None]).solution
        used = chosen.sum(0) > 0
        torch.testing.assert_close(state.books[row, 0][used], best[:, 0][used], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("cols", "group", "tile"), [(48, 48, 4), (48, 24, 2), (50, 50, 4)])
def test_each_step_makes_the_error_of_vectors_smaller(cols, group, tile):
    torch.manual_seed(1)
    weight, hessian = torch.randn(40, cols) * torch.rand(40, 1), damped(correlated(cols))
    state = VectorCodebooks(weight, 16, group, hessian.diagonal().sqrt(), tile)
    padded, full = state.weight, state.padded(hessian)
    nearest, errors = errors_of_steps(state, full)
    assert all(after <= before * (1 + 1e-3) for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.8 * nearest
    # every code is the best while the others stay, and the books are the best for the codes: no step of one entry helps
    while state.descend(full):
        pass
    made, last = state.made(), error(padded, state.made(), full)
    for number in range(0, state.codes.shape[1], 5):
        kept = state.codes[:, number].clone()
        for code in range(16):
            state.codes[:, number] = code
            difference = (state.made() - padded, made - padded)
            changed, before = (((d @ full) * d).sum(1) for d in difference)
            assert (changed >= before - 1e-3 * last).all()
        state.codes[:, number] = kept
    state.refit(full)
    assert state._adjoint((state.made() - padded) @ full).abs().max() < 0.02 * state._adjoint(padded @ full).abs().max()


def test_vectors_are_learned_and_stored():
    torch.manual_seed(3)
    weight, hessian = torch.randn(60, 30), correlated(30)
    weight[7] = 0
    plain, calibrated = learn(weight, 4, tile=2), learn(weight, 4, None, hessian, tile=2)
    assert error(weight, calibrated.weight, hessian) < 0.7 * error(weight, plain.weight, hessian)
    for found in (plain, calibrated, learn(weight[:3], 8, None, hessian, tile=4), learn(weight, 4, 8, hessian, tile=4)):
        rows, tile = len(found.weight), found.books.shape[-1]
        group = 30 if len(found.books) == 1 else 8
        matrix = VectorMatrix(Span(0, rows, 30), {16: 4, 256: 8}[found.books.shape[1]], group, 0, tile)
        matrix.keep_in({"codes": found.packed}, {"codes": "codes"})
        torch.testing.assert_close(matrix.weight(found.books.flatten()), found.weight)
        assert torch.isfinite(found.weight).all()
    # few vectors are kept as they are
    few = torch.randint(1, 3, (4, 8)).float()
    torch.testing.assert_close(learn(few, 8, tile=4).weight, few, rtol=0.02, atol=0.02)


def test_learning_without_inputs_and_with():
    torch.manual_seed(3)
    weight = torch.randn(20, 64)
    plain = learn(weight, 3)
    assert torch.equal(plain.weight, learn(weight, 3).weight)
    hessian = correlated(64)
    calibrated = learn(weight, 3, None, hessian).weight
    assert error(weight, calibrated, hessian) < 0.6 * error(weight, plain.weight, hessian)
    few = torch.randint(0, 4, (5, 30)).float()
    assert torch.equal(learn(few, 2).weight, few)
    torch.testing.assert_close(learn(few, 2, 8, correlated(30)).weight, few, rtol=1e-3, atol=1e-3)
    half = learn(weight.bfloat16(), 4, 16)
    assert half.books.dtype == torch.bfloat16
    assert half.books.shape == (20, 4, 16)


def test_an_input_that_is_never_there():
    hessian = correlated(16)
    hessian[3], hessian[:, 3] = 0, 0
    assert torch.isfinite(learn(torch.randn(4, 16), 2, None, hessian).weight).all()
    assert torch.isfinite(learn(torch.randn(4, 16), 2, None, torch.zeros(16, 16)).weight).all()
    assert np.isclose(DAMPING, damped(torch.eye(4))[0, 0] - 1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.out(torch.tanh(self.q(x)) * self.k(x))


class Chain(nn.Module):
    """Blocks with a connection past them, and a layer that no number tells of."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 4)

    def forward(self, x):
        first = x
        for block in self.blocks:
            x = block(x)
        return self.head(x + first)


def test_every_layer_is_calibrated_on_the_compressed_ones_before_it():
    torch.manual_seed(0)
    model, batches = Chain(), [torch.randn(3, 5, 8), torch.randn(2, 5, 8)]
    before = copy.deepcopy(model.state_dict())
    candidates = {n: Candidate(n, m, kind_of(m)) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    learned, inputs = {}, {}

    def halve(name, candidate, found):
        inputs[name], learned[name] = found, (candidate.weight * 8).round() / 8
        return learned[name]

    walk = Walk(model, candidates, batches)
    counts = {}
    find = walk._find_counts
    walk._find_counts = lambda: (find(), counts.update(walk._counts))
    walk.learn(halve)
    assert learned.keys() == candidates.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    # the same inputs, from a model whose earlier layers are replaced by hand
    order = list(learned)
    for i, name in enumerate(order):
        mixed = copy.deepcopy(model).eval()
        same_input = {"q": (), "k": ("q",)}.get(name.rpartition(".")[2], ())
        for other in order[:i]:
            if other.rpartition(".")[2] not in same_input or other.rpartition(".")[0] != name.rpartition(".")[0]:
                mixed.get_submodule(other).weight.data = learned[other]
        x, dense = (inputs_of(each, name, batches) for each in (mixed, copy.deepcopy(model).eval()))
        weighted = x * torch.cat(counts[candidates[name].module])[:, None]
        total = torch.cat(counts[candidates[name].module]).sum()
        torch.testing.assert_close(inputs[name].hessian, weighted.t() @ x / total, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs[name].cross, dense.t() @ weighted / total, rtol=1e-4, atol=1e-5)


def inputs_of(model, name, batches):
    found = []
    model.get_submodule(name).register_forward_pre_hook(lambda m, args: found.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return torch.cat(found)


def test_a_weight_makes_up_for_what_its_inputs_have_lost():
    torch.manual_seed(4)
    weight, d = torch.randn(12, 24), torch.randn(500, 24) @ torch.randn(24, 24)
    x = d @ (torch.eye(24) + 0.1 * torch.randn(24, 24)) + 0.3 * torch.randn(500, 24)
    hessian, cross = x.t() @ x / 500, d.t() @ x / 500
    # least squares, in which rows of their own hold the weight where it is
    held = (CORRECTION * hessian.diagonal().mean() * 500).sqrt() * torch.eye(24)
    best = torch.linalg.lstsq(torch.cat([x, held]), torch.cat([d, held]) @ weight.t()).solution.t()
    torch.testing.assert_close(corrected(weight, hessian, cross), best, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(corrected(weight, hessian, hessian), weight)
    assert torch.equal(corrected(weight, torch.zeros(24, 24), torch.zeros(24, 24)), weight)
    outputs = [learn(weight, 4, None, hessian, c).weight for c in (None, cross)]
    plain, aware = ((x @ w.t() - d @ weight.t()).square().mean().item() for w in outputs)
    assert aware < 0.7 * plain


def test_a_walk_that_fails_leaves_the_model_as_it_was():
    model = Chain()
    before = copy.deepcopy(model.state_dict())
    candidates = {n: Candidate(n, m, kind_of(m)) for n, m in model.named_modules() if isinstance(m, nn.Linear)}

    def fails(name, candidate, hessian):
        if name == "blocks.1.out":
            raise MemoryError
        return torch.zeros_like(candidate.weight)

    with pytest.raises(MemoryError):
        Walk(model, candidates, [torch.randn(2, 8)]).learn(fails)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in module.__dict__ and not module._forward_pre_hooks for module in model.modules())
