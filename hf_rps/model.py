"""get_rps_model, to_dense and get_rps_config: the library's verbs. They stand above all else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hf_rps import conversion
from hf_rps.config import RPSSettings
from hf_rps.integrations.peft.config import RPSConfig
from hf_rps.integrations.transformers import quantization_config, quantizer
from hf_rps.learning.batches import batches_of


def get_rps_model(
    model: nn.Module, config: RPSSettings, calibration: Iterable[Any] | None = None, tokenizer: Any = None
) -> nn.Module:
    """Compress ``model`` in place: all targeted weights become slices of one shared trainable array.

    Args:
        model: Any transformers model (or torch module), randomly initialised or pretrained, in memory. In a module
            that holds transformers models without being one (a SentenceTransformer, two towers), each of these gets a
            shared array of its own, so that each saves itself. The config of a transformers model is copied before it
            is marked; a model around it keeps the old object.
        config: See :class:`hf_rps.RPSConfig`. One that :func:`get_rps_config` returned gives the same map again.
        calibration: For a map that is learned (``mapping="codebook"``): a few thousand tokens of what the model is for,
            as a list of texts or as batches (a DataLoader; dictionaries of arguments, tensors or tuples). The map then
            keeps what the layers compute on them, layer by layer; without it, their weights (k-means). All of them are
            read, and the outputs of the blocks are kept meanwhile: tokens x hidden size x blocks numbers. Such a model,
            saved, is also the base of adapters: ``peft.get_peft_model(model, RPSConfig(mapping="codebook"))``.
        tokenizer: Of texts; default: that of the model's name or folder.

    Returns:
        The same object, of the same class. At ``ratio=1`` it computes what it computed before, to float rounding.

    Raises:
        ValueError: The config or the model does not fit; the message names the field or module, what was received and
            the remedy. The model is then as it was.
    """
    if not isinstance(config, RPSSettings):
        raise ValueError(f"config must be an hf_rps.RPSConfig, got {type(config).__name__}: {config!r}")
    if config.mode != "replace":
        raise ValueError(
            f"get_rps_model replaces weights, got RPSConfig(mode={config.mode!r}); add an adapter to a model with "
            f"peft.get_peft_model(model, config)"
        )
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    for bank in conversion.find_banks(model)[:1]:
        part, _ = conversion.bank_owner(model, bank)
        raise ValueError(
            f"this {type(model).__name__} is already compressed{f' in its {part!r}' if part else ''}; call "
            f"hf_rps.to_dense(model) first to compress it anew, or compress its other parts by themselves"
        )
    if hasattr(model, "peft_config"):
        raise ValueError("this model carries PEFT adapters; merge them (merge_and_unload) before get_rps_model")
    if calibration is not None and not config.is_learned:
        raise ValueError(
            f"calibration is for a map that is learned, and mapping={config.mapping!r} is drawn from the seed; leave "
            f"it out, or take RPSConfig(mapping='codebook', bits=4)"
        )
    _check_float(model)
    batches = [] if calibration is None else batches_of(calibration, model, tokenizer)
    quantizer.compress(model, config, batches)
    return model


def get_rps_config(model: nn.Module) -> RPSConfig:
    """The config that gives the map of a compressed ``model`` again, wherever it is used.

    An RPSConfig alone does not decide the map: the standard deviations of the weights that the model had go into it. To
    load a state dict of one compressed model into another one (``torch.save``, checkpoints of training loops, plain
    torch modules), compress the other one with this config. It is an ordinary RPSConfig, with ``modules`` and
    ``fingerprint`` set, which ``save_pretrained`` writes and ``RPSConfig.from_pretrained`` reads.

    Raises:
        ValueError: ``model`` is not compressed, or holds several shared arrays.
    """
    banks = conversion.find_banks(model)
    if len(banks) != 1:
        found = f"{len(banks)} shared arrays; ask for each part's by itself" if banks else "no shared array"
        raise ValueError(f"this {type(model).__name__} has {found}")
    return quantization_config.record_of(banks[0]).settings()


def _check_float(model: nn.Module) -> None:
    """Refuse a quantised model. One that was loaded from a GGUF file is float already, whatever it says."""
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if method is None and not getattr(model, "is_quantized", False):
        return
    name = getattr(method, "quant_method", "an unknown method")
    name = getattr(name, "value", name)
    if name == "gguf" and all(p.is_floating_point() and p.element_size() >= 2 for p in model.parameters()):
        return
    raise ValueError(
        f"this {type(model).__name__} is quantised with {name}; RPS shares float weights, so load it without a "
        f"quantization_config (or call model.dequantize() first)"
    )


def to_dense(model: nn.Module) -> nn.Module:
    """Decompress ``model`` in place: a plain model again, with the weights that the shared array stood for.

    Every weight has memory of its own.

    Raises:
        ValueError: ``model`` is not compressed.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("this model carries PEFT adapters; call its merge_and_unload() for a plain model")
    quantizer.decompress(model)
    return model
