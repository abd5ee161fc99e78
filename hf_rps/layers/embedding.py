"""RPSEmbedding: a table of vectors whose rows are read from a shared array."""

from __future__ import annotations

from torch import Tensor, nn

from hf_rps.layers.base import RPSLayer
from hf_rps.psi.bank import Bank


class RPSEmbedding(RPSLayer):
    """W[ids] with a shared W (num_embeddings, embedding_dim). The arguments are those of :class:`RPSLayer`.

    Input integers (...), output (..., embedding_dim) in the weight's dtype, with autocast too, as of nn.Embedding. Only
    the rows that are asked for are made; the gradient goes to what they read. Row ``padding_idx`` is read like any
    other, and gives no gradient.

    Raises:
        IndexError: From a call with an id that is no row.
    """

    def __init__(self, name: str, bank: Bank, dense: nn.Module, parameter: str = "weight"):
        super().__init__(name, bank, dense, parameter)
        self.num_embeddings, self.embedding_dim = self.shared.target.out_features, self.shared.target.in_features
        self.padding_idx = dense.padding_idx
        self.weight_shape = (self.num_embeddings, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.shared.look_up(ids.long(), self.weight_dtype, self.padding_idx)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {super().extra_repr()}"
