"""RPSSettings: what to share, how far, and how. RPSConfig (PEFT's config, for users) is these settings and PEFT's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from hf_rps.mappings.base import Target
from hf_rps.mappings.codebook import BITS
from hf_rps.mappings.table import MAPPINGS
from hf_rps.mappings.weight_map import SHARING, SIGNS, WeightMap
from hf_rps.psi.divisor import SCALINGS

MODES = ("replace", "delta")
BIASES = ("none", "all", "rps_only")
INIT_WEIGHTS = (True, False, "project", "rescale")
_MAPPING_HELP = "; ".join(f"'{name}': {mapping.help}" for name, mapping in MAPPINGS.items()) + "."
# of a delta's C: learning rates of adapters are about ten times those of full fine-tuning, and at their ratios the best
# one was measured to stay put with the square root (docs/adapters.md)
_DELTA_STD = {"std_factor": 10.0, "std_exponent": 0.5}


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_names(value) -> bool:
    """True for a list, tuple or set of non-empty strings."""
    return isinstance(value, (list, tuple, set)) and all(isinstance(name, str) and name for name in value)


def _is_patterns(value) -> bool:
    return value is None or (isinstance(value, str) and value != "") or (is_names(value) and len(value) > 0)


def _is_layers(value) -> bool:
    listed = value if isinstance(value, (list, tuple)) else [value]
    return value is None or all(_is_int(i) and i >= 0 for i in listed)


def _is_init_weights(value) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value in INIT_WEIGHTS)


_PATTERNS = "None, a non-empty string or a non-empty list of names"
DEFAULT_RATIO = 0.1
DEFAULT_BITS = 4
MOST_TILE = 16
_VALID = {
    "ratio": (
        lambda v: v is None or (_is_number(v) and 0 < v <= 1),
        "a number in (0, 1], the share of the targeted weights to store",
    ),
    "bits": (lambda v: v is None or (_is_int(v) and v in BITS), f"one of {list(BITS)}, bits of a weight's code"),
    "group_size": (
        lambda v: v is None or (_is_int(v) and v >= 1),
        "None (whole rows) or how many weights of a row share a codebook",
    ),
    "tile": (lambda v: _is_int(v) and 1 <= v <= MOST_TILE, f"an integer from 1 to {MOST_TILE}, weights with one code"),
    "seed": (_is_int, "an integer"),
    "share_embeddings": (lambda v: isinstance(v, bool), "True or False"),
    "input_fold": (lambda v: v == "full" or (_is_int(v) and v >= 1), "an integer of at least 1, or 'full'"),
    "target_modules": (_is_patterns, _PATTERNS),
    "exclude_modules": (_is_patterns, _PATTERNS),
    "layers_pattern": (_is_patterns, _PATTERNS),
    "modules_to_save": (lambda v: v is None or is_names(v), "None or a list of names"),
    "layers_to_transform": (_is_layers, "None, a layer index or a list of them"),
    "init_weights": (_is_init_weights, f"one of {list(INIT_WEIGHTS)}"),
    "init_std": (lambda v: v is None or (_is_number(v) and math.isfinite(v) and v > 0),
                 "None (automatic) or a positive number"),
}  # fmt: skip
_CHOICES = {
    "mode": MODES, "bias": BIASES, "sharing": SHARING, "mapping": MAPPINGS, "sign": SIGNS, "grad_scaling": SCALINGS,
}  # fmt: skip


def most_input_fold(ratio: float) -> int:
    """The largest fold c with ratio * c <= 1.

    >>> most_input_fold(0.1), most_input_fold(0.3), most_input_fold(1)
    (10, 3, 1)
    """
    return math.floor(1 / ratio * (1 + 1e-9))


def check(condition: bool, name: str, value, expected: str) -> None:
    """Raise a ValueError that names the field, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"RPSConfig: {name}={value!r} is not valid; expected {expected}")


@dataclass
class RPSSettings:
    """The fields of :class:`hf_rps.RPSConfig`, where they are described, without those of PEFT."""

    ratio: float | None = field(
        default=None,
        metadata={
            "help": f"Stored numbers over targeted weights, m / n, in (0, 1]; default {DEFAULT_RATIO}. "
            f"A learned mapping has none."
        },
    )
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
    share_embeddings: bool = field(
        default=False, metadata={"help": "Share the tables of embeddings of the base model, too."}
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
    mapping: str = field(default="fold", metadata={"help": _MAPPING_HELP, "choices": tuple(MAPPINGS)})
    sign: str = field(default="row", metadata={"help": "'row', 'element' (slow) or 'none'.", "choices": SIGNS})
    bits: int | None = field(
        default=None,
        metadata={"help": f"Of a weight's code with mapping='codebook': {list(BITS)}; default {DEFAULT_BITS}."},
    )
    group_size: int | None = field(
        default=None,
        metadata={"help": "With mapping='codebook', weights of a row that share a codebook; default: all of the row."},
    )
    tile: int = field(
        default=1,
        metadata={"help": "With mapping='codebook', weights side by side that share a code: books of vectors."},
    )
    input_fold: int | str = field(
        default=1,
        metadata={"help": "Fold inputs so many times, which divides the multiplications; 'full': as far as it goes."},
    )
    grad_scaling: str = field(
        default="projection",
        metadata={
            "help": "Divisor of the gradient: 'projection' (Gamma), 'norm' (its root, for Adam-likes) or 'none'.",
            "choices": SCALINGS,
        },
    )
    init_std: float | None = field(default=None, metadata={"help": "Std of the shared array at init; None: automatic."})
    init_weights: bool | str = field(
        default=True, metadata={"help": "True (automatic), False (fresh draws), 'project' or 'rescale'."}
    )
    modules: list[str] | None = field(default=None, metadata={"help": "The recorded map; leave out."})
    fingerprint: str | None = field(default=None, metadata={"help": "Of the recorded map; leave out."})
    learned: str | None = field(default=None, metadata={"help": "Digest of a learned map's codes; leave out."})

    # what from_pretrained(quantization_config=RPSConfig(...)) and transformers' registry ask for
    quant_method = "rps"

    def __post_init__(self):
        for name, (is_valid, expected) in _VALID.items():
            check(is_valid(getattr(self, name)), name, getattr(self, name), expected)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            check(isinstance(value, str) and value in choices, name, value, f"one of {list(choices)}")
        left_out = [f.name for f in fields(RPSSettings) if getattr(self, f.name) == f.default]
        self._fit_to_mapping()
        self._left_out = {name: getattr(self, name) for name in left_out}
        most = 1 if self.is_learned else most_input_fold(self.ratio)
        if self.input_fold != "full" and self.input_fold > most:
            raise ValueError(
                f"RPSConfig: input_fold={self.input_fold} leaves 1/{self.input_fold} of the weights, fewer than "
                f"ratio={self.ratio} stores; expected at most {most} at this ratio ('full')"
            )
        recorded = "None; it is recorded when a model is compressed"
        check(self.modules is None or is_names(self.modules), "modules", self.modules, recorded)
        for name in ("fingerprint", "learned"):
            value = getattr(self, name)
            check(value is None or isinstance(value, str), name, value, recorded)
        if self.mode == "delta":
            fresh = isinstance(self.init_weights, bool)
            check(fresh, "init_weights", self.init_weights, "True or False with mode='delta'")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value) if isinstance(value, set) else list(value))

    @property
    def is_learned(self) -> bool:
        """True where the map is learned from the weights, and not drawn from the seed."""
        return MAPPINGS[self.mapping].is_learned

    def is_left_out(self, name: str) -> bool:
        """True where the field was not given a value of its own: an adapter takes that of its base."""
        return name in self._left_out and getattr(self, name) == self._left_out[name]

    def _fit_to_mapping(self) -> None:
        """Set the defaults that depend on the mapping, and refuse what has no meaning with it."""
        if not self.is_learned:
            self.ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
            for name, default in OPTIONS.items():
                if getattr(self, name) != default and name not in MAPPINGS[self.mapping].options:
                    raise ValueError(
                        f"RPSConfig: {name}={getattr(self, name)!r} has no meaning with mapping={self.mapping!r}; it "
                        f"belongs to mapping='codebook'"
                    )
            return
        self.bits = DEFAULT_BITS if self.bits is None else self.bits
        if self.group_size is not None and self.group_size % self.tile:
            raise ValueError(
                f"RPSConfig: group_size={self.group_size} is no multiple of tile={self.tile}, whose weights have one "
                f"code and one codebook; take {max(1, self.group_size // self.tile) * self.tile}"
            )
        meaningless = {
            "ratio": (None, f"what is stored follows from bits={self.bits} and group_size"),
            "mode": (
                "replace",
                "a learned map stands for weights that are there, and its adapters have codebooks of their own",
            ),
            "sharing": ("global", "every row has codebooks of its own"),
            "sign": ("row", "its numbers have their signs"),
            "input_fold": (1, "pretrained weights can't be folded without losing them"),
        }
        for name, (only, why) in meaningless.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"RPSConfig: {name}={getattr(self, name)!r} has no meaning with mapping={self.mapping!r}: {why}; "
                    f"leave it out"
                )
        fits = self.init_weights in (True, "project")
        check(fits, "init_weights", self.init_weights, f"True or 'project' with mapping={self.mapping!r}")

    def recorded_targets(self) -> list[Target] | None:
        """The targets of the recorded map, or None."""
        return None if self.modules is None else [Target.parse(text) for text in self.modules]

    def weight_map(self, targets: Sequence[Target], learned: str | None = None) -> WeightMap:
        """The map of ``targets`` onto the shared array that these settings give.

        ``learned`` is the digest of what a learned map has stored, by default the recorded one.

        Raises:
            ValueError: A map is recorded, and this is another one.
        """
        weight_map = WeightMap(
            targets,
            ratio=self.ratio,
            seed=self.seed,
            sharing=self.sharing,
            mapping=self.mapping,
            sign=self.sign,
            input_fold=most_input_fold(self.ratio) if self.input_fold == "full" else self.input_fold,
            init_std=self.init_std,
            options={name: getattr(self, name) for name in MAPPINGS[self.mapping].options},
            learned=self.learned if learned is None else learned,
            **(_DELTA_STD if self.mode == "delta" else {}),
        )
        if self.fingerprint is not None and learned not in (None, self.learned):
            raise ValueError(
                f"this config records the codes of a learned map ({self.learned}), and these weights and inputs give "
                f"others ({learned}). Load the checkpoint with from_pretrained, which has the codes; or leave out "
                f"modules, fingerprint and learned for a map of its own"
            )
        if self.fingerprint not in (None, weight_map.fingerprint):
            raise ValueError(
                f"this config records the map {self.fingerprint}, but its modules, ratio={self.ratio!r}, "
                f"seed={self.seed!r}, sharing={self.sharing!r}, mapping={self.mapping!r}, sign={self.sign!r} and "
                f"input_fold={self.input_fold!r} give {weight_map.fingerprint}. Its weights would be read in the wrong "
                f"places; restore its adapter_config.json, or wherever it was saved"
            )
        return weight_map


# fields that only some mappings have, and what they are with the others
OPTIONS = {f.name: f.default for f in fields(RPSSettings) if any(f.name in m.options for m in MAPPINGS.values())}
