"""Arguments that say which model: what is trained, how far it is compressed, and where it is published."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers.hf_argparser import HfArg

from finetuning.arguments.parsing import CheckedArguments, parse_overrides
from hf_rps import RPSConfig
from hf_rps.config import DEFAULT_BITS, DEFAULT_RATIO
from hf_rps.mappings.codebook import BITS

TOKENS, SAMPLES = 8192, 64  # that a learned map is calibrated on
_REGEX = set("*+?()[]{}|\\^$")


@dataclass
class ModelArguments(CheckedArguments):
    """Which model: a checkpoint to fine-tune, or a configuration to train from scratch."""

    model_name_or_path: str | None = HfArg(default=None, help="Checkpoint to fine-tune, dense or RPS.")
    config_name: str | None = HfArg(
        default=None, help="Configuration (Hub id, folder or config.json) of a model to train from scratch."
    )
    model_type: str | None = HfArg(
        default=None, help="Model type (vit, gpt2, bert, ...) to train from scratch with its default sizes."
    )
    config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": "Changes to the configuration, as key=value,key=value (in YAML also a mapping)."},
    )
    tokenizer_name: str | None = HfArg(
        default=None, help="Tokenizer, if not the model's; 'bytes' is a byte-level one that needs no files."
    )
    image_processor_name: str | None = HfArg(
        default=None, help="Image processor, if not the model's. From scratch: resize and scale to [-1, 1]."
    )
    model_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the checkpoint.")
    ignore_mismatched_sizes: bool = HfArg(
        default=False, help="Replace a head whose size is not the number of labels by a fresh one."
    )

    def __post_init__(self):
        super().__post_init__()
        sources = ("model_name_or_path", "config_name", "model_type")
        given = [name for name in sources if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"got {' and '.join(given) or 'no model'}; give exactly one of --model_name_or_path (fine-tune a "
                f"checkpoint), --config_name or --model_type (train from scratch)"
            )
        if not isinstance(self.config_overrides, dict):
            self.config_overrides = parse_overrides(self.config_overrides or "")


@dataclass
class RPSArguments(CheckedArguments):
    """How far to compress; see hf_rps.RPSConfig."""

    mode: Literal["rps", "dense", "magnitude", "frozen"] = HfArg(
        default="rps",
        help="Share parameters; or the baselines: the dense model, one pruned by magnitude, or one whose weights stay "
        "as they are, so that biases, norms and embeddings are trained alone (as around a quantised model).",
    )
    ratio: float | None = HfArg(
        default=None,
        help=f"Stored numbers over shared weights, in (0, 1], default {DEFAULT_RATIO}; with magnitude the ratio of "
        f"their bytes. A codebook has none.",
    )
    rps_seed: int = HfArg(default=0, help="Seed of the mapping of weights to stored numbers.")
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "nargs": "+",
            "help": "Modules to share: names, one regex, 'all-linear'; default: attention and MLP.",
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"nargs": "+", "help": "Names, or one regex, of modules to leave dense."}
    )
    share_embeddings: bool = HfArg(default=False, help="Share the base model's embeddings, too.")
    sharing: Literal["global", "block", "module"] = HfArg(
        default="global", help="What shares one array: the whole model, each block, or each module."
    )
    mapping: Literal["fold", "roast", "hash", "codebook"] = HfArg(
        default="fold",
        help="RANDOMFOLD; roast and hash are slow forms, for comparison; codebook is learned from pretrained weights.",
    )
    bits: int | None = HfArg(
        default=None, help=f"With codebook: bits of a weight's code, one of {list(BITS)}; default {DEFAULT_BITS}."
    )
    group_size: int | None = HfArg(
        default=None, help="With codebook: weights of a row that share a codebook; default: all of the row."
    )
    tile: int = HfArg(default=1, help="With codebook: weights side by side that share a code (books of vectors).")
    calibration_samples: int | None = HfArg(
        default=None,
        help=f"With codebook: training samples that it is calibrated on; default: as many as have {TOKENS:,} tokens, "
        f"or {SAMPLES} of what is no text; 0: the weights alone.",
    )
    sign: Literal["row", "element", "none"] = HfArg(
        default="row", help="Random signs: one per row, one per weight (element), or none."
    )
    grad_scaling: Literal["auto", "projection", "norm", "none"] = HfArg(
        default="auto", help="Divisor of the shared gradient; auto: norm with AdamW, projection with SGD."
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) == 1 and (value[0] == "all-linear" or _REGEX & set(value[0])):
                setattr(self, name, value[0])
        config = self.config("adamw")
        self.ratio, self.bits = config.ratio, config.bits  # their defaults depend on the mapping
        self.require("0 or more", "calibration_samples")
        if self.calibration_samples is not None and not config.is_learned:
            raise ValueError(
                f"calibration_samples={self.calibration_samples} has no meaning with mapping={self.mapping!r}, which "
                f"is drawn from a seed; leave it out, or give --mapping codebook"
            )
        if self.mode == "magnitude" and config.is_learned:
            raise ValueError(
                f"mapping={self.mapping!r} has no meaning with mode='magnitude', which prunes; leave it out, and give "
                f"--ratio"
            )

    def config(self, optimizer: str) -> RPSConfig:
        """The RPSConfig for training with ``optimizer``. Adam-like optimizers want gradients of the usual size."""
        automatic = "projection" if optimizer == "sgd" else "norm"
        return RPSConfig(
            ratio=self.ratio,
            seed=self.rps_seed,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            share_embeddings=self.share_embeddings,
            sharing=self.sharing,
            mapping=self.mapping,
            bits=self.bits,
            group_size=self.group_size,
            tile=self.tile,
            sign=self.sign,
            grad_scaling=automatic if self.grad_scaling == "auto" else self.grad_scaling,
        )


@dataclass
class HubArguments(CheckedArguments):
    """Publishing. The token is the one of `hf auth login`, or HF_TOKEN."""

    push_to_hub: bool = HfArg(default=False, help="Push the model, its card and its tokenizer when training is over.")
    hub_model_id: str | None = HfArg(default=None, help="Repository, user/name; default: the output folder's name.")
    hub_private_repo: bool = HfArg(default=False, help="Make the repository private, if it is new.")
    hub_revision: str | None = HfArg(default=None, help="Branch to push to; made if it does not exist.")
