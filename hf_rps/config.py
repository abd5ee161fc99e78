"""RPSConfig: what to share, how far, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftConfig

from hf_rps.integrations.peft.card import write_card
from hf_rps.integrations.peft.peft_type import RPS
from hf_rps.mapping import MAPPINGS, SHARING, SIGNS, Target, WeightMap

MODES = ("replace", "delta")
BIASES = ("none", "all", "rps_only")
# of a delta's C: learning rates of adapters are about ten times those of full fine-tuning, and at their ratios the best
# one was measured to stay put with the square root (docs/adapters.md)
_DELTA_STD = {"std_factor": 10.0, "std_exponent": 0.5}
GRAD_SCALINGS = ("projection", "norm", "none")
INIT_WEIGHTS = (True, False, "project", "rescale")


def _check(condition: bool, name: str, value, expected: str) -> None:
    if not condition:
        raise ValueError(f"RPSConfig: {name}={value!r} is not valid; expected {expected}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_names(value) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(name, str) and name for name in value)


@dataclass
class RPSConfig(PeftConfig):
    """Configuration of randomized parameter sharing (STABLE-RPS, ICLR 2024).

    All targeted weights, n numbers, are replaced by signed, scaled slices of one shared trainable array of
    m = round(ratio * n) numbers. ``RPSConfig(ratio=0.1)`` is meant to be right for nearly everyone.

    Args:
        ratio: Stored numbers over targeted weights, m / n, in (0, 1]. 0.1 stores a tenth; 1 is the dense model itself.
        mode: "replace" (default): the shared array stands for the targeted weights, which are freed. "delta", with
            PEFT only: it stands for a change of them, W = W0 + RPS(psi), zero at first: an adapter of full rank, for
            ratios like 0.001.
        seed: Seed of the mapping (rotations and signs). It does not drive torch's generator.
        target_modules: Names (suffixes) of the modules to share, a regular expression over full names, or
            "all-linear". Default None: every attention and MLP projection of the base model, that is every linear
            layer and Conv1D but the output head, the classifier and tied weights. In a base model without linear
            layers (ResNet) it is every convolution; elsewhere convolutions are shared where they are named. Adapters
            (PEFT) share linear layers only.
        exclude_modules: Names (suffixes) or a regular expression of modules to leave dense.
        layers_to_transform: Index or indices of the transformer layers to share; default all.
        layers_pattern: Name of the module list that ``layers_to_transform`` counts, if it is not one of the usual.
        modules_to_save: Names (suffixes) of further modules to leave dense and, with PEFT, to train and save.
        bias: With PEFT, which biases to train and save: "none" (default), "all" of the model, or those of the targeted
            modules ("rps_only").
        sharing: "global" shares one array between all targets (the best accuracy at equal m); "block" gives each
            transformer block, "module" each module, a segment of its own.
        mapping: "fold" (RANDOMFOLD, weights are views, dense speed). "roast" (hashed tiles of 64 weights, ICML 2023)
            and "hash" (a hash a weight, HashedNets, ICML 2015) are slow forms, for comparison.
        sign: "row", one hashed sign per output row, which is free; "element", one per weight, the paper's exact form
            and slow; "none".
        grad_scaling: What the shared array's gradient is divided by, slot by slot. "projection" (Gamma, the sum of
            squared scales): an SGD step is the projection of the dense one, stable wherever dense training is.
            "norm" (its square root): the size of the gradient stays that of the dense model's, so that Adam's epsilon
            and gradient clipping keep their meaning; for adaptive optimizers. "none" (1): the unstable ROAST.
        init_std: Standard deviation C of the shared array at init. None (default): RMS of the modules' own
            standard deviations times (m / n)**(1/3), with which a dense recipe's learning rate (AdamW) carries over;
            with ``mode="delta"`` ten times sqrt(m / n), so that the rates usual for adapters (AdamW, 1e-3) suit. Not a
            knob to tune; it exists to reproduce the paper's sweep, and configs of saved models record what it was.
        init_weights: Where the shared array starts. True (default): "project" for weights loaded from a checkpoint,
            "rescale" for randomly initialised ones. "project": the least-squares fit, sum(scale sign w) / Gamma_j.
            "rescale": sum(sign w / scale) / sqrt(count_j), which keeps every module's own std. Both are exact
            at ratio 1. False: independent draws from N(0, C**2) of torch's generator. With ``mode="delta"`` True is
            zero and False is draws.
        modules, fingerprint: The map, recorded in the config of a PEFT adapter when it is made and checked when it is
            loaded. Leave them out.

    Raises:
        ValueError: A field is out of its range; the message names field, value and what is expected.

    >>> RPSConfig(ratio=2)
    Traceback (most recent call last):
        ...
    ValueError: RPSConfig: ratio=2 is not valid; expected a number in (0, 1], the share of the targeted weights to store
    """

    ratio: float = field(default=0.1, metadata={"help": "Stored numbers over targeted weights, m / n, in (0, 1]."})
    mode: str = field(
        default="replace",
        metadata={"help": "'replace' the weights or, with PEFT, add a 'delta' to them.", "choices": MODES},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the mapping (rotations and signs)."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Module names, a regex or 'all-linear'; default: every attention and MLP projection."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regex of modules to leave dense."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to share; default all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to leave dense and, with PEFT, to train and save."}
    )
    bias: str = field(
        default="none", metadata={"help": "With PEFT, biases to train: 'none', 'all' or 'rps_only'.", "choices": BIASES}
    )
    sharing: str = field(default="global", metadata={"help": "'global', 'block' or 'module'.", "choices": SHARING})
    mapping: str = field(default="fold", metadata={"help": "'fold'; slow: 'roast', 'hash'.", "choices": MAPPINGS})
    sign: str = field(default="row", metadata={"help": "'row', 'element' (slow) or 'none'.", "choices": SIGNS})
    grad_scaling: str = field(
        default="projection",
        metadata={
            "help": "Divisor of the gradient: 'projection' (Gamma), 'norm' (its root, for Adam-likes) or 'none'.",
            "choices": GRAD_SCALINGS,
        },
    )
    init_std: float | None = field(default=None, metadata={"help": "Std of the shared array at init; None: automatic."})
    init_weights: bool | str = field(
        default=True, metadata={"help": "True (automatic), False (fresh draws), 'project' or 'rescale'."}
    )
    modules: list[str] | None = field(default=None, metadata={"help": "Recorded with an adapter; leave out."})
    fingerprint: str | None = field(default=None, metadata={"help": "Recorded with an adapter; leave out."})

    # what from_pretrained(quantization_config=RPSConfig(...)) and transformers' registry ask for
    quant_method = "rps"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = RPS
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        _check(
            number and 0 < self.ratio <= 1,
            "ratio",
            self.ratio,
            "a number in (0, 1], the share of the targeted weights to store",
        )
        _check(_is_int(self.seed), "seed", self.seed, "an integer")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            ok = value is None or (isinstance(value, str) and value) or (_is_names(value) and len(value) > 0)
            _check(ok, name, value, "None, a non-empty string or a non-empty list of names")
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value) if isinstance(value, set) else list(value))
        _check(
            self.modules_to_save is None or _is_names(self.modules_to_save),
            "modules_to_save",
            self.modules_to_save,
            "None or a list of names",
        )
        layers = self.layers_to_transform
        listed = isinstance(layers, (list, tuple)) and all(_is_int(i) and i >= 0 for i in layers)
        _check(
            layers is None or listed or (_is_int(layers) and layers >= 0),
            "layers_to_transform",
            layers,
            "None, a layer index or a list of them",
        )
        for name, choices in (
            ("mode", MODES),
            ("bias", BIASES),
            ("sharing", SHARING),
            ("mapping", MAPPINGS),
            ("sign", SIGNS),
            ("grad_scaling", GRAD_SCALINGS),
        ):
            value = getattr(self, name)
            _check(isinstance(value, str) and value in choices, name, value, f"one of {list(choices)}")
        initial = self.init_weights
        known = isinstance(initial, bool) or (isinstance(initial, str) and initial in INIT_WEIGHTS)
        _check(known, "init_weights", initial, f"one of {list(INIT_WEIGHTS)}")
        delta = self.mode == "delta"
        _check(not delta or isinstance(initial, bool), "init_weights", initial, "True or False with mode='delta'")
        std = self.init_std
        number = isinstance(std, (int, float)) and not isinstance(std, bool)
        _check(
            std is None or (number and math.isfinite(std) and std > 0),
            "init_std",
            std,
            "None (automatic) or a positive number",
        )
        for name, ok in (
            ("modules", self.modules is None or _is_names(self.modules)),
            ("fingerprint", self.fingerprint is None or isinstance(self.fingerprint, str)),
        ):
            _check(ok, name, getattr(self, name), "None; it is recorded when an adapter is made")

    def weight_map(self, targets: Sequence[Target]) -> WeightMap:
        """The map of ``targets`` onto the shared array that these settings give."""
        return WeightMap(
            targets,
            ratio=self.ratio,
            seed=self.seed,
            sharing=self.sharing,
            mapping=self.mapping,
            sign=self.sign,
            init_std=self.init_std,
            **(_DELTA_STD if self.mode == "delta" else {}),
        )

    def record(self, weight_map: WeightMap) -> None:
        """Remember the map of the adapter made with this config, to be saved with it.

        The fields stay as they are, so that one config can be used for several models.
        """
        self._recorded = weight_map

    @property
    def recorded(self) -> WeightMap | None:
        """The map of the adapter made with this config last, if any."""
        return getattr(self, "_recorded", None)

    def to_dict(self) -> dict:
        """The fields, and the recorded map among them."""
        if self.recorded is None:
            return super().to_dict()
        modules = [str(target) for target in self.recorded.targets]
        record = {"modules": modules, "fingerprint": self.recorded.fingerprint, "init_std": self.recorded.init_std}
        return super().to_dict() | record

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write adapter_config.json and, for an adapter, the model card's first lines; see PeftConfig."""
        super().save_pretrained(save_directory, **kwargs)
        if self.recorded is not None:
            write_card(Path(save_directory), self)
