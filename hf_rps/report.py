"""size_report: how many numbers and bytes a compressed model has, beside its dense form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_rps.conversion import find_banks


@dataclass(frozen=True)
class SizeReport:
    """Sizes of a compressed model. Prints as a table.

    Attributes:
        n: Targeted weights, which the dense model stores.
        m: Numbers stored in their place.
        dense_parameters, parameters: All parameters, dense and now.
        dense_bytes, bytes: Bytes of all parameters, dense and now.
    """

    n: int
    m: int
    dense_parameters: int
    parameters: int
    dense_bytes: int
    bytes: int

    def __str__(self) -> str:
        rows = [
            ("targeted weights", self.n, self.m),
            ("all parameters", self.dense_parameters, self.parameters),
            ("bytes", self.dense_bytes, self.bytes),
        ]
        lines = [f"{'':<18}{'dense':>16}{'now':>16}{'ratio':>9}"]
        lines += [f"{name:<18}{dense:>16,}{now:>16,}{now / dense if dense else 1:>9.4f}" for name, dense, now in rows]
        return "\n".join(lines)


def size_report(model: nn.Module) -> SizeReport:
    """Count parameters (shared ones once) and their bytes. A dense model has n = m = 0 and equal columns.

    Raises:
        ValueError: The model carries PEFT adapters, which PEFT counts.

    >>> print(SizeReport(1000, 100, 1500, 600, 6000, 2400))
                                 dense             now    ratio
    targeted weights             1,000             100   0.1000
    all parameters               1,500             600   0.4000
    bytes                        6,000           2,400   0.4000
    """
    if hasattr(model, "peft_config"):
        raise ValueError("this model carries PEFT adapters; call its print_trainable_parameters() for their sizes")
    banks = find_banks(model)
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    n, m = sum(bank.weight_map.n for bank in banks), sum(bank.weight_map.m for bank in banks)
    more = sum((bank.weight_map.n - bank.weight_map.m) * bank.psi.element_size() for bank in banks)
    return SizeReport(n, m, parameters - m + n, parameters, size + more, size)
