"""The weight map: the record of which weight reads which slots of the shared array with which sign and scale.

A map is pure arithmetic on names, shapes, standard deviations and a seed: it holds no tensor, is rebuilt wherever it is
needed, and is told apart from every other map by its ``fingerprint``. How the slots are found is a mapping's affair
(:mod:`hf_rps.mappings.base`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from hf_rps.hashing import hash_signs, stream_key
from hf_rps.mappings.base import Mapping, SharedMatrix, Span, Target
from hf_rps.mappings.input_fold import FoldedMatrix, InputFold, folded_size
from hf_rps.mappings.table import MAPPINGS

INIT_EXPONENT = 1 / 3  # of m / n in the default C; docs/comparison.md has the measurement

SHARING = ("global", "block", "module")
SIGNS = ("row", "element", "none")


def sharing_group(name: str, sharing: str) -> str:
    """The group of module ``name``: one for all ("global"), one per numbered block ("block"), one each ("module").

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

    A mapping that is learned takes ``options`` of its own, and has no ratio; ``learned`` is a digest of what its
    matrices have stored, without which there is no map.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        ratio: float | None,
        seed: int = 0,
        sharing: str = "global",
        mapping: str = "fold",
        sign: str = "row",
        input_fold: int = 1,
        init_std: float | None = None,
        std_factor: float = 1.0,
        std_exponent: float = INIT_EXPONENT,
        options: dict | None = None,
        learned: str | None = None,
    ):
        self.targets = tuple(targets)
        self.ratio, self.seed, self.sharing, self.mapping, self.sign = ratio, seed, sharing, mapping, sign
        self.input_fold, self.options, self.learned = input_fold, dict(options or {}), learned
        self._folds: dict[tuple, InputFold] = {}
        self.index = {target.name: i for i, target in enumerate(self.targets)}
        if not self.targets or len(self.index) != len(self.targets):
            raise ValueError(f"a weight map needs targets with distinct names, got {[t.name for t in self.targets]}")
        self._lay_out()
        self.n = sum(target.numel for target in self.targets)
        self.m = sum(group.m for group in self.groups)
        mean_square = math.fsum(t.numel * (t.std * t.std) for t in self.targets) / self.n
        default = std_factor * math.sqrt(mean_square) * (self.m / self.n) ** std_exponent
        self.init_std = float(default if init_std is None else init_std)
        if not (self.init_std > 0 and math.isfinite(self.init_std)):
            raise ValueError(f"the shared array needs a positive, finite init_std, got {self.init_std}")

    def _lay_out(self) -> None:
        """Give every group its segment and every target its place in the group."""
        members: dict[str, list[Target]] = {}
        for target in self.targets:
            members.setdefault(sharing_group(target.name, self.sharing), []).append(target)
        self._places: dict[str, tuple[Mapping, Span]] = {}
        groups, self._keys, base = [], [], 0
        for name, targets in members.items():
            spans, start = [], 0
            for target in targets:
                spans.append(Span(start, target.out_features, self._narrow(target)))
                start = spans[-1].stop
            self._keys.append(stream_key(self.seed, self.mapping, name))
            # of the weights that are left when inputs are folded; the same numbers as without
            total = sum(target.numel for target in targets)
            ratio = None if self.ratio is None else min(1.0, self.ratio * total / start)
            group = MAPPINGS[self.mapping](spans, ratio, self._keys[-1], base, **self.options)
            self._places.update((target.name, (group, span)) for target, span in zip(targets, spans, strict=True))
            groups.append(group)
            base += group.m
        self.groups = tuple(groups)

    def _narrow(self, target: Target) -> int:
        """Columns of the matrix that is shared in the place of ``target``, whose input is folded first."""
        if self.input_fold == 1:
            return target.in_features
        return folded_size(target.in_features // target.positions, self.input_fold)[1] * target.positions

    def fold_of(self, name: str) -> InputFold | None:
        """How one target's input is folded, or None."""
        target = self.target(name)
        channels = target.in_features // target.positions
        if folded_size(channels, self.input_fold)[0] == 1:
            return None
        # the same object for all layers of a module: those that share an input (q, k, v) fold it once
        module = name.rpartition(".")[0]
        place = (module, channels, target.positions)
        if place not in self._folds:
            key = stream_key(self.seed, "input_fold", module)
            self._folds[place] = InputFold(channels, target.positions, self.input_fold, key)
        return self._folds[place]

    def target(self, name: str) -> Target:
        return self.targets[self.index[name]]

    def scale(self, name: str) -> float:
        """scale_i = std_i / C of one target."""
        return self.target(name).std / self.init_std

    def signs(self, name: str) -> np.ndarray:
        """Signs of one target's shared matrix, int8: (rows, 1), or (rows, cols) with ``sign="element"``."""
        target = self.target(name)
        if self.sign == "none":
            return np.ones((target.out_features, 1), dtype=np.int8)
        key = stream_key(self.seed, "sign", name)
        if self.sign == "row":
            return hash_signs(key, target.out_features)[:, None]
        cols = self._narrow(target)
        return hash_signs(key, target.out_features * cols).reshape(target.out_features, cols)

    def slots(self, name: str) -> np.ndarray:
        """The slot of every weight of one target's shared matrix, int64 (rows, cols), by the mapping's formula."""
        group, span = self._places[name]
        return group.slots(span.start, span.stop).reshape(span.rows, span.cols)

    def matrix(self, name: str) -> SharedMatrix:
        """One target's matrix, made anew."""
        group, span = self._places[name]
        matrix, fold = group.matrix(span, self.scale(name), self.signs(name)), self.fold_of(name)
        return matrix if fold is None else FoldedMatrix(matrix, fold)

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
            "shifts": [group.shifts for group in self.groups],
            "keys": self._keys,
        }
        if self.input_fold != 1:
            content |= {"input_fold": self.input_fold, "positions": [t.positions for t in self.targets]}
            content["folded_size"] = "divisors"  # maps before that are others
        if self.options:
            options = {name: value for name, value in self.options.items() if (name, value) != ("tile", 1)}
            content |= {"options": options, "learned": self.learned}  # maps from before there were tiles stay
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def sentinel_shape(self) -> tuple[int, int]:
        """Shape of an empty tensor that is saved beside the array: no numbers, but it names the map.

        So a file made with another map is told by its tensors' shapes, whichever way it is loaded.
        """
        return (0, int(self.fingerprint[:8], 16))
