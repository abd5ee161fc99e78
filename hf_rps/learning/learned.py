"""A learned map: of every target the codes and the codebooks, and what they are written to."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_rps.config import RPSSettings
from hf_rps.layers.kinds import Candidate
from hf_rps.learning.calibration import Inputs, Walk
from hf_rps.learning.matrix import learn
from hf_rps.psi.bank import ArrayOwner

logger = logging.getLogger(__name__)


class LearnedMap:
    """Codes and codebooks of all targets.

    Args:
        model: That the calibration runs.
        candidates: By target, the weights.
        settings: With a learned mapping.
        batches: What ``model`` is called with; empty: the weights alone decide.
    """

    def __init__(
        self, model: nn.Module, candidates: Mapping[str, Candidate], settings: RPSSettings, batches: Sequence[Any] = ()
    ):
        self.settings = settings
        self.codes: dict[str, Tensor] = {}  # packed
        self.books: dict[str, Tensor] = {}
        if batches:
            Walk(model, candidates, batches, settings.seed).learn(self._learn)
        else:
            logger.info(
                "codebooks are learned from the weights alone (k-means); with calibration=... (a few thousand tokens) "
                "a model keeps much more of what it computes"
            )
            for name, candidate in candidates.items():
                self._learn(name, candidate, None)

    def _learn(self, name: str, candidate: Candidate, inputs: Inputs | None) -> Tensor:
        settings = self.settings
        learned = learn(candidate.weight, settings.bits, settings.group_size, *(inputs or ()), tile=settings.tile)
        self.codes[name], self.books[name] = learned.packed, learned.books
        return learned.weight

    @property
    def digest(self) -> str:
        """Of all codes."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.codes):
            digest.update(f"{name} {tuple(self.codes[name].shape)}".encode())
            digest.update(self.codes[name].cpu().numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def write(self, owner: ArrayOwner) -> None:
        """Give the codes to the matrices of ``owner``, and the codebooks to its array."""
        for name, codes in self.codes.items():
            matrix = owner.array.matrices[name]
            matrix.keep_in({"codes": codes}, {"codes": "codes"})
            matrix.segment(owner.psi).copy_(self.books[name].flatten())
        owner.array.divisor.settle()
        owner.array.started = "project"
