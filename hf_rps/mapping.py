"""The weight map: for every targeted matrix its slots in the shared array, its signs and its scale.

    W_i[r, c] = scale_i * sign_i(r) * psi[slot(start_i + r * C_i + c)]

A map is pure arithmetic on names, shapes, standard deviations and a seed: it holds no tensor, is rebuilt wherever it is
needed, and is told apart from every other map by its ``fingerprint``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hf_rps.folding import Fold, RowLayout, Span, draw_shifts, slots_for
from hf_rps.hashing import hash_range, hash_signs, stream_key

INIT_EXPONENT = 1 / 3  # of m / n in the default C; docs/comparison.md has the measurement
ROAST_TILE = 64  # weights a hashed tile; Desai, Zhou and Shrivastava, ICML 2023, use tiles of this order

# How many weights can be pieced together on a CPU in the time that a run of its own costs; docs/benchmarks.md has the
# measurement.
WEIGHTS_A_RUN = 1 << 15
UNFOLD_UP_TO = 1 << 20  # weights; beyond, a copy of all of them would be memory that sharing is there to save

SHARING = ("global", "block", "module")
MAPPINGS = ("fold", "roast", "hash")
SIGNS = ("row", "element", "none")


@dataclass(frozen=True)
class Target:
    """One matrix to be shared: its name, its shape (out_features, in_features) and its standard deviation at init."""

    name: str
    out_features: int
    in_features: int
    std: float

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    def __str__(self) -> str:
        """The form in which configs record a target."""
        return f"{self.name} {self.out_features}x{self.in_features} std {self.std!r}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Inverse of ``str(target)``.

        >>> Target.parse("layer.0.q 8x4 std 0.02")
        Target(name='layer.0.q', out_features=8, in_features=4, std=0.02)
        """
        match = re.fullmatch(r"(.+) (\d+)x(\d+) std (\S+)", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"recorded module {text!r} is not of the form 'NAME ROWSxCOLS std STD'")
        return cls(match[1], int(match[2]), int(match[3]), float(match[4]))


def sharing_group(name: str, sharing: str) -> str:
    """The group of module ``name``: one for all ("global"), one a numbered block ("block"), one each ("module").

    >>> sharing_group("encoder.layer.3.attention.q", "block")
    'encoder.layer.3'
    """
    if sharing == "global":
        return ""
    if sharing == "module":
        return name
    block = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return block.group() if block else ""


class WeightMap:
    """Slots, signs and scales of all targets over one shared array of m numbers.

    With ``sharing`` other than "global" each group of modules has a segment of the array of its own, mapped by itself.
    ``init_std`` is C, the standard deviation of the shared array at init, from which scale_i = std_i / C. Its default,
    RMS(std) * (m / n)**(1/3), makes every scale about (n / m)**(1/3), so that an AdamW step of size lr on the shared
    array moves a weight by (n / m)**(1/3) * lr. With it the dense model's best learning rate was measured to stay the
    best one. ``std_factor`` multiplies that default, ``std_exponent`` stands for the 1/3.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        ratio: float,
        seed: int = 0,
        sharing: str = "global",
        mapping: str = "fold",
        sign: str = "row",
        init_std: float | None = None,
        std_factor: float = 1.0,
        std_exponent: float = INIT_EXPONENT,
    ):
        self.targets = tuple(targets)
        self.ratio, self.seed, self.sharing, self.mapping, self.sign = ratio, seed, sharing, mapping, sign
        self.index = {target.name: i for i, target in enumerate(self.targets)}
        if not self.targets or len(self.index) != len(self.targets):
            raise ValueError(f"a weight map needs targets with distinct names, got {[t.name for t in self.targets]}")
        groups: dict[str, list[Target]] = {}
        for target in self.targets:
            groups.setdefault(sharing_group(target.name, sharing), []).append(target)
        self._spans: dict[str, tuple[Fold, Span]] = {}
        self._keys: dict[str, int] = {}
        base = 0
        for group, members in groups.items():
            spans, start = [], 0
            for target in members:
                spans.append(Span(start, target.out_features, target.in_features))
                start = spans[-1].stop
            slots, alignment = slots_for(start, ratio)
            self._keys[group] = key = stream_key(seed, mapping, group)
            shifts = draw_shifts(start, slots, alignment, key, spans) if mapping == "fold" else ()
            fold = Fold(start, slots, shifts, base)
            self._spans.update((target.name, (fold, span)) for target, span in zip(members, spans, strict=True))
            base += slots
        self.folds = tuple(dict.fromkeys(fold for fold, _ in self._spans.values()))
        self.n = sum(target.numel for target in self.targets)
        self.m = base
        mean_square = math.fsum(t.numel * (t.std * t.std) for t in self.targets) / self.n
        default = std_factor * math.sqrt(mean_square) * (self.m / self.n) ** std_exponent
        self.init_std = default if init_std is None else init_std
        if not (self.init_std > 0 and math.isfinite(self.init_std)):
            raise ValueError(f"the shared array needs a positive, finite init_std, got {self.init_std}")

    def scale(self, name: str) -> float:
        """scale_i = std_i / C of one target."""
        return self.targets[self.index[name]].std / self.init_std

    def layout(self, name: str) -> RowLayout | None:
        """Blocks and torn rows of one target, or None where the mapping has no contiguous rows ("roast", "hash")."""
        if self.mapping != "fold":
            return None
        fold, span = self._spans[name]
        return fold.layout(span)

    def runs(self, name: str) -> list[tuple[int, int]]:
        """Contiguous runs (first slot, length) of one target's weights, row-major. Only for "fold"."""
        fold, span = self._spans[name]
        return fold.runs(span.start, span.stop)

    @cached_property
    def unfolds(self) -> bool:
        """True for a small model in many runs: making all weights once a pass is then quicker than views of psi."""
        if not self.is_view or self.n > UNFOLD_UP_TO:
            return False
        return WEIGHTS_A_RUN * sum(len(self.runs(target.name)) for target in self.targets) > self.n

    @cached_property
    def flat_targets(self) -> tuple[Target, ...]:
        """The targets in the order of the flat index range: group after group."""
        group_of = {fold: i for i, fold in enumerate(self.folds)}
        return tuple(sorted(self.targets, key=lambda target: group_of[self._spans[target.name][0]]))

    @property
    def is_view(self) -> bool:
        """True where weights are views of the shared array with one sign a row, so that the fast path applies."""
        return self.mapping == "fold" and self.sign != "element"

    def slots(self, name: str) -> np.ndarray:
        """The slot of every weight of one target, int64 of shape (out_features, in_features). The slow, plain form."""
        fold, span = self._spans[name]
        flat = np.arange(span.start, span.stop, dtype=np.int64)
        if self.mapping == "fold":
            partition, inside = np.divmod(flat, fold.m)
            slots = (inside + np.asarray(fold.shifts, dtype=np.int64)[partition]) % fold.m
        else:
            key = self._keys[sharing_group(name, self.sharing)]
            if self.mapping == "hash":
                slots = (hash_range(key, span.start, span.stop) % np.uint64(fold.m)).astype(np.int64)
            else:
                tile, inside = np.divmod(flat, min(ROAST_TILE, fold.m))
                starts = hash_range(key, 0, int(tile[-1]) + 1) % np.uint64(fold.m - min(ROAST_TILE, fold.m) + 1)
                slots = starts.astype(np.int64)[tile] + inside
        return (fold.base + slots).reshape(span.rows, span.cols)

    def signs(self, name: str) -> np.ndarray:
        """Signs of one target, int8: (out_features, 1), or (out_features, in_features) with ``sign="element"``."""
        target = self.targets[self.index[name]]
        if self.sign == "none":
            return np.ones((target.out_features, 1), dtype=np.int8)
        key = stream_key(self.seed, "sign", name)
        if self.sign == "row":
            return hash_signs(key, target.out_features)[:, None]
        return hash_signs(key, target.numel).reshape(target.out_features, target.in_features)

    @cached_property
    def squared_scales(self) -> tuple[tuple[int, float], ...]:
        """Gamma_j = sum of scale**2 over the weights on slot j, as (length, value) pieces that cover the m slots.

        Only for "fold", where Gamma is piecewise constant with about two pieces a run; see :func:`squared_scale_array`.
        """
        steps: dict[int, float] = {0: 0.0, self.m: 0.0}
        for target in self.targets:
            square = self.scale(target.name) ** 2
            for slot, length in self.runs(target.name):
                steps[slot] = steps.get(slot, 0.0) + square
                steps[slot + length] = steps.get(slot + length, 0.0) - square
        cuts = np.array(sorted(steps), dtype=np.int64)
        values = np.cumsum([steps[int(cut)] for cut in cuts])[:-1]
        return tuple((int(length), float(value)) for length, value in zip(np.diff(cuts), values, strict=True))

    def squared_scale_array(self) -> np.ndarray:
        """Gamma as float64 of shape (m,), for every mapping, by its definition. A slot that no weight reads has 0."""
        gamma = np.zeros(self.m)
        for target in self.targets:
            counts = np.bincount(self.slots(target.name).ravel(), minlength=self.m)
            gamma += self.scale(target.name) ** 2 * counts
        return gamma

    @cached_property
    def fingerprint(self) -> str:
        """128-bit digest of all that decides which weight reads which slot with which factor."""
        content = {
            "ratio": self.ratio,
            "seed": self.seed,
            "sharing": self.sharing,
            "mapping": self.mapping,
            "sign": self.sign,
            "init_std": self.init_std.hex(),
            "n": self.n,
            "m": self.m,
            "targets": [[t.name, t.out_features, t.in_features, float(t.std).hex()] for t in self.targets],
            "shifts": [fold.shifts for fold in self.folds],
            "keys": list(self._keys.values()),
        }
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def sentinel_shape(self) -> tuple[int, int]:
        """Shape of an empty tensor that is saved beside the array: no numbers, but it names the map.

        So a file made with another map is told by its tensors' shapes, whichever way it is loaded.
        """
        return (0, int(self.fingerprint[:8], 16))
