"""Checkpoints on the Hugging Face Hub: find or download a folder, upload one.

What a folder holds is :mod:`perceive_adapter.folders`'s business; its two functions are at hand
here too. huggingface_hub is imported only when it is needed.
"""

import os
import re
from pathlib import Path
from typing import NoReturn

from perceive_adapter.errors import CheckpointError
from perceive_adapter.folders import load_folder, save_folder

__all__ = ["load_folder", "push_folder", "resolve", "save_folder"]

_PATTERNS = ["*.json", "*.safetensors", "README.md"]
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def resolve(
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Find the folder that a path or the name of a Hub repository stands for.

    An existing folder is taken as it is, and the other arguments do not matter to it. A name such
    as ``user/repo`` is downloaded into huggingface_hub's cache: JSON, safetensors and the model
    card, nothing else. A network that is down, or ``HF_HUB_OFFLINE=1``, falls back to that cache.

    Args:
        name_or_path: a folder, or ``user/repo``.
        revision: branch, tag or commit of the repository.
        token: access token, True for the one saved on this machine, None for it if there is one.
        cache_dir: cache to use in place of huggingface_hub's own.
        local_files_only: make no request, use the cache alone.

    Returns:
        The folder.

    Raises:
        CheckpointError: there is no such folder or repository, or it cannot be reached.
    """
    path, name = Path(name_or_path), os.fspath(name_or_path)
    if name and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(
            f"{name!r} is a file: expected a folder that save_pretrained wrote, or a Hub "
            "repository such as 'user/repo'. Give the folder that holds the file."
        )
    if not isinstance(name_or_path, str) or not _REPO_ID.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is not an existing folder, and does not have the form of a Hub repository, "
            "'user/repo'. Check the path."
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=_PATTERNS,
            )
        )
    except _hub_errors() as error:
        at = f" at revision {revision!r}" if revision else ""
        _fail(f"cannot download {name!r}{at}, which is not a local folder either", error)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a saved folder's JSON, safetensors and model card to a Hub repository.

    Args:
        folder: what :func:`save_folder` wrote.
        repo_id: ``user/repo``; the repository is made if it does not exist.
        private: visibility of a repository made now; None for the account's default.
        token: access token, True or None for the one saved on this machine.
        revision: branch to commit to, which must exist; None for the main branch.
        commit_message: None for huggingface_hub's own.

    Returns:
        URL of the commit.

    Raises:
        CheckpointError: there is no such folder, or the Hub refuses or cannot be reached.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"cannot push {os.fspath(folder)!r}: it is not a folder. "
            "Save with save_pretrained first, and give that folder."
        )
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            allow_patterns=_PATTERNS,
        )
    except _hub_errors() as error:
        _fail(f"cannot push {os.fspath(folder)!r} to {repo_id!r}", error)
    return str(commit.commit_url)


def _hub_errors() -> tuple[type[Exception], ...]:
    """Errors of huggingface_hub and of whichever HTTP client it is built on."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    return (*HfHubHTTPError.__bases__, HfHubHTTPError, EntryNotFoundError, OSError, ValueError)


def _fail(what: str, error: Exception) -> NoReturn:
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        remedy = "The Hub refuses access: log in with `hf auth login`, or pass a token that has it."
    elif status == 404:
        remedy = "Check the spelling and the revision, and log in if the repository is private."
    elif isinstance(error, HFValidationError):
        remedy = "Give a repository as 'user/repo'."
    elif isinstance(error, OfflineModeIsEnabled):
        remedy = "Unset HF_HUB_OFFLINE."
    else:
        remedy = "Check the network; without one, only a repository downloaded before can be used."
    raise CheckpointError(f"{what}: {type(error).__name__}: {error}. {remedy}") from error
