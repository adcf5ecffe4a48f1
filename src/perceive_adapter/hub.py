"""Checkpoints on the Hugging Face Hub: find or download a folder, upload one.

What a folder holds is :mod:`perceive_adapter.folders`'s business. huggingface_hub is imported only
when it is needed.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from torch import Tensor

from perceive_adapter.errors import CheckpointError, ConfigError
from perceive_adapter.folders import CARD_NAME, PICKLES, DamagedError, is_own_card, load_folder
from perceive_adapter.warning import warn

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["HubOptions", "PushOptions", "check_options", "load", "push_folder", "resolve"]

_PATTERNS = ("*.json", "*.safetensors", CARD_NAME)
_REPO_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?", re.ASCII
)


class HubOptions(TypedDict, total=False):
    """How a Hub repository is read: what :func:`resolve` takes by keyword."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


class PushOptions(TypedDict, total=False):
    """How a Hub repository is written: what :func:`push_folder` takes by keyword."""

    private: bool | None
    token: str | bool | None
    revision: str | None
    commit_message: str | None


def check_options(options: HubOptions, function: str, pretrained: object) -> None:
    """Raise for keywords that are no options of a Hub repository, or where none is read.

    Args:
        options: whatever was given by keyword.
        function: whose keywords they are.
        pretrained: name of what is read; None for nothing.

    Raises:
        TypeError: there is no such option.
        ConfigError: there is nothing to read.
    """
    if unknown := [name for name in options if name not in HubOptions.__annotations__]:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
    given = [name for name, value in options.items() if value not in (None, False)]
    if given and pretrained is None:
        raise ConfigError(
            f"{', '.join(given)} of no Hub repository: name the one that is to be read, or leave "
            "it out"
        )


def load(
    name_or_path: str | os.PathLike[str],
    config_name: str,
    tensors_name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Find a folder as :func:`resolve` does, and read it as :func:`load_folder` does.

    Of a repository the two files and the model card are downloaded, and nothing else.
    huggingface_hub checks the size of what it downloads, not the content. A repository whose files
    turn out to be damaged is therefore downloaded once more, over its cached copy.

    Returns:
        The folder, the config and the tensors.

    Raises:
        CheckpointError: as those two functions say, or the repository holds other files.
    """
    needed = config_name, tensors_name
    find = partial(
        resolve,
        name_or_path,
        revision,
        files=(*needed, CARD_NAME),
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    folder = find()
    if Path(name_or_path).is_dir():
        return folder, *load_folder(folder, config_name, tensors_name)
    if not local_files_only and not all((folder / name).is_file() for name in needed):
        _check_listing(os.fspath(name_or_path), revision, token, needed)
    try:
        return folder, *load_folder(folder, config_name, tensors_name)
    except DamagedError as error:
        if local_files_only:
            raise _damaged(error, folder) from error
    folder = find(force_download=True)
    try:
        return folder, *load_folder(folder, config_name, tensors_name)
    except DamagedError as error:
        raise _damaged(error, folder) from error


def resolve(
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    files: Sequence[str] = _PATTERNS,
) -> Path:
    """Find the folder that a path or the name of a Hub repository stands for.

    An existing folder is taken as it is, and the other arguments do not matter to it. A name such
    as ``user/repo`` is downloaded into huggingface_hub's cache, as far as ``files`` says. A network
    that is down, or ``HF_HUB_OFFLINE=1``, falls back to that cache; so does a download that fails,
    with a warning, and the copy downloaded before stays in use.

    Args:
        name_or_path: a folder, ``user/repo``, or ``user/repo@revision``.
        revision: branch, tag or commit of the repository, where the name does not say it.
        token: access token, True for the one saved on this machine, None for it if there is one.
        cache_dir: cache to use in place of huggingface_hub's own.
        local_files_only: make no request, use the cache alone.
        force_download: download again what is in the cache.
        files: names or patterns of what is downloaded; by default JSON, safetensors and the model
            card, nothing else.

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
    repo, revision = _split(name_or_path, revision)
    download = partial(
        _download, repo, revision, token=token, cache_dir=cache_dir, allow_patterns=list(files)
    )
    if local_files_only:
        return download(local_files_only=True)
    try:
        cached = download(local_files_only=True)
    except CheckpointError:
        return download(force_download=force_download)
    return _update(cached, revision, partial(download, force_download=force_download))


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

    Folders inside it are left out. A card that this package wrote does not replace one that it did
    not: that is kept, with a warning.

    Args:
        folder: what :func:`save_folder` wrote.
        repo_id: ``user/repo``, or ``repo`` of the user whose token it is; the repository is made if
            it does not exist.
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
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        kept = _keeps_card(api, repo_id, revision, Path(folder))
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            allow_patterns=list(_PATTERNS),
            ignore_patterns=["*/*", CARD_NAME] if kept else ["*/*"],
        )
    except _hub_errors() as error:
        _fail(f"cannot push {os.fspath(folder)!r} to {repo_id!r}", error)
    if kept:
        warn(
            f"{repo_id!r} has a {CARD_NAME} that is not a model card as perceive_adapter wrote it, "
            "and is kept. Delete it there and push again to have such a card."
        )
    return str(commit.commit_url)


def _keeps_card(api: "HfApi", repo_id: str, revision: str | None, folder: Path) -> bool:
    """Whether a repository has a model card that the folder's should not replace."""
    card = folder / CARD_NAME
    if not card.is_file() or not is_own_card(card):
        return False
    if not api.file_exists(repo_id, CARD_NAME, revision=revision):
        return False
    with tempfile.TemporaryDirectory() as aside:  # in the cache it would look like a whole copy
        found = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, local_dir=aside)
        return not is_own_card(Path(found))


def _split(name: str | os.PathLike[str], revision: str | None) -> tuple[str, str | None]:
    """Take ``user/repo@revision`` apart."""
    match = _REPO_ID.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise CheckpointError(
            f"{os.fspath(name)!r} is not an existing folder, and no string of the form of a Hub "
            "repository, 'user/repo' or 'user/repo@revision'. Check the path."
        )
    if match["revision"] and revision not in (None, match["revision"]):
        raise CheckpointError(
            f"{name!r} is asked for at revision={revision!r} too. Give one revision, in the name "
            "or as revision=."
        )
    return match["repo"], match["revision"] or revision


def _download(repo: str, revision: str | None, **options: Any) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, **options))
    except _hub_errors() as error:
        at = f" at revision {revision!r}" if revision else ""
        _fail(f"cannot download {repo!r}{at}, which is not a local folder either", error)


def _update(cached: Path, revision: str | None, download: "partial[Path]") -> Path:
    """Download over a cached copy, which stays in use where that fails.

    huggingface_hub points the branch at the new commit before it has that commit's files.
    """
    reference = cached.parent.parent / "refs" / (revision or "main")
    try:
        return download()
    except BaseException as error:  # an interrupted download, too, leaves the branch without files
        with suppress(OSError):  # in a cache that nobody may write to, nothing has moved it
            if reference.is_file():
                reference.write_text(cached.name)
        if not isinstance(error, CheckpointError):
            raise
        warn(f"the copy downloaded before, {cached.name}, is used: {error}")
    return cached


def _check_listing(
    name: str, revision: str | None, token: str | bool | None, needed: tuple[str, ...]
) -> None:
    """Say what a repository holds in place of the files that it should; it may be out of reach."""
    import huggingface_hub

    repo, revision = _split(name, revision)
    try:
        files = huggingface_hub.HfApi(token=token).list_repo_files(repo, revision=revision)
    except _hub_errors():
        return
    if not (missing := [file for file in needed if file not in files]):
        return
    pickle = (
        "Pickle is never loaded, since it can run code: ask the owner for safetensors."
        if any(file.endswith(PICKLES) for file in files)
        else "Check the name, and that it is this kind of checkpoint."
    )
    shown = ", ".join(sorted(files)[:8]) or "no files"
    raise CheckpointError(f"{name!r} holds {shown}: expected {' and '.join(missing)}. {pickle}")


def _damaged(error: DamagedError, folder: Path) -> DamagedError:
    """Say how to be rid of a damaged copy in huggingface_hub's cache."""
    return DamagedError(
        f"{error} This copy comes from the Hub, and loading it while the Hub can be reached "
        f"downloads it again; or delete {str(folder.parent.parent)!r}. If it stays damaged, the "
        "repository is: tell its owner."
    )


def _hub_errors() -> tuple[type[Exception], ...]:
    """Errors of huggingface_hub and of whichever HTTP client it is built on.

    hf_xet, which moves large files, has no type of its own, and failed uploads of them have none.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    http = (*HfHubHTTPError.__bases__, HfHubHTTPError)
    return (*http, EntryNotFoundError, OSError, ValueError, RuntimeError)


def _fail(what: str, error: Exception) -> NoReturn:
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    refusal = error.__cause__ if type(error) is RuntimeError else error  # of an upload's part
    status = getattr(getattr(refusal, "response", None), "status_code", None)
    if status in (401, 403):
        remedy = "The Hub refuses access: log in with `hf auth login`, or pass a token that has it."
    elif status == 404:
        remedy = "Check the spelling and the revision, and log in if the repository is private."
    elif isinstance(error, HFValidationError):
        remedy = "Give a repository as 'user/repo'."
    elif isinstance(error, OfflineModeIsEnabled):
        remedy = "Unset HF_HUB_OFFLINE."
    else:
        remedy = (
            "Check the network and try again; without one, only a repository downloaded before can "
            "be used."
        )
    said = str(error).replace("Please retry with `force_download=True`.", "")  # it kept no copy
    said = " ".join(said.split()).rstrip(".")
    raise CheckpointError(f"{what}: {type(error).__name__}: {said}. {remedy}") from error
