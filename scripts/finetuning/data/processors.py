"""The tokenizer or image processor of a run, and how many tokens a sequence may have."""

from __future__ import annotations

import transformers
from transformers import AutoImageProcessor, AutoTokenizer, ByT5Tokenizer

from finetuning.arguments.model import ModelArguments

# the one without torchvision; before it got a name of its own it was ViTImageProcessor
ImageProcessor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor


def load_tokenizer(args: ModelArguments, config):
    """The tokenizer, with a padding token. A configuration to train from scratch takes over its vocabulary."""
    name = args.tokenizer_name or args.model_name_or_path or args.config_name
    if name == "bytes":
        tokenizer = ByT5Tokenizer(extra_ids=0)  # 256 bytes and 3 special tokens
    else:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=None if args.tokenizer_name else args.model_revision)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"tokenizer {name!r} has neither a padding nor an end-of-sequence token; use another one")
        tokenizer.pad_token = tokenizer.eos_token
    if not args.model_name_or_path:
        config.vocab_size = args.config_overrides.get("vocab_size", len(tokenizer))
        for token in ("bos_token_id", "eos_token_id"):
            setattr(config, token, getattr(tokenizer, token))
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = tokenizer.pad_token_id
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer {name!r} has {len(tokenizer)} tokens, but the model's vocab_size is {config.vocab_size}; use "
            f"the model's own tokenizer, or a larger vocab_size"
        )
    config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def load_image_processor(args: ModelArguments, config, size: int | None):
    """The image processor; from scratch one that resizes to the configuration's size and scales to [-1, 1]."""
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        raise ValueError(f"the model takes {channels} channels; only grey (1) and RGB (3) images can be read")
    name = args.image_processor_name or args.model_name_or_path
    if name:
        return AutoImageProcessor.from_pretrained(name)
    if size and hasattr(config, "image_size"):
        config.image_size = size
    size = size or getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    middle = [0.5] * channels
    return ImageProcessor(size={"height": height, "width": width}, image_mean=middle, image_std=middle)


def length_limit(wanted: int | None, flag: str, cap: int, config, tokenizer) -> int:
    """Tokens per sequence: ``wanted``, or as many as model and tokenizer take, at most ``cap``."""
    positions = getattr(config, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) and positions > 0 else None
    if wanted and positions and wanted > positions:
        raise ValueError(f"{flag}={wanted} is more than the {positions} positions of the model; lower it")
    return wanted or min(cap, tokenizer.model_max_length, positions or cap)
