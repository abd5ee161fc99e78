"""The model card of a PEFT adapter, which begins by saying that a reader must import hf_rps."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from hf_rps.integrations.model_card import REPOSITORY, TAGS, with_note
from hf_rps.version import __version__

_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_NOTE = """\
This is an RPS adapter (randomized parameter sharing), made with hf_rps {version}.
**Import `hf_rps` before you load it**; without hf_rps, PEFT raises `KeyError: 'RPS'`.

```python
import hf_rps
from peft import {auto_class}

model = {auto_class}.from_pretrained("{repository}")
```

{kind} {m:,} trained numbers stand for {n:,} weights in {count} modules (ratio {ratio:.3g}).
"""
_KINDS = {
    "replace": "The adapter holds the weights of the modules themselves; the base model's are not used.",
    "delta": "The adapter is added to the weights of the base model and can be merged into them.",
    "learned": "The adapter is codebooks in the place of the base model's and needs just that compressed model.",
}


def write_card(folder: Path, config) -> None:
    """Put the note at the head of ``folder``/README.md, once; create the file if there is none.

    Args:
        folder: Where the adapter was saved.
        config: Its RPSConfig, with the map recorded in it.
    """
    path = folder / "README.md"
    if path.exists():
        card = ModelCard.load(path)
    else:
        data = ModelCardData(library_name="peft", base_model=config.base_model_name_or_path or None)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n")
    card.data.tags = [*(tag for tag in card.data.tags or () if tag not in TAGS), *TAGS]
    weight_map = config.recorded
    task = getattr(config.task_type, "value", config.task_type)
    note = _NOTE.format(
        repository=REPOSITORY,
        version=__version__,
        auto_class=_CLASSES.get(task, "AutoPeftModel"),
        kind=_KINDS[config.mode if weight_map.learned is None else "learned"],
        n=weight_map.n,
        m=weight_map.m,
        count=len(weight_map.targets),
        ratio=weight_map.m / weight_map.n,
    )
    path.write_text(with_note(str(card), note), encoding="utf-8", newline="")
