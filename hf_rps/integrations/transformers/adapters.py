"""load_adapter of transformers' models: the tensors of an RPS adapter's files are checked before they are loaded."""

from __future__ import annotations

import functools

import torch
from safetensors import safe_open

from hf_rps.integrations.peft.adapter_files import check_tensors
from hf_rps.integrations.peft.config import RPSConfig
from hf_rps.names import is_psi_key

_LOADER = "_load_pretrained_model"


def checking(original):
    """``load_adapter``, which asks nobody which of a file's tensors it may leave out.

    The files are known to the loader that it calls only, so that one is replaced while it runs.
    """

    def load_adapter(self, *args, **kwargs):
        before = set(getattr(self, "peft_config", ()))
        loader = getattr(self, _LOADER)

        @functools.wraps(loader)
        def load(*loader_args, **given):
            for name in set(getattr(self, "peft_config", ())) - before:
                config = self.peft_config[name]
                if isinstance(config, RPSConfig):
                    found = _dtypes(given.get("state_dict"), given.get("checkpoint_files") or [])
                    check_tensors(self, config, name, found, translated=False)
            info, *rest = loader(*loader_args, **given)
            # of a compressed base, which an adapter's file lacks as it lacks all of the base; "rps" is in the name
            info.missing_keys = {key for key in info.missing_keys if not is_psi_key(key)}
            return (info, *rest)

        self.__dict__[_LOADER] = load
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.__dict__[_LOADER]

    return load_adapter


def _dtypes(state_dict: dict | None, files: list[str]) -> dict[str, torch.dtype]:
    found = {key: tensor.dtype for key, tensor in (state_dict or {}).items()}
    for file in map(str, files):
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as reader:
                found |= {key: reader.get_slice(key)[:0].dtype for key in reader.keys()}  # noqa: SIM118
        else:
            found |= {key: t.dtype for key, t in torch.load(file, map_location="meta", weights_only=True).items()}
    return found
