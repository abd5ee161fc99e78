"""The benchmark of scripts/bench.py: every work and form on tiny models, the authors' code, and errors."""

import sys

import pytest
import torch

from benchmark import cli as bench
from benchmark.models import make
from benchmark.runner import Job, measure
from benchmark.settings import Settings
from benchmark.subjects import ADAPTERS, DENSE, FORMS, QUANTISER_PACKAGES, Subject, build
from benchmark.works import count_flops
from hf_rps import size_report

SETTINGS = Settings(
    rounds=1,
    seconds=0.001,
    tokens=(1, 8),
    step_tokens=(4,),
    prompt=8,
    batches=(1, 2),
    command="python scripts/bench.py",
)
OURS = tuple(Subject(form, 3 if form == "codebook" else 0.1) for form in FORMS)
VIEWS, CODEBOOK = OURS[0], OURS[FORMS.index("codebook")]
FIELDS = {"work", "model", "case", "form", "ratio", "threads", "device", "dtype", "part", "n", "m", "torch", "command"}
TIMES = {
    "time_ratio", "time_ratio_low", "time_ratio_high", "milliseconds", "dense_milliseconds", "peak_mib",
    "parameters_ratio", "parameters_mib", "dense_parameters_mib",
}  # fmt: skip
# the names and signatures of FakeRoast that the benchmark uses; half of its array's gradient is its "scaled" one
STAND_IN = """
import torch
from torch import nn

NONE = 0
print("prints to standard output, like the authors' code")

class Helper(nn.Module):
    def __init__(self, shape, array):
        super().__init__()
        self.weight = array
        self.IDX = nn.Parameter(torch.arange(shape.numel()).view(shape) % array.numel(), requires_grad=False)
        self.G = nn.Parameter(torch.ones(shape), requires_grad=False)

class FakeRoastLinear(nn.Module):
    def __init__(self, linear, array):
        super().__init__()
        self.WHelper, self.bias = Helper(linear.weight.shape, array), linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.WHelper.weight[self.WHelper.IDX] * self.WHelper.G, self.bias)

class ModelRoasterGradScaler:
    def __init__(self, model, roast_global, sparsity, module_limit_size, verbose, init_std, scaler_mode, mapper_args):
        self.model = model
        self.layers = [(k, m) for k, m in model.named_modules() if type(m) is nn.Linear and not m.do_not_roast]
        n = sum(layer.weight.numel() for _, layer in self.layers)
        self.array = nn.Parameter(init_std * torch.randn(int(sparsity * n)))

    def process(self):
        for name, layer in self.layers:
            self.model.set_submodule(name, FakeRoastLinear(layer, self.array))
        self.model.roast_array = self.array
        self.array._roast_grad_scaler = torch.full_like(self.array, 2.0)
        return self.model

class RoastGradScaler:
    def scale_step(self, model):
        model.roast_array.grad /= model.roast_array._roast_grad_scaler
"""


@pytest.fixture
def fakeroast(tmp_path, monkeypatch):
    """``fakeroast(source)``: a folder that holds ``source`` under the name of the authors' module, and an mmh3."""

    def write(source=STAND_IN):
        folder = tmp_path / "peer"
        folder.mkdir()
        (folder / "FakeRoastUtil_v2.py").write_text(source)
        (folder / "mmh3.py").write_text("")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "FakeRoastUtil_v2", raising=False)
        return str(folder)

    return write


def rows_of(work, subjects, settings=SETTINGS, model="tiny"):
    return list(measure(Job(work, model, subjects), settings))


# ---- every work and form


@pytest.mark.parametrize(
    ("work", "subjects", "cases"),
    [
        ("stack", OURS, ["forward, 1 token", "forward + backward, 1 token"]),
        ("step", OURS, ["AdamW step, 4 tokens"]),
        ("prefill", (VIEWS, CODEBOOK), ["prefill, 8 tokens"]),
        ("decode", (VIEWS, CODEBOOK), ["decode, 1 token", "decode, 1 token, batch 2"]),
        ("save", (VIEWS, CODEBOOK), ["save_pretrained"]),
        ("load", (VIEWS, CODEBOOK), ["from_pretrained"]),
        ("convolution", (VIEWS, Subject("codebook", 2)), ["forward, batch 8, 64 x 64 pixels"]),
        ("adapter", ADAPTERS, ["fine-tuning step, 4 tokens"]),
    ],
)
def test_timed_works(work, subjects, cases):
    rows = rows_of(work, subjects)
    assert not [row["error"] for row in rows if "error" in row]
    for row in rows:
        assert row.keys() >= FIELDS | TIMES
        assert row["time_ratio_low"] == row["time_ratio"] == row["time_ratio_high"] > 0  # one round
        assert row["m"] <= row["n"]
    for subject in subjects:
        found = [row["case"] for row in rows if (row["form"], row["ratio"]) == (subject.form, subject.ratio)]
        assert set(cases) <= set(found)
    if work in ("save", "load"):
        assert all(0 < row["file_ratio"] < 0.5 for row in rows)


@pytest.mark.parametrize(("form", "package"), QUANTISER_PACKAGES.items())
def test_other_libraries_are_measured_beside(form, package):
    pytest.importorskip(package)
    dense, other = (build("prefill", "tiny", subject, SETTINGS) for subject in (DENSE, Subject(form, 4)))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected, found = (built.model(input_ids=ids).logits for built in (dense, other))
    assert 0 < (found - expected).norm() < 0.5 * expected.norm()
    (row,) = rows_of("prefill", (Subject(form, 4),))
    assert row["form"] == form
    assert row["time_ratio"] > 0


def test_what_the_weights_take():
    """Codes, codebooks and the rest are all parameters; others have no codes."""
    views, codebook = rows_of("prefill", (VIEWS, CODEBOOK))
    model = build("prefill", "tiny", CODEBOOK, SETTINGS).model
    sizes = size_report(model)
    assert codebook["parameters_mib"] * 2**20 == sizes.bytes
    assert codebook["dense_parameters_mib"] * 2**20 == sizes.dense_bytes
    assert codebook["codes_mib"] * 2**20 == sizes.code_bytes == 3 / 8 * codebook["n"]
    assert codebook["codebooks_mib"] * 2**20 == sizes.codebook_bytes == 4 * codebook["m"]
    assert codebook["parameters_ratio"] == sizes.bytes / sizes.dense_bytes
    assert codebook["dense_parameters_mib"] == views["dense_parameters_mib"]
    assert "codes_mib" not in views
    assert "flops_ratio" not in codebook, "torch counts no product of our own kernels"
    assert views["flops_ratio"] == pytest.approx(1)


def test_operations_are_counted():
    """Forward two for every multiplication, with gradients three times that but for the input that needs none."""
    dense, folded = (build("stack", "tiny", subject, SETTINGS).model for subject in (DENSE, Subject("folded", 0.1)))
    x, report = torch.randn(5, 64), size_report(folded)
    assert count_flops(lambda: dense(x).sum()) == 2 * 5 * report.n
    with torch.no_grad():
        counted = count_flops(lambda: folded(x))
    shared = 4 * 2 * 8 * 64  # keys and values read what is folded for queries; all three are counted in the report
    assert counted == 2 * 5 * (report.multiplications - shared)
    first = 3 * 64 * 64
    assert count_flops(lambda: dense(x).sum().backward()) == 2 * 5 * (3 * report.n - first)
    assert count_flops(lambda: folded(x).sum().backward()) == pytest.approx(3 * counted, rel=0.2)


def test_a_run_that_torch_cannot_count_has_no_count():
    def attention():
        raise AssertionError("sdpa_flop_count: query/key/value shapes are incompatible")

    assert count_flops(attention) is None


def test_memory_is_counted():
    dense, *others = rows_of("memory", OURS)
    assert dense["targets_ratio"] == pytest.approx(1, abs=1e-3)  # and AdamW's counters of steps
    assert dense["memory_ratio"] == 1
    assert dense["n"] == dense["m"]
    for row in (dense, *others):
        assert row.keys() >= FIELDS
        assert row["predicted_mib"] == pytest.approx(row["state_mib"] + row["saved_mib"])
        assert row["measured_mib"] == pytest.approx(row["predicted_mib"] + row["transients_mib"])
        assert row["saved_mib"] > 0
    views, folded, codebook, gather, cat = others
    assert folded["targets_ratio"] < 0.5
    stored = 3 / 8 / 16 + codebook["m"] / codebook["n"]  # the codes, without a gradient or moments, and the codebooks
    assert stored < codebook["targets_ratio"] < stored + codebook["m"] / codebook["n"], "and Gamma of the codebooks"
    assert 0.1 < views["targets_ratio"] == pytest.approx(cat["targets_ratio"], rel=0.1)
    assert gather["targets_ratio"] > 0.75 + 0.1  # 8 bytes of index and 4 of factor, over 16, and the array's
    assert views["targets_ratio"] < 0.5


def test_reduced_bytes_are_those_of_the_parameters():
    dense, views = rows_of("reduced", OURS[:1])
    parameters = sum(p.numel() for p in make("reduced", "tiny", SETTINGS).parameters())
    assert dense["reduced_mib"] == pytest.approx(4 * parameters / 2**20)
    assert views["reduced_mib"] == pytest.approx(4 * (parameters - views["n"] + views["m"]) / 2**20)
    assert views["reduced_ratio"] == pytest.approx(views["reduced_mib"] / dense["reduced_mib"])


@pytest.mark.slow
def test_compiled():
    for row in rows_of("compiled", (VIEWS, CODEBOOK)):
        assert row.keys() >= FIELDS | TIMES


def test_part_shortens_the_large_llama():
    half = make("stack", "llama-1b", Settings(part=1 / 16))
    assert len(half.blocks) == 1
    assert {tuple(m.weight.shape) for m in half.blocks[0].children()} == {
        (2048, 2048), (512, 2048), (8192, 2048), (2048, 8192),
    }  # fmt: skip


# ---- the authors' code


def test_fakeroast_shares_the_layers_that_ours_shares(fakeroast):
    settings = Settings(**{**SETTINGS.__dict__, "fakeroast": fakeroast()})
    ours, theirs = (build("step", "tiny", Subject(form, 0.1), settings) for form in ("views", "fakeroast"))
    assert theirs.n == ours.n == sum(p.numel() for p in theirs.stored if not p.requires_grad) / 2
    assert theirs.m == int(0.1 * theirs.n)
    array = theirs.model.roast_array
    array.grad = array.detach().clone()
    theirs.after_backward()
    assert array.grad.equal(array / 2)


def test_fakeroast_beside_dense(fakeroast, capfd):
    settings = Settings(**{**SETTINGS.__dict__, "fakeroast": fakeroast()})
    for work in ("stack", "step", "memory", "reduced"):
        row = rows_of(work, (Subject("fakeroast", 0.1),), settings)[-1]
        assert row["form"] == "fakeroast"
        assert "error" not in row
    assert capfd.readouterr().out == ""


def test_conv1d_is_replaced_for_the_authors_code(fakeroast, monkeypatch):
    from transformers import GPT2Config

    from benchmark import models

    tiny_gpt2 = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=32, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    monkeypatch.setattr(models, "language_config", lambda name, part: tiny_gpt2)
    settings = Settings(fakeroast=fakeroast())
    built = build("step", "gpt2", Subject("fakeroast", 0.5), settings)
    kinds = [type(module).__name__ for module in built.model.modules()]
    assert kinds.count("FakeRoastLinear") == 4
    assert "Conv1D" not in kinds


# ---- failures


def test_a_worker_that_dies_is_a_row_and_the_run_goes_on(fakeroast):
    settings = Settings(**{**SETTINGS.__dict__, "fakeroast": fakeroast("import os; os.kill(os.getpid(), 9)")})
    rows = rows_of("prefill", (Subject("fakeroast", 0.1), *OURS[:1]), settings)
    assert [row["form"] for row in rows] == ["fakeroast", "views"]
    assert rows[0]["error"] == "fakeroast 0.1: the process ended with exit status -9, killed: out of memory?"
    assert "time_ratio" in rows[1]


def test_an_exception_is_a_row(fakeroast):
    settings = Settings(**{**SETTINGS.__dict__, "fakeroast": fakeroast("raise MemoryError('no more')")})
    for work in ("prefill", "memory"):
        row = rows_of(work, (Subject("fakeroast", 0.1),), settings)[-1]
        assert row["error"] == "fakeroast 0.1: MemoryError: no more"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--ratios", "0"], "0 is not in (0, 1]"),
        (["--ratios", "1.5"], "1.5 is not in (0, 1]"),
        (["--ratios", "tenth"], "invalid float value: 'tenth'"),
        (["--rounds", "-1"], "-1 is not in (0, ∞]"),
        (["--seconds", "0"], "0 is not in (0, ∞]"),
        (["--part", "2"], "2 is not in (0, 1]"),
        (["--fakeroast", "/nowhere"], "/nowhere has no file FakeRoastUtil_v2.py"),
        (["--rzlinear", "/nowhere"], "runs on CUDA only; add --device cuda"),
        (["--only", "adapter", "--models", "gpt2", "--report", "/nowhere"], "--report: [Errno 2] No such file"),
        (["--only", "stack", "--models", "llama-97m"], "no work asked for knows any of the models"),
        (["--only", "step", "--forms"], "no work asked for knows any of the models and forms"),
        (["--output", "/nowhere/rows.jsonl"], "there is no folder /nowhere"),
    ],
)
def test_bad_input_ends_before_anything_starts(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_cuda_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "finds no CUDA device" in capsys.readouterr().err


def test_a_missing_package_is_named(fakeroast, capsys, monkeypatch):
    folder = fakeroast()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench.main(["--fakeroast", folder])
    assert "pip install mmh3" in capsys.readouterr().err
