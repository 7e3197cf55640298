"""The Hub's client with rules of this package: one commit per upload, verified downloads, messages without tokens."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
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
from transformers.utils import CONFIG_NAME

from evmamba_hub.errors import UserError
from evmamba_hub.model_folder import check_is_converted, check_model_dir


Files = dict[str, Path | bytes]  # path in the repository -> local file or content
RepoType = Literal["model", "dataset", "space", "kernel"]

LOGIN_HINT = "log in with `hf auth login` or set HF_TOKEN"

OFFLINE_VARIABLES = "HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"  # each one keeps the client offline

SIMILARITY = 0.75  # of two names, from 0 to 1, of which one is probably a misspelling of the other

# The client does not retry some requests (creation, commit) itself. Retry them while the Hub is busy.
BUSY_STATUS_CODES = (429, 503)
MAX_ATTEMPTS = 5
DEFAULT_WAIT = 2  # seconds, if the Hub does not say how long
MAX_WAIT = 300

# Files in the cache are symbolic links to blobs, named by their hash: SHA-256 of large files, Git's of others.
SHA256_LENGTH, GIT_HASH_LENGTH = 64, 40


@contextmanager
def translate_hub_errors(repo_id: str, *, may_be_path: bool = False) -> Iterator[None]:
    """Translate errors of the Hub's client into a `UserError` about the repository.

    The request carries the access token, and nothing of it may reach the terminal. So each error gets a new message.

    Args:
        repo_id: The id of the repository.
        may_be_path: Whether the user may have meant a local path, which does not exist.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error.__cause__, (HTTPError, OSError)):
            raise
        raise UserError(
            describe_hub_error(error.__cause__, repo_id, may_be_path)
        ) from error  # uploads of large files wrap the error
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(describe_hub_error(error, repo_id, may_be_path)) from error
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        raise UserError(f"the download of {repo_id} is damaged, run the command again") from error


def describe_hub_error(error: Exception, repo_id: str, may_be_path: bool) -> str:
    """Return the message for an error of the Hub's client: what is wrong, and what to do."""
    similar = ask_for_similar(repo_id) if may_be_path else ""
    if isinstance(error, HFValidationError):
        kind = f"neither a path{similar} nor" if may_be_path else "not"
        return f"{repo_id!r} is {kind} a valid repository id: give user/name, of letters, digits, '-', '_' and '.'"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its conditions on {constants.ENDPOINT}/{repo_id} and {LOGIN_HINT}"
    if isinstance(error, RepositoryNotFoundError):
        if not may_be_path:
            return f"{repo_id} is no repository on the Hub. If it is private, {LOGIN_HINT}"
        return f"{repo_id} is neither a path here{similar} nor a repository on the Hub. If it is private, {LOGIN_HINT}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision: give the name of a branch or tag, or the hash of a commit"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        answered = f"{constants.ENDPOINT} answered {status} for {repo_id}"
        if status == 401:
            return f"{answered}: the access token is invalid or has expired, {LOGIN_HINT}"
        if status == 402:
            return f"{answered}: this needs a subscription or a payment method"
        if status == 403:
            return f"{answered}: the access token has no permission for this, use one that may write to {repo_id}"
        if status in (409, 412):
            return f"{answered}: another process changes it at the same time, run the command again"
        if status == 429 or status >= 500:
            return f"{answered}: the server is overloaded or fails, run the command again later"
        return redact_token(f"{answered}: {error.server_message}") if error.server_message else answered
    no_path = f"there is no file or directory {repo_id}{similar}, and " if may_be_path else ""
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return f"{no_path}{repo_id} is not in the cache: unset {OFFLINE_VARIABLES} to download it"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{no_path}{constants.ENDPOINT} is needed for {repo_id}: unset {OFFLINE_VARIABLES} to reach it"
    return (
        f"{no_path}{constants.ENDPOINT} cannot be reached for {repo_id}, or the connection was lost: check "
        f"{'the path or ' if may_be_path else ''}the connection and run the command again"
    )


def ask_for_similar(path: str) -> str:
    """Return a question for a message about a missing path: whether the directory of a similar name is meant."""
    try:
        names = [each.name for each in Path(path).parent.iterdir() if each.is_dir()]
    except OSError:
        return ""
    similar = get_close_matches(Path(path).name, names, n=1, cutoff=SIMILARITY)
    return f" (did you mean {Path(path).with_name(similar[0])}?)" if similar else ""


def redact_token(text: str) -> str:
    """Return a message of the Hub without the access token, in case the message repeats it."""
    token = get_token()
    return text if token is None else text.replace(token, "(the access token)")


def retry(function: Callable, *args, **kwargs):
    """Call a function of the Hub's client. Call it again while the Hub answers that it is busy."""
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
    """The result of an upload."""

    url: str  # of the commit or the pull request
    changed: bool  # whether a commit was made
    new: list[str]  # uploaded files, except large ones whose content the repository held before
    kept: list[str]  # other files of the repository


def check_repo_id(repo_id: str) -> None:
    """Check that a repository id is valid and names an owner.

    Raises:
        UserError: If the id is invalid, or names no owner.
    """
    with translate_hub_errors(repo_id):
        validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise UserError(f"{repo_id!r} names no owner: give the repository as user/name")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the patterns matches the name of a file."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def list_files(hub: HfApi, repo_id: str, repo_type: RepoType, revision: str) -> list[RepoFile]:
    """Return the files of a repository. Large ones have a hash of their content."""
    tree = hub.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
    return [entry for entry in tree if isinstance(entry, RepoFile)]


def create_repo(hub: HfApi, repo_id: str, repo_type: RepoType, space_sdk: str | None, private: bool) -> None:
    """Create a repository.

    Raises:
        UserError: If the Hub does not let the user create kernels. It grants this on request only.
    """
    try:
        retry(
            hub.create_repo,
            repo_id,
            repo_type=repo_type,
            space_sdk=space_sdk,
            private=private or None,
            exist_ok=True,
        )
    except HfHubHTTPError as error:
        if repo_type != "kernel" or error.response.status_code != 403:
            raise
        raise UserError(
            f"{constants.ENDPOINT} does not let you create the kernel {repo_id}: request access to kernels on "
            f"{constants.ENDPOINT}/settings/account, and use a token that may write to {repo_id.split('/')[0]}"
        ) from error


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
    stale: Iterable[str] = (),
) -> Upload:
    """Upload files to a repository in one commit. Make no commit if the repository holds them already.

    The repository does not change before the commit. Large files that an interrupted call uploaded are not uploaded
    again.

    Args:
        repo_id: The id of the repository, which is created if it does not exist.
        files: The files to upload. Other files of the repository stay.
        message: The commit message.
        repo_type: The type of the repository.
        space_sdk: The SDK of a new Space.
        private: Whether to make a new repository private.
        revision: The branch to commit to. It is created from the main branch if it does not exist.
        create_pr: Whether to open a pull request instead of committing to the branch.
        stale: Patterns of the names of files to delete. Names in `files` are not deleted.

    Raises:
        UserError: If the token, the permission or the connection is missing, or the id is invalid or that of another
            type of repository.
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
            create_repo(hub, repo_id, repo_type, space_sdk, private)
        if revision is not None and not revision.startswith("refs/"):
            retry(hub.create_branch, repo_id, repo_type=repo_type, branch=revision, exist_ok=True)

        head = retry(hub.repo_info, repo_id, repo_type=repo_type, revision=revision)
        present = retry(list_files, hub, repo_id, repo_type, head.sha)
        others = [file.path for file in present if file.path not in files]
        hashes = {file.lfs.sha256 for file in present if file.lfs}
        additions = [CommitOperationAdd(path, source) for path, source in files.items()]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
        operations += [CommitOperationDelete(name) for name in others if matches(name, stale)]
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
        except ValueError as error:  # rejected metadata or large files, and answers that are not from a Hub
            if isinstance(error, HTTPError):
                raise
            raise UserError(redact_token(f"{constants.ENDPOINT} rejects the upload to {repo_id}: {error}")) from error
    return Upload(
        commit.pr_url or commit.commit_url,
        changed=commit.oid != head.sha,
        new=[each.path_in_repo for each in additions if each.upload_info.sha256.hex() not in hashes],
        kept=[name for name in others if not matches(name, stale)],
    )


def fetch_model(model: str, revision: str | None = None) -> Path:
    """Return the directory of a model: `model` itself, or the verified download of the repository with this id.

    Raises:
        UserError: If neither exists, the Hub cannot be reached, or a file was damaged during the download. Also if
            `model` is a file, or a directory or a repository without a configuration.
    """
    if Path(model).exists():
        check_model_dir(Path(model))
        if revision is not None:
            raise UserError(
                f"{model} is a directory, only repositories on the Hub have revisions: leave the revision out"
            )
        return Path(model)
    check_is_converted(model)
    with translate_hub_errors(model, may_be_path=True):
        folder = Path(
            snapshot_download(
                model, revision=revision, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["*/*"]
            )
        )
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(
            f"{model} holds no {CONFIG_NAME}: give a repository of a model, or convert its checkpoint with "
            "`evmamba convert` first"
        )
    check_downloads(folder.iterdir())
    return folder


def check_downloads(paths: Iterable[Path]) -> None:
    """Compare files in the Hub's cache with the hashes in the names of their blobs. The client only compares sizes.

    Raises:
        UserError: If a file is damaged. Damaged files are removed from the cache.
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
        return False  # without symbolic links, the cache does not keep the name of the blob
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
