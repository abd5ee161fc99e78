"""The model card: what a reader must do first, how small and how good the model is, and how it was made."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open

from hf_rps.integrations.auto_classes import auto_class_of
from hf_rps.mappings.base import Target
from hf_rps.names import is_psi_key
from hf_rps.version import __version__

TAGS = ("rps", "hf_rps")
REPOSITORY = "THIS_REPOSITORY"  # stands in snippets for the name that only push_to_hub knows
GENERATED = "Written by hf_rps, and rewritten when new weights are pushed. Remove this line to keep the card as it is."
_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_FIRST_LINES = 20
_NOTE = """\
**Import `hf_rps` before you load this model**: its weights are shared, and without hf_rps, transformers stops and \
looks for a file that is called so.

```python
{snippet}
```"""


@dataclass(frozen=True)
class _Compressed:
    """What config.json says about a compressed model; ``unused`` of the n weights are of modules it does not have, and
    ``bits`` are those of a code of ``tile`` weights, where the map is learned."""

    architecture: str
    n: int
    m: int
    count: int
    unused: int
    bits: int | None = None
    tile: int = 1


def write_model_card(
    folder: str | os.PathLike,
    *,
    model_name: str | None = None,
    task: str | None = None,
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
    teacher: str | None = None,
    learning_curve: str | None = None,
    command: str | None = None,
    versions: Mapping[str, str] | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
) -> ModelCard:
    """Write the README.md of a folder that save_pretrained wrote, replacing any that is there.

    The sizes come from the folder itself. Sections without content are left out.

    Args:
        folder: Holds a compressed or dense transformers model.
        model_name: Title of the card. Default: the folder's name.
        task: The Hub's name for the task, such as "text-classification". Default: what the model's class is for.
        dataset: Name of the data on which the metrics were measured, from the Hub or any other.
        metrics: Results by name, such as {"test_accuracy": 0.9}. With ``dataset``, finite ones also go into the
            metadata (``model-index``).
        base_model: The model it was made from, on the Hub or any other. Of a local path only the last part is shown.
        teacher: The model it was distilled from; likewise.
        learning_curve: Name of an image in ``folder``.
        command: The command that made the model.
        versions: Further packages and their versions, besides Python, torch, transformers and hf_rps.
        language, license: For the metadata.

    Returns:
        The card, as written.

    Raises:
        ValueError: ``folder`` holds no model, or lacks ``learning_curve``.
        TypeError: A metric is not a number.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    compressed = _compressed(config)
    auto_class, default_task = auto_class_of(config)
    if learning_curve is not None and not (folder / learning_curve).is_file():
        raise ValueError(f"learning_curve={learning_curve!r} is not a file in {folder}; save the image there first")
    results = _checked(metrics)
    task, title = task or default_task, model_name or folder.resolve().name
    data = ModelCardData(
        language=language, license=license, library_name="transformers", pipeline_tag=task,
        tags=list(TAGS) if compressed else None, base_model=_hub_name(base_model),
        datasets=_hub_name(dataset) if dataset and "/" in dataset else None,
        metrics=list(dict.fromkeys(map(_metric_type, results))) or None,
        **_model_index(title, task, dataset, results),
    )  # fmt: skip
    card = ModelCard.from_template(
        data, template_path=str(_TEMPLATE), title=title, note=import_note(config) if compressed else None,
        snippet=_snippet(auto_class), compressed=compressed, sizes=_sizes(folder, compressed), results=results,
        dataset=dataset, learning_curve=learning_curve, facts=_facts(config, base_model, teacher, versions),
        command=command, generated=GENERATED,
    )  # fmt: skip
    card.save(folder / "README.md")
    return card


def _checked(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """The metrics as floats."""
    for name, value in (metrics or {}).items():
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise TypeError(f"metrics[{name!r}] must be a number, got {value!r}; leave it out")
    return {name: float(value) for name, value in (metrics or {}).items()}


def read_config(folder: Path) -> dict:
    """config.json of ``folder``.

    Raises:
        ValueError: There is none, or it is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} has no config.json, so it holds no transformers model; pass the folder that "
            f"model.save_pretrained wrote"
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); save the model again") from error


def is_compressed(config: dict) -> bool:
    """Whether this is the config.json of a model that hf_rps compressed."""
    return (config.get("quantization_config") or {}).get("quant_method") == "rps"


def import_note(config: dict) -> str:
    """The lines about ``import hf_rps`` with which a compressed model's card begins."""
    return _NOTE.format(snippet="import hf_rps\n" + _snippet(auto_class_of(config)[0]))


def with_note(text: str, note: str) -> str:
    """The README ``text`` with ``note`` right after its metadata, unless its first lines say ``import hf_rps``.

    >>> print(with_note("---\\ntags: [a]\\n---\\n# Title", "import hf_rps first"))
    ---
    tags: [a]
    ---
    <BLANKLINE>
    import hf_rps first
    <BLANKLINE>
    # Title
    """
    metadata = REGEX_YAML_BLOCK.match(text)
    start = metadata.end() if metadata else 0
    body = text[start:].lstrip()
    if "import hf_rps" in "\n".join(body.splitlines()[:_FIRST_LINES]):
        return text
    return f"{text[:start]}\n{note.strip()}\n\n{body}"


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files that from_pretrained would read from ``folder``, whether they exist or not."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.is_file() and index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    return [single]


def _compressed(config: dict) -> _Compressed | None:
    if not is_compressed(config):
        return None
    n = m = count = unused = 0
    for bank in _banks(config):
        if not all(bank.get(field) for field in ("n", "m", "modules")):
            raise ValueError(
                "config.json has a quantization_config of method 'rps' without n, m and modules; it was edited: "
                "restore the one that save_pretrained wrote"
            )
        left = set(bank.get("unused_modules") or ())
        targets = [Target.parse(text) for text in bank["modules"]]
        n, m, count = n + bank["n"], m + bank["m"], count + len(targets)
        unused += sum(target.numel for target in targets if target.name in left)
    names = config.get("architectures") or ["A model"]
    first = _banks(config)[0]
    return _Compressed(names[0], n, m, count, unused, first.get("bits"), first.get("tile", 1))


def _banks(config: dict) -> list[dict]:
    """What config.json records of every shared array."""
    recorded = config["quantization_config"]
    return recorded.get("banks") or [recorded]


def _snippet(auto_class: str) -> str:
    return f'from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("{REPOSITORY}")'


def _hub_name(name: str | None) -> str | None:
    """``name`` if it can be a name on the Hub, else None: the metadata may hold no others."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name is None or os.path.exists(name) else name


def _model_index(title: str, task: str | None, dataset: str | None, results: dict[str, float]) -> dict:
    finite = {name: value for name, value in results.items() if math.isfinite(value)}
    if not (finite and task and dataset):
        return {}
    kind = dataset if "/" in dataset and _hub_name(dataset) else re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-")
    return {
        "model_name": title,
        "eval_results": [
            EvalResult(
                task_type=task, dataset_type=kind, dataset_name=dataset, metric_type=_metric_type(name),
                metric_name=name, metric_value=value,
            )
            for name, value in finite.items()
        ],
    }  # fmt: skip


def _metric_type(name: str) -> str:
    """The Hub's name for a metric, which leaves out the split it was measured on."""
    return re.sub(r"^(train|validation|eval|test)_", "", name)


def _sizes(folder: Path, compressed: _Compressed | None) -> list[tuple[str, int, int]]:
    """Rows of the table of sizes: what is counted, its number in the dense model, and in this one."""
    rows = [("shared weights", compressed.n, compressed.m)] if compressed else []
    files = [file for file in weights_files(folder) if file.is_file()]
    if not files:
        return rows
    size, total, width, codes = sum(file.stat().st_size for file in files), 0, 0, 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for key in reader.keys():  # noqa: SIM118 (not a dict)
                    part = reader.get_slice(key)
                    if compressed and compressed.bits and part.get_dtype() == "U8":  # packed: bytes, and no numbers
                        codes += math.prod(part.get_shape())
                        continue
                    total += math.prod(part.get_shape())
                    if is_psi_key(key):
                        width = int(re.search(r"\d+", part.get_dtype())[0]) // 8  # "F32", "BF16": bytes of a number
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a complete safetensors file ({error}); save the model again") from error
    added = compressed.n - compressed.unused - compressed.m if compressed else 0
    return [*rows, ("all numbers", total + added, total), ("bytes of the weights", size - codes + added * width, size)]


def _facts(config: dict, base_model: str | None, teacher: str | None, versions: Mapping[str, str] | None) -> dict:
    facts = {name: _short(value) for name, value in (("base model", base_model), ("teacher", teacher)) if value}
    if is_compressed(config):
        settings = [", ".join(f"{f}={bank[f]!r}" for f in _settings(bank) if f in bank) for bank in _banks(config)]
        facts["compression"] = ", ".join(dict.fromkeys(f"`RPSConfig({text})`" for text in settings))
    used = {"hf_rps": __version__, "Python": platform.python_version()}
    used |= {name: version(name) for name in ("torch", "transformers")} | dict(versions or {})
    return facts | {"versions": ", ".join(f"{name} {number}" for name, number in used.items())}


def _settings(bank: dict) -> tuple[str, ...]:
    """Those fields of the record of a shared array that have a meaning with its mapping."""
    if "bits" in bank:
        return ("mapping", "bits", "group_size", "tile", "grad_scaling")
    return ("ratio", "seed", "sharing", "mapping", "sign", "grad_scaling")


def _short(name: str) -> str:
    """Only the last part of a local path, since a card is public; other names as they are."""
    return Path(name).resolve().name if os.path.exists(name) else name
