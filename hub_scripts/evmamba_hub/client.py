"""The Hub's client with our rules: uploads are one commit, downloads are checked, errors come in our own words."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from evmamba_hub.errors import UserError


Files = dict[str, Path | bytes]  # what a repository shall hold, by the path in it
RepoType = Literal["model", "dataset", "space"]

LOGIN_HINT = "log in with `hf auth login` or set HF_TOKEN"

# Requests that the client does not repeat by itself (creation, commit) are repeated when the Hub asks to come back.
BUSY_STATUS_CODES = (429, 503)
MAX_ATTEMPTS = 5
DEFAULT_WAIT = 2  # seconds, where the Hub does not say how long
MAX_WAIT = 300

# Files of the cache are symbolic links to blobs that are named by their hash: SHA-256 of large files, Git's of others.
SHA256_LENGTH, GIT_HASH_LENGTH = 64, 40


@contextmanager
def translate_hub_errors(repo_id: str) -> Iterator[None]:
    """Translates errors of the Hub's client into a `UserError` about the repository.

    Nothing of the request, which carries the access token, may reach the terminal: each error gets our own words.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error.__cause__, (HTTPError, OSError)):
            raise
        raise UserError(
            describe_hub_error(error.__cause__, repo_id)
        ) from error  # uploads of large files wrap what happened
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(describe_hub_error(error, repo_id)) from error
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        raise UserError(f"the download of {repo_id} is damaged, run the command again") from error


def describe_hub_error(error: Exception, repo_id: str) -> str:
    if isinstance(error, HFValidationError):
        return (
            f"{repo_id!r} is no valid repository id (user/name, of letters, digits, '-', '_' and '.') and no path here"
        )
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its conditions on {constants.ENDPOINT}/{repo_id} and {LOGIN_HINT}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} is neither a path here nor a repository on the Hub. If it is private, {LOGIN_HINT}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision: give the name of a branch or tag, or the hash of a commit"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        answered = f"{constants.ENDPOINT} answered {status} for {repo_id}"
        if status == 401:
            return f"{answered}: the access token is not valid (any more), {LOGIN_HINT}"
        if status == 402:
            return f"{answered}: it asks for a subscription or a method of payment for this"
        if status == 403:
            return f"{answered}: the access token has no right to do this, use one that may write to {repo_id}"
        if status in (409, 412):
            return f"{answered}: something else changes it at the same time, run the command again"
        if status == 429 or status >= 500:
            return f"{answered}: it is overloaded or has trouble of its own, run the command again later"
        return redact_token(f"{answered}: {error.server_message}") if error.server_message else answered
    return (
        f"{constants.ENDPOINT} cannot be reached for {repo_id}, or the connection broke off: check it and run the "
        "command again"
    )


def redact_token(text: str) -> str:
    """What the Hub itself says, should it ever repeat the token."""
    token = get_token()
    return text if token is None else text.replace(token, "(the access token)")


def retry(function: Callable, *args, **kwargs):
    """Calls a function of the Hub's client, and again for as long as the Hub answers that it is busy."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return function(*args, **kwargs)
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY_STATUS_CODES or attempt == MAX_ATTEMPTS:
                raise
            wait = error.response.headers.get("Retry-After", "")
            time.sleep(min(int(wait), MAX_WAIT) if wait.isdigit() else DEFAULT_WAIT)


@dataclass
class Upload:
    """What became of an upload."""

    url: str  # of the commit, or of the pull request
    changed: bool  # whether there is a new commit


def check_repo_id(repo_id: str) -> None:
    with translate_hub_errors(repo_id):
        validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise UserError(f"{repo_id!r} names no owner: give the repository as user/name")


def upload(
    repo_id: str,
    files: Files,
    message: str,
    *,
    repo_type: RepoType = "model",
    space_sdk: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    is_stale: Callable[[str], bool] = lambda name: False,
) -> Upload:
    """Brings files into a repository in one commit, or none if they are there already.

    Until the commit, nothing of the repository changes; large files that were uploaded before an interruption are not
    uploaded again.

    Args:
        repo_id: the repository, created where it does not exist.
        files: what it shall hold. Other files of the repository stay.
        message: of the commit.
        repo_type, space_sdk, private: of a new repository.
        revision: the branch to commit to, created from the main branch where it does not exist.
        create_pr: propose the commit as a pull request instead.
        is_stale: which files of the repository, by name, go unless they are among `files`.

    Raises:
        UserError: without token, rights, network or a valid id, and where the id is another type of repository.
    """
    check_repo_id(repo_id)
    if get_token() is None:
        raise UserError(f"there is no access token for {constants.ENDPOINT}: {LOGIN_HINT}")
    hub = HfApi()
    with translate_hub_errors(repo_id):
        if not retry(hub.repo_exists, repo_id, repo_type=repo_type):
            for other in {"model", "dataset", "space"} - {repo_type}:
                if retry(hub.repo_exists, repo_id, repo_type=other):
                    raise UserError(f"{repo_id} is a {other} on the Hub, not a {repo_type}: choose another id")
            retry(
                hub.create_repo,
                repo_id,
                repo_type=repo_type,
                space_sdk=space_sdk,
                private=private or None,
                exist_ok=True,
            )
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            retry(hub.create_branch, repo_id, repo_type=repo_type, branch=revision, exist_ok=True)

        head = retry(hub.repo_info, repo_id, repo_type=repo_type, revision=revision)
        present = [sibling.rfilename for sibling in head.siblings]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, source) for path, source in files.items()
        ]
        operations += [CommitOperationDelete(name) for name in present if is_stale(name) and name not in files]
        try:
            commit = retry(
                hub.create_commit,
                repo_id,
                operations,
                commit_message=message,
                repo_type=repo_type,
                revision=revision,
                create_pr=create_pr,
            )
        except ValueError as error:  # refused metadata or large files, and answers that are not of a Hub
            if isinstance(error, HTTPError):
                raise
            raise UserError(redact_token(f"{constants.ENDPOINT} refuses the upload to {repo_id}: {error}")) from error
    return Upload(commit.pr_url or commit.commit_url, commit.oid != head.sha)


def fetch_model(model: str, revision: str | None = None) -> Path:
    """The folder of a model: `model` itself, or the download of the repository of this id, whose hashes are checked.

    Raises:
        UserError: where there is neither, or the Hub cannot be reached, or a file was damaged on its way.
    """
    if Path(model).is_dir():
        if revision is not None:
            raise UserError(f"{model} is a folder, only repositories on the Hub have revisions")
        return Path(model)
    with translate_hub_errors(model):
        folder = snapshot_download(
            model, revision=revision, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["*/*"]
        )
    check_downloads(Path(folder).iterdir())
    return Path(folder)


def check_downloads(paths: Iterable[Path]) -> None:
    """Compares files in the Hub's cache with the hashes that they are kept under. The client compares sizes alone.

    Raises:
        UserError: for damaged files. They are removed from the cache.
    """
    damaged = [path for path in paths if is_damaged(path)]
    for path in damaged:
        path.resolve().unlink(missing_ok=True)
        path.unlink()
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise UserError(f"{names} was damaged on its way from {constants.ENDPOINT}, run the command again")


def is_damaged(path: Path) -> bool:
    if not path.is_symlink():
        return False  # on a file system without links, the name of the blob is lost
    blob = path.resolve()
    if len(blob.name) == SHA256_LENGTH:
        digest = hashlib.sha256()
    elif len(blob.name) == GIT_HASH_LENGTH:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    else:
        return False
    with blob.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() != blob.name
