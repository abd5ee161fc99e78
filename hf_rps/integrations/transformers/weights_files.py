"""What identifies the weights files of one save, and the check that refuses files that do not belong together.

The metadata of every file name the format version, the map's fingerprint, the save (a digest of all tensors, repeated
in config.json), and the number and a digest of the list of its tensors. An interrupted save, into a new folder or over
an old checkpoint, leaves files that disagree with each other, with config.json or with their own headers.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_rps.integrations.transformers.quantization_config import LISTED_FROM, RPSQuantizationConfig
from hf_rps.integrations.transformers.tensor_list import digest, entries_in_file, entries_of_state, fits
from hf_rps.names import BANK_NAME, is_psi_key


def list_saved(model: nn.Module, state: dict[str, Tensor]) -> dict[str, str]:
    """Metadata that says which tensors save_pretrained will write: all of ``state`` but the ignored ones."""
    ignored = set(model._keys_to_ignore_on_save or ())
    saved = {key: tensor for key, tensor in state.items() if key not in ignored}
    return {"rps_tensors": str(len(saved)), "rps_list": digest(entries_of_state(saved))}


def whole_state(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The state of ``model``; a sharded one (FSDP2) is gathered in CPU memory, tensor by tensor.

    Gathering is a collective, so every process must call this. Those that do not ``keep`` the result get an empty dict.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if hasattr(tensor, "full_tensor"):  # a DTensor; torch without torch.distributed lacks the class
            # an offloaded shard must go to the device whose processes can gather it
            tensor = tensor.to(tensor.device_mesh.device_type).full_tensor().cpu()
        if keep:
            state[name] = tensor
    return state


def check_gathered(state: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> None:
    """Refuse a ``state_dict`` for save_pretrained that is not the whole state; ``key`` is psi's name in it."""
    psi = state.get(key)
    if psi is None or hasattr(psi, "full_tensor") or tuple(psi.shape) != shape:
        found = "missing" if psi is None else f"a {type(psi).__name__} of shape {tuple(psi.shape)}"
        raise ValueError(
            f"state_dict must hold the whole shared array {key} of shape {shape}, but among its {len(state)} "
            f"entries it is {found}. Gather it first (accelerate: accelerator.get_state_dict(model)), or leave out "
            f"state_dict and call save_pretrained on every process with is_main_process=(rank == 0)"
        )


def drop_tied(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Remove tied copies: transformers finds them by their memory, which gathered copies no longer share."""
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in state and source in state:
            copied, kept = state[name], state[source]
            if copied.data_ptr() == kept.data_ptr() or torch.equal(copied, kept):
                del state[name]


def content_id(state: dict[str, Tensor]) -> str:
    """Digest of all tensors, so that equal models are saved as equal files; random if one is not in memory."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if tensor.is_meta:
            return uuid.uuid4().hex
        data = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if data.numel():
            digest.update(data.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def check_files(files: list[str], config: RPSQuantizationConfig) -> set[str]:
    """Refuse weights files that are truncated, foreign, incomplete or from another save than config.json.

    Returns:
        The names of their tensors.

    Raises:
        ValueError: Says which file is wrong, what is wrong with it and what to do.
    """
    remedy = "The save was interrupted or files of two saves are mixed; load another checkpoint or save it again"
    names, arrays, listed, recorded = set(), {}, [], {}
    for file in map(str, files):
        if not file.endswith(".safetensors"):
            raise ValueError(f"{file} is not a safetensors file; compressed checkpoints are safetensors only")
        try:
            with safe_open(file, framework="pt") as reader:
                metadata, keys = reader.metadata() or {}, list(reader.keys())
                arrays |= {key: tuple(reader.get_slice(key).get_shape()) for key in keys if is_psi_key(key)}
        except (SafetensorError, OSError) as error:
            size = os.path.getsize(file) if os.path.exists(file) else 0
            raise ValueError(
                f"{file} ({size} bytes) is truncated or not a safetensors file ({error}). {remedy}"
            ) from error
        if "rps_fingerprint" not in metadata:
            raise ValueError(
                f"{file} was not written by hf_rps (it has no rps_fingerprint), but config.json beside it belongs to a "
                f"compressed model. Put the dense checkpoint's own config.json there, or the compressed weights"
            )
        for field in ("format_version", "fingerprint", "save_id"):
            found = metadata.get(f"rps_{field}")
            wanted = str(config.save_id_of(file) if field == "save_id" else getattr(config, field))
            if found != wanted:
                raise ValueError(f"{file} has rps_{field}={found!r}, but config.json says {wanted!r}. {remedy}")
        names.update(keys)
        listed += entries_in_file(file)
        recorded = metadata
    expected = recorded.get("rps_tensors")
    if str(len(names)) != expected:
        raise ValueError(f"the checkpoint holds {len(names)} tensors of {expected} in {len(files)} files. {remedy}")
    found = sorted((key.rpartition(".")[2], *shape) for key, shape in arrays.items())
    if found != config.arrays():
        wanted = ", ".join(f"{BANK_NAME}.{name} of shape {(m,)}" for name, m in config.arrays())
        raise ValueError(f"the checkpoint needs the shared arrays {wanted}, but has {arrays}. {remedy}")
    if config.format_version >= LISTED_FROM and not fits(listed, recorded.get("rps_list")):
        raise ValueError(
            f"the names, dtypes, shapes or numbers of the {len(names)} tensors in {', '.join(map(str, files))} are not "
            f"those that were saved (rps_list={recorded.get('rps_list')!r}): a file was changed or is damaged. Load "
            f"another checkpoint; to change weights, load the model, change it and save it again"
        )
    return names


def check_names(model: nn.Module, names: set[str], sentinels: list[str], same_class: bool) -> None:
    """Refuse files whose tensors are not those of ``model``, before it draws parameters without a tensor at random.

    That can be meant (a new head; a pooler that the saved model was built without), but not where the files have the
    same parameter of another layer. In the class that saved them it is not meant for the output head either, nor
    where the files have a tensor that nothing in the model is called after.

    Args:
        model: The model with its compressed layers, on whatever device.
        names: Of the tensors in the files; ``sentinels`` are the empty ones among them.
        same_class: Whether the model is of the class that saved the files.

    Raises:
        ValueError: config.json was changed, or a name in a file is damaged.
    """
    prefix = f"{model.base_model_prefix}."  # which either of the model and the files may lack
    found = {name.removeprefix(prefix) for name in names}
    made_elsewhere = {*(getattr(model, "all_tied_weights_keys", None) or {}), *(model._keys_to_ignore_on_save or ())}
    patterns = tuple(model._keys_to_ignore_on_load_missing or ())
    missing = [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.removeprefix(prefix) not in found
        and name not in made_elsewhere
        and not any(re.search(pattern, name) for pattern in patterns)
    ]
    unexpected = names - set(sentinels) - set(model.state_dict()) if same_class else set()
    output = model.get_output_embeddings() if same_class else None
    head = set() if output is None else set(output.parameters())
    layers = {_without_index(name) for name in found}
    lost = [n for n, p in missing if unexpected or p in head or _without_index(n.removeprefix(prefix)) in layers]
    if lost:
        stray = f" (but one for {min(unexpected)!r}, which the model does not have)" if unexpected else ""
        raise ValueError(
            f"the checkpoint has no tensor for {lost[0]!r}, {len(lost)} such in all, which {type(model).__name__} "
            f"would draw at random{stray}. Leave the sizes in config.json, and tie_word_embeddings, as they were; if "
            f"they are, the file is damaged: load another checkpoint"
        )


def _without_index(name: str) -> str:
    """A parameter's name without the numbers of its layers."""
    return re.sub(r"(?:^|(?<=[.]))[0-9]+(?=[.])", "*", name)
