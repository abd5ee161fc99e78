"""size_report: how many numbers and bytes a compressed model has, beside its dense form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_rps.conversion import find_banks, shared_layers
from hf_rps.layers.embedding import RPSEmbedding


@dataclass(frozen=True)
class SizeReport:
    """Sizes of a compressed model. Prints as a table.

    Attributes:
        n: Targeted weights, which the dense model stores.
        m: Numbers stored in their place.
        dense_parameters, parameters: All parameters, dense and now.
        dense_bytes, bytes: Bytes of all parameters, dense and now.
        dense_multiplications, multiplications: Of the targeted weights, dense and now, for one token (one position of a
            convolution): how many numbers they are, unless inputs are folded.
        code_bytes, codebook_bytes: Of learned maps. Codes are among ``bytes``, and among no numbers.
        init_weights: Where the shared array started: "project", "rescale" or False, see :class:`hf_rps.RPSConfig`. None
            where that is not known (a loaded checkpoint) or there is no such array (a dense model).
    """

    n: int
    m: int
    dense_parameters: int
    parameters: int
    dense_bytes: int
    bytes: int
    dense_multiplications: int = 0
    multiplications: int = 0
    code_bytes: int = 0
    codebook_bytes: int = 0
    init_weights: bool | str | None = None

    def __str__(self) -> str:
        rows = [
            ("targeted weights", self.n, self.m),
            ("all parameters", self.dense_parameters, self.parameters),
            ("bytes", self.dense_bytes, self.bytes),
        ]
        if self.multiplications != self.dense_multiplications:
            rows.append(("multiplications", self.dense_multiplications, self.multiplications))
        lines = [f"{'':<18}{'dense':>16}{'now':>16}{'ratio':>9}"]
        lines += [f"{name:<18}{dense:>16,}{now:>16,}{now / dense if dense else 1:>9.4f}" for name, dense, now in rows]
        if self.code_bytes:
            codes, books = 8 * self.code_bytes / self.n, 8 * self.codebook_bytes / self.n
            lines.append(f"{codes + books:.2f} bits per weight: {codes:.2f} of codes, {books:.2f} of codebooks")
        if self.init_weights is not None:
            lines.append(f"init_weights: {self.init_weights}")
        return "\n".join(lines)


def size_report(model: nn.Module) -> SizeReport:
    """Count parameters (shared ones once) and their bytes. A dense model has n = m = 0 and equal columns.

    Raises:
        ValueError: The model carries PEFT adapters, which PEFT counts.

    >>> print(SizeReport(1000, 100, 1500, 600, 6000, 2400, init_weights="project"))
                                 dense             now    ratio
    targeted weights             1,000             100   0.1000
    all parameters               1,500             600   0.4000
    bytes                        6,000           2,400   0.4000
    init_weights: project
    """
    if hasattr(model, "peft_config"):
        raise ValueError("this model carries PEFT adapters; call its print_trainable_parameters() for their sizes")
    banks = find_banks(model)
    every = {*shared_layers(model).values()}
    layers = {layer for layer in every if layer.own_name is None}  # one for each weight
    codes = sum(t.numel() for layer in layers for t in layer.shared.matrix.stored().values())
    parameters = sum(p.numel() for p in model.parameters()) - codes
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    n, m = sum(bank.weight_map.n for bank in banks), sum(bank.weight_map.m for bank in banks)
    more = -codes + sum((bank.weight_map.n - bank.weight_map.m) * bank.psi.element_size() for bank in banks)
    learned = [bank for bank in banks if bank.weight_map.learned is not None]
    books = sum(bank.weight_map.m * bank.psi.element_size() for bank in learned)
    for layer in layers:  # a dense weight may be narrower than the array
        more -= layer.shared.target.numel * (layer.bank.psi.element_size() - layer.weight_dtype.itemsize)
    starts = list(dict.fromkeys(bank.array.started for bank in banks))
    started = starts[0] if len(starts) == 1 else ", ".join(map(str, starts)) or None
    matrices = [layer.shared.matrix for layer in every if not isinstance(layer, RPSEmbedding)]
    products = sum(matrix.rows * matrix.cols for matrix in matrices), sum(matrix.multiplications for matrix in matrices)
    return SizeReport(n, m, parameters - m + n, parameters, size + more, size, *products, codes, books, started)
