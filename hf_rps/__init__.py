"""hf_rps: compress any Hugging Face transformers model by randomized parameter sharing (STABLE-RPS, ICLR 2024)."""

from hf_rps import freezing as _freezing
from hf_rps.integrations.hub import push_to_hub
from hf_rps.integrations.peft import model as _peft
from hf_rps.integrations.peft import on_compressed as _on_compressed
from hf_rps.integrations.peft.config import RPSConfig
from hf_rps.integrations.transformers import quantizer as _quantizer
from hf_rps.integrations.transformers import saving as _saving
from hf_rps.model import get_rps_config, get_rps_model, to_dense
from hf_rps.report import SizeReport, size_report
from hf_rps.version import __version__

__all__ = [
    "RPSConfig",
    "SizeReport",
    "__version__",
    "get_rps_config",
    "get_rps_model",
    "push_to_hub",
    "size_report",
    "to_dense",
]

_freezing.register()
_quantizer.register()
_saving.register()
_peft.register()
_on_compressed.register()
