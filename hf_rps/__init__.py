"""hf_rps: compress any Hugging Face transformers model by randomized parameter sharing (STABLE-RPS, ICLR 2024)."""

from hf_rps.config import RPSConfig
from hf_rps.convert import get_rps_model, to_dense
from hf_rps.integrations.transformers import register as _register
from hf_rps.report import SizeReport, size_report
from hf_rps.version import __version__

__all__ = [
    "RPSConfig",
    "SizeReport",
    "__version__",
    "get_rps_model",
    "size_report",
    "to_dense",
]

_register()
