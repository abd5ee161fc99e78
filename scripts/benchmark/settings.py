"""What every measurement of one run of the benchmark has in common."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        dtype: Of the model: "float32" or "bfloat16".
        threads: Of torch, in every process.
        part: Fraction of llama-1b's layers and vocabulary that is kept.
        rounds: How often two subjects alternate.
        seconds: How long each works in a round, about; at least one run.
        tokens: Of the layer stacks, one case each.
        step_tokens: Of the training steps, one case each; the works "memory" and "reduced" take the largest.
        prompt: Tokens of the work "prefill".
        batches: Of the work "decode", one case each.
        fused: Use the fused AdamW in every subject.
        fakeroast, rzlinear: Folders of the authors' code, or None.
        command: The command line, without machine paths.
    """

    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    part: float = 1.0
    rounds: int = 7
    seconds: float = 0.5
    tokens: tuple[int, ...] = (1, 8, 128, 512)
    step_tokens: tuple[int, ...] = (16, 512)
    prompt: int = 512
    batches: tuple[int, ...] = (1, 8, 64)
    fused: bool = False
    fakeroast: str | None = None
    rzlinear: str | None = None
    command: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def device_name(self) -> str:
        """The GPU's name, or the model name of the CPU."""
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
