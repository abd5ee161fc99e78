"""push_to_hub: a model, its processing class and its card reach the Hub in one commit, or not at all.

Unlike transformers' own ``model.push_to_hub`` it writes a card that begins by saying that a reader must import hf_rps,
and a push that fails leaves everything in a local folder and says how to send it again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel

from hf_rps.integrations.model_card import (
    GENERATED,
    REPOSITORY,
    import_note,
    is_compressed,
    read_config,
    weights_files,
    with_note,
    write_model_card,
)
from hf_rps.integrations.peft.card import write_card
from hf_rps.integrations.peft.config import RPSConfig
from hf_rps.integrations.transformers.quantization_config import RPSQuantizationConfig
from hf_rps.integrations.transformers.weights_files import check_files
from hf_rps.mappings.base import Target
from hf_rps.version import __version__

logger = logging.getLogger(__name__)

_DRAFTS = (
    GENERATED,
    "Written by hf_rps, and anew when other weights are pushed.",  # as earlier versions put it
    "# Model Card for Model ID",
)  # marks of cards that nobody wrote by hand: ours; PEFT's and the Hub's
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_LEFT_OUT = re.compile(r"(.*/)?(\.|checkpoint-\d+/)")  # hidden files, and the checkpoints that Trainer resumes from


def push_to_hub(
    model: PreTrainedModel | PeftModel | str | os.PathLike,
    repo_id: str,
    *,
    processing_class=None,
    card: ModelCard | str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: bool | str | None = None,
    folder: str | os.PathLike | None = None,
) -> CommitInfo:
    """Publish a model on the Hub in one commit: readers see all of it or nothing.

    The card is ``card``, or the README.md in the folder, or one that somebody wrote in the repository, or else one made
    by :func:`hf_rps.integrations.model_card.write_model_card`. The card of a compressed model or an adapter begins by
    saying ``import hf_rps``; these lines are added where they are missing.

    Args:
        model: A model (compressed or dense), a PEFT model, or the folder that its ``save_pretrained`` wrote. From a
            folder everything is sent except hidden files and Trainer's ``checkpoint-N``.
        repo_id: "user/name", or "name" for one of your own. It is created if it does not exist.
        processing_class: Tokenizer, image processor or the like, to be saved beside the model.
        card: The card, or its text.
        private: As in ``huggingface_hub.create_repo``: it takes effect when the repository is created.
        revision: The branch, created from main if it does not exist.
        commit_message: Default: "Upload model with hf_rps".
        create_pr: Open a pull request instead of committing.
        token: As in huggingface_hub: a token, or None for the one you logged in with.
        folder: Where to save ``model`` first; it is kept. Default: a temporary folder, kept only if the push fails.

    Returns:
        The commit.

    Raises:
        TypeError, ValueError: An argument is invalid or the folder lacks a complete model; nothing was written or sent.
        RuntimeError: The push failed, for the reason chained to it. The message names the folder, which is complete,
            and the call that sends it again. Large files that had arrived are not sent twice.
    """
    _check_arguments(model, repo_id, processing_class, card, revision, commit_message, create_pr, folder)
    saved = isinstance(model, (str, os.PathLike))
    local = Path(model if saved else folder or tempfile.mkdtemp(prefix="hf_rps-")).expanduser().resolve()
    temporary = not saved and folder is None
    try:
        text = _text(local)
        has_card = card is not None or not _is_draft(text) or (saved and text is not None)
        _save(None if saved else model, processing_class, card, local)
    except BaseException:
        if temporary:
            shutil.rmtree(local, ignore_errors=True)
        raise
    api = HfApi(token=token, library_name="hf_rps", library_version=__version__)
    push = _Push(api, repo_id, local, private, revision, commit_message, create_pr)
    try:
        commit = push(make_card=not has_card)
    except BaseException as error:
        told = push.advice(error, token)
        if not isinstance(error, Exception):  # Ctrl-C
            logger.warning(told)
            raise
        raise RuntimeError(told) from error
    if temporary:
        shutil.rmtree(local, ignore_errors=True)
    return commit


def _save(model, processing_class, card: ModelCard | str | None, folder: Path) -> None:
    """Write to ``folder`` what is given."""
    for part in (model, processing_class):
        if part is not None:
            part.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(str(card), encoding="utf-8", newline="")


@dataclass
class _Push:
    """The way of a folder to the Hub; ``step`` is what it is about to do."""

    api: HfApi
    repo_id: str
    folder: Path
    private: bool | None
    revision: str | None
    commit_message: str | None
    create_pr: bool
    step: str = ""

    def __call__(self, make_card: bool) -> CommitInfo:
        self.step = f"creating the repository {self.repo_id}"
        self.repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.revision is not None and not self.revision.startswith("refs/"):
            self.step = f"creating the branch {self.revision!r} of {self.repo_id}"
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        self.step = f"preparing the card for {self.repo_id}"
        if make_card:
            _make_card(self.api, self.repo_id, self.revision, self.folder)
        _add_note(self.folder)
        self.step = f"uploading to {self.repo_id}"
        operations = [
            *_additions(self.folder, self.repo_id),
            *_deletions(self.api, self.repo_id, self.revision, self.folder),
        ]
        # not upload_folder, which splits a long upload into several commits
        return self.api.create_commit(
            self.repo_id, operations, commit_message=self.commit_message or "Upload model with hf_rps",
            revision=self.revision, create_pr=self.create_pr,
        )  # fmt: skip

    def advice(self, error: BaseException, token: bool | str | None) -> str:
        """What to tell a user whose push failed."""
        options = {
            "private": self.private, "revision": self.revision, "commit_message": self.commit_message,
            "create_pr": self.create_pr or None,
        }  # fmt: skip
        return _advice(self.step, error, self.folder, self.repo_id, options, token)


def _check_arguments(model, repo_id, processing_class, card, revision, commit_message, create_pr, folder) -> None:
    saved = isinstance(model, (str, os.PathLike))
    if not saved and not isinstance(model, (PreTrainedModel, PeftModel)):
        raise TypeError(
            f"model must be a transformers or PEFT model, or the folder it was saved in, got {type(model).__name__}; "
            f"unwrap it (accelerator.unwrap_model), or save it and pass the folder"
        )
    if not isinstance(repo_id, str):
        raise TypeError(f"repo_id must be a string such as 'user/name', got {type(repo_id).__name__}: {repo_id!r}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a valid name on the Hub, such as 'user/name': {error}") from error
    if processing_class is not None and not hasattr(processing_class, "save_pretrained"):
        raise TypeError(f"processing_class must have save_pretrained, got {type(processing_class).__name__}")
    if card is not None and not isinstance(card, (ModelCard, str)):
        raise TypeError(f"card must be a huggingface_hub.ModelCard or a string, got {type(card).__name__}")
    for name, value in (("revision", revision), ("commit_message", commit_message)):
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{name} must be a non-empty string or None, got {value!r}")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"a pull request goes to main; leave out revision={revision!r} or create_pr=True")
    if saved:
        if folder is not None:
            raise ValueError(f"folder={str(folder)!r} is for a model in memory, but model is already a folder: {model}")
        _check_folder(Path(model).expanduser())
    elif folder is not None:
        _check_target(Path(folder).expanduser())


def _check_folder(folder: Path) -> None:
    """Raise a ValueError unless ``folder`` holds a complete model or adapter."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; pass a model, or the folder that save_pretrained wrote")
    if (folder / "adapter_config.json").is_file():
        if not list(folder.glob("adapter_model.*")):
            raise ValueError(f"{folder} has an adapter_config.json but no adapter_model file; save the adapter again")
        return
    config, files = read_config(folder), weights_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing and (
        len(files) > 1 or is_compressed(config) or not [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    ):
        raise ValueError(f"{folder} lacks the weights {missing}; save the model again, or pass the right folder")
    if is_compressed(config):
        check_files(files, RPSQuantizationConfig.from_dict(config["quantization_config"]))


def _check_target(folder: Path) -> None:
    """Raise a ValueError if saving into ``folder`` would mix a model with files that belong to none."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; pass a folder to save the model in")
    known = ("config.json", "adapter_config.json", "README.md")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in known):
        raise ValueError(
            f"folder={str(folder)!r} holds files that belong to no model, and all would be published; give a new folder"
        )


def _text(folder: Path) -> str | None:
    file = folder / "README.md"
    try:
        return file.read_bytes().decode() if file.is_file() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error


def _is_draft(text: str | None) -> bool:
    return text is None or any(mark in text for mark in _DRAFTS)


def _make_card(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> None:
    """Write the repository's README.md into ``folder`` if somebody wrote it by hand, else a new one."""
    try:
        with tempfile.TemporaryDirectory() as cache:
            path = api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=cache)
            remote = _text(Path(path).parent)
    except RemoteEntryNotFoundError:
        remote = None
    if not _is_draft(remote):
        (folder / "README.md").write_text(remote, encoding="utf-8", newline="")
    elif (folder / "config.json").is_file():
        write_model_card(folder, model_name=repo_id.split("/")[-1])


def _add_note(folder: Path) -> None:
    """Make README.md begin by saying ``import hf_rps``, if a reader of the model must do so."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        if json.loads(adapter.read_text(encoding="utf-8")).get("peft_type") == "RPS":
            config = RPSConfig.from_pretrained(folder)
            config.record(config.weight_map([Target.parse(text) for text in config.modules]))
            write_card(folder, config)
        return
    config, text = read_config(folder), _text(folder)
    if is_compressed(config):
        noted = with_note(text, import_note(config))
        if noted != text:
            (folder / "README.md").write_text(noted, encoding="utf-8", newline="")


def _additions(folder: Path, repo_id: str) -> list[CommitOperationAdd]:
    additions = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not _LEFT_OUT.match(name):
            readme = file.name == "README.md"
            content = _text(file.parent).replace(REPOSITORY, repo_id).encode() if readme else file
            additions.append(CommitOperationAdd(name, content))
    return additions


def _deletions(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> list[CommitOperationDelete]:
    """Weights of an earlier push that the new ones don't overwrite and that would be read instead of them."""
    if not (folder / "config.json").is_file():
        return []
    there = api.list_repo_files(repo_id, revision=revision)
    return [CommitOperationDelete(name) for name in there if _WEIGHTS.fullmatch(name) and not (folder / name).exists()]


def _advice(step: str, error: BaseException, folder: Path, repo_id: str, options: dict, token) -> str:
    """What failed, where the model is, and how to try again. A token is never in the text."""
    arguments = [repr(str(folder)), repr(repo_id)]
    arguments += [f"{name}={value!r}" for name, value in options.items() if value is not None]
    arguments += ["token=token"] if isinstance(token, str) else [f"token={token}"] if token is not None else []
    cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return (
        f"{step} failed ({cause}). Nothing partial was published, and the complete model is in {folder}. To try again: "
        f"hf_rps.push_to_hub({', '.join(arguments)})"
    )
