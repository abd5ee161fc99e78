"""Which of transformers' Auto classes loads a model, and what the Hub calls its task."""

from __future__ import annotations

from transformers.models.auto import modeling_auto

# Auto class, the Hub's task, transformers' table. Of a class that stands in several tables the first one counts.
_TASKS = [
    ("AutoModelForSequenceClassification", "text-classification", "SEQUENCE_CLASSIFICATION"),
    ("AutoModelForTokenClassification", "token-classification", "TOKEN_CLASSIFICATION"),
    ("AutoModelForQuestionAnswering", "question-answering", "QUESTION_ANSWERING"),
    ("AutoModelForMultipleChoice", "multiple-choice", "MULTIPLE_CHOICE"),
    ("AutoModelForImageClassification", "image-classification", "IMAGE_CLASSIFICATION"),
    ("AutoModelForImageTextToText", "image-text-to-text", "IMAGE_TEXT_TO_TEXT"),
    ("AutoModelForObjectDetection", "object-detection", "OBJECT_DETECTION"),
    ("AutoModelForSemanticSegmentation", "image-segmentation", "SEMANTIC_SEGMENTATION"),
    ("AutoModelForAudioClassification", "audio-classification", "AUDIO_CLASSIFICATION"),
    ("AutoModelForCTC", "automatic-speech-recognition", "CTC"),
    ("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition", "SPEECH_SEQ_2_SEQ"),
    ("AutoModelForSeq2SeqLM", "text2text-generation", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("AutoModelForMaskedLM", "fill-mask", "MASKED_LM"),
    ("AutoModelForCausalLM", "text-generation", "CAUSAL_LM"),
]


def auto_class_of(config: dict) -> tuple[str, str | None]:
    """The class that loads the model with this config.json, and the model's task if it is known."""
    name, kind = (config.get("architectures") or [None])[0], config.get("model_type")
    for auto_class, task, table in _TASKS:
        if name is not None and name == getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).get(kind):
            return auto_class, task
    is_base = name == modeling_auto.MODEL_MAPPING_NAMES.get(kind)
    return "AutoModel", "feature-extraction" if is_base else None
