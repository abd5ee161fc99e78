"""The subjects: the forms in which a model is measured, ours and those of others, and how a model gets each form."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmark.models import make
from benchmark.settings import Settings
from hf_rps import RPSConfig, get_rps_model
from hf_rps.conversion import find_bank
from hf_rps.layers.base import RPSLayer
from hf_rps.layers.kinds import Candidate, TransposedLinear
from hf_rps.products.base import Made, always
from hf_rps.targets import find_targets
from studies.encoder.quantised import int4_layer

FORMS = ("views", "folded", "codebook", "gather", "cat")
QUANTISERS = ("nf4", "int4")  # of others, for inference
PEERS = ("fakeroast", "rzlinear")
# a file that each peer's folder must hold, and the package that its code imports besides torch
PEER_FILES = {"fakeroast": "FakeRoastUtil_v2.py", "rzlinear": "python/rz_linear/__init__.py"}
PEER_PACKAGES = {"fakeroast": "mmh3", "rzlinear": "triton"}
QUANTISER_PACKAGES = {"nf4": "bitsandbytes", "int4": "torchao"}
QUANTISER_BITS = 4
INT4_GROUP = 128


@dataclass(frozen=True)
class Subject:
    """One form of a model and its ratio, stored numbers over targeted weights.

    Forms: "dense"; "views" (ours); "folded" (ours, with inputs folded as far as the ratio allows); "codebook" (ours,
    with a learned map, whose ratio is the bits of a code); "gather" (ours with an index and a sign for every weight);
    "cat" (ours, where every linear layer makes its weight whole and multiplies with it); "nf4" (bitsandbytes) and
    "int4" (torchao's weight-only integers, computing in bfloat16), as those libraries store and multiply them;
    "fakeroast" and "rzlinear" (the authors' code); and the adapters "delta" and "folded-delta" (ours) and "lora", whose
    ratio is its rank.
    """

    form: str
    ratio: float = 1.0

    @property
    def name(self) -> str:
        if self.form == "dense":
            return self.form
        return f"{self.form} {self.ratio:g}" + (" bits" if self.has_bits else "")

    @property
    def has_bits(self) -> bool:
        """True where ``ratio`` is the bits of a code."""
        return self.form == "codebook" or self.form in QUANTISERS


DENSE = Subject("dense")
ADAPTERS = (Subject("lora", 8), Subject("delta", 0.001), Subject("delta", 0.01), Subject("folded-delta", 0.01))
FOLDED_DELTA = 16  # times that the input of a folded-delta adapter is folded


@dataclass
class Built:
    """A model in the form of a subject.

    Attributes:
        model: The model.
        n: Weights that the compressed forms target, counted in the dense model.
        m: Numbers that stand for them: n for the dense model; for an adapter, the numbers trained.
        stored: Parameters that stand for the targeted weights.
        codes: Those among them that hold the codes of a learned map.
        kept: Gives the other tensors that this form keeps for them (divisors of the gradient, indices, signs).
        after_backward: To be called in a training step once the gradients are there.
    """

    model: nn.Module
    n: int
    m: int
    stored: list[nn.Parameter]
    codes: list[nn.Parameter] = field(default_factory=list)
    kept: Callable[[], list[Tensor]] = list
    after_backward: Callable[[], None] = lambda: None

    def sizes(self) -> dict[str, int]:
        """Bytes of all parameters, and among them those of codes and of codebooks."""
        codes = {id(parameter) for parameter in self.codes}
        books = [parameter for parameter in self.stored if codes and id(parameter) not in codes]
        parts = {"parameters": self.model.parameters(), "codes": self.codes, "codebooks": books}
        return {name: sum(p.numel() * p.element_size() for p in part) for name, part in parts.items()}


def build(work: str, name: str, subject: Subject, settings: Settings) -> Built:
    """The model ``name`` of ``work`` in the form of ``subject``, the same random numbers at every call."""
    torch.manual_seed(0)
    model = make(work, name, settings)
    targets = find_targets(model, RPSConfig())
    n = sum(target.weight.numel() for target in targets)
    if subject.form == "dense":
        return Built(model, n, n, [target.module.weight for target in targets])
    if subject.form == "fakeroast":
        return _fakeroast(model, targets, n, subject.ratio, settings)
    if subject.form == "rzlinear":
        return _rzlinear(model, targets, n, subject.ratio, settings)
    if subject.form in ("lora", "delta", "folded-delta"):
        return _adapter(model, n, subject)
    if subject.form == "codebook":
        return _codebook(model, n, int(subject.ratio))
    if subject.form in QUANTISERS:
        return _quantised(model, targets, n, subject.form)
    sign, fold = "element" if subject.form == "gather" else "row", "full" if subject.form == "folded" else 1
    config = RPSConfig(ratio=subject.ratio, sign=sign, grad_scaling="norm", input_fold=fold)
    model = get_rps_model(model, config)
    bank = find_bank(model)
    if subject.form == "cat":
        bank.array.choose = always(Made)
    return Built(model, n, bank.psi.numel(), [bank.psi], kept=lambda: _kept(model))


def _codebook(model: nn.Module, n: int, bits: int) -> Built:
    """``model`` with a codebook for every row. By k-means: what a calibration chooses changes no time and no size."""
    model = get_rps_model(model, RPSConfig(mapping="codebook", bits=bits, grad_scaling="norm"))
    psi = find_bank(model).psi
    layers = [module for module in model.modules() if isinstance(module, RPSLayer)]
    codes = [tensor for layer in layers for tensor in layer.shared.matrix.stored().values()]
    return Built(model, n, psi.numel(), [psi, *codes], codes, lambda: _kept(model))


def _quantised(model: nn.Module, targets: list[Candidate], n: int, form: str) -> Built:
    """``model`` with the targeted weights in another library's four bits."""
    _replace_conv1d(model, targets)
    names = {target.name for target in targets}
    if form == "nf4":
        from bitsandbytes.nn import Linear4bit, Params4bit

        for name in names:
            linear = model.get_submodule(name)
            options = {"bias": linear.bias is not None, "quant_type": "nf4", "compute_dtype": linear.weight.dtype}
            layer = Linear4bit(linear.in_features, linear.out_features, **options)
            layer.weight = Params4bit(linear.weight.detach().clone(), requires_grad=False, quant_type="nf4")
            layer.bias = linear.bias
            model.set_submodule(name, layer.to(linear.weight.device))
        states = [model.get_submodule(name).weight.quant_state for name in names]
        kept = [state.absmax for state in states]
        stored = [model.get_submodule(name).weight for name in names]
    else:
        for name in names:
            model.set_submodule(name, int4_layer(model.get_submodule(name), INT4_GROUP))
        stored, kept = [model.get_submodule(name).layer.weight for name in names], []
    return Built(model, n, n, stored, kept=lambda: kept)


def _kept(model: nn.Module) -> list[Tensor]:
    """What our model keeps beside its parameters: divisors of the gradient, factors (scale and sign), indices."""
    layers = [module for module in model.modules() if isinstance(module, RPSLayer)]
    return [*find_bank(model).array.kept_tensors(), *(tensor for layer in layers for tensor in layer.kept_tensors())]


def _adapter(model: nn.Module, n: int, subject: Subject) -> Built:
    """``model`` with an adapter on all linear layers: LoRA, or ours in mode "delta"."""
    if subject.form == "lora":
        config = LoraConfig(r=int(subject.ratio), target_modules="all-linear")
    else:
        fold = FOLDED_DELTA if subject.form == "folded-delta" else 1
        config = RPSConfig(ratio=subject.ratio, mode="delta", grad_scaling="norm", input_fold=fold)
    model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Built(model, n, sum(p.numel() for p in trained), trained)


# ---- the authors' code


def missing(peer: str, path: str) -> str | None:
    """What keeps the code of ``peer`` at ``path`` from running here, or None."""
    if not (Path(path) / PEER_FILES[peer]).is_file():
        return f"{path} has no file {PEER_FILES[peer]}: expected a checkout of the authors' repository"
    package = PEER_PACKAGES[peer]
    if importlib.util.find_spec(package) is None:
        return f"the authors' code needs the package {package}: pip install {package}"
    return None


def _import(folder: Path, module: str):
    sys.path.insert(0, str(folder))
    return importlib.import_module(module)


def _replace_conv1d(model: nn.Module, targets: list[Candidate]) -> None:
    """Turn GPT-2's Conv1D layers, which the authors' code skips silently, into linear layers of the same weight."""
    for target in targets:
        if isinstance(target.kind, TransposedLinear):
            weight, bias = target.weight, target.module.bias
            linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, device=weight.device, dtype=weight.dtype)
            linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
            model.set_submodule(target.name, linear)


def _fakeroast(model: nn.Module, targets: list[Candidate], n: int, ratio: float, settings: Settings) -> Built:
    """``model`` roasted as the sample of FakeRoast's README does it: one array, mapper "pareto", scaler mode "v1".

    Everything but the targets is marked ``do_not_roast``. The authors' code makes float32 tensors on the CPU only.
    """
    roast = _import(Path(settings.fakeroast), "FakeRoastUtil_v2")
    model = model.to("cpu", torch.float32)
    _replace_conv1d(model, targets)
    names = {target.name for target in targets}
    for name, module in model.named_modules():
        module.do_not_roast = name not in names
    mapper = {"mapper": "pareto", "hasher": "uhash", "block_k": 16, "block_n": 16, "block": 8, "seed": 123321}
    model = roast.ModelRoasterGradScaler(
        model, True, ratio, verbose=roast.NONE, module_limit_size=None, init_std=0.01, scaler_mode="v1",
        mapper_args=mapper,
    ).process().to(settings.device, settings.torch_dtype)  # fmt: skip
    array = model.roast_array
    array._roast_grad_scaler = array._roast_grad_scaler.to(array)
    constants = [p for name, p in model.named_parameters() if name.endswith((".WHelper.IDX", ".WHelper.G"))]
    scaler = roast.RoastGradScaler()
    return Built(
        model, n, array.numel(), [array, *constants], kept=lambda: [array._roast_grad_scaler],
        after_backward=lambda: scaler.scale_step(model),
    )  # fmt: skip


def _rzlinear(model: nn.Module, targets: list[Candidate], n: int, ratio: float, settings: Settings) -> Built:
    """``model`` with the authors' RzLinear (Triton) in place of every targeted layer, all on one array."""
    rz_linear = _import(Path(settings.rzlinear) / "python", "rz_linear")
    dtype, device = settings.torch_dtype, settings.device
    array = nn.Parameter(0.02 * torch.randn(round(ratio * n), dtype=dtype, device=device))
    for seed, target in enumerate(targets):
        rows, cols = target.weight.shape
        bias = target.module.bias is not None
        layer = rz_linear.RzLinear(cols, rows, hashed_weight=array, bias=bias, seed=seed, dtype=dtype)
        if not bias:
            layer._bias = None  # else it adds False to every output
        model.set_submodule(target.name, layer.to(device))
    return Built(model, n, array.numel(), [array])
