"""The upload: one commit to `main`, which holds all of the stage or nothing, and every refusal in one line."""

import fnmatch
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import HfHubHTTPError, validate_repo_id

from perceptiongpt.publishing.stage import MODEL_TYPE, OWN_FILES, SPACE_FILE, PublishError


try:
    import httpx2 as httpx  # what huggingface_hub >= 2 speaks HTTP with
except ImportError:
    import httpx


TOKENS_PAGE = "https://huggingface.co/settings/tokens"
AGAIN = "Give the same command again: what has arrived is not sent twice"
UNTOUCHED = "Nothing was published: main is as it was"
ALL_OR_NOTHING = "main holds either all files or none of them, as they go into one commit"
# What the client raises when the Hub refuses or is not reached.
HUB_ERRORS = (HfHubHTTPError, httpx.HTTPError, ConnectionError)
BLOCK = 2**20


@dataclass
class Target:
    """A repository that may be written to.

    Attributes:
        api: a client with the user's token.
        repo_id: `user/name`.
        exists: whether it is on the Hub already.
        user: the name of the token's owner.
        repo_type: `model` or `space`.
    """

    api: HfApi
    repo_id: str
    exists: bool
    user: str
    repo_type: str = "model"

    @property
    def url(self) -> str:
        """Its page."""
        return f"{self.api.endpoint}/{'spaces/' if self.repo_type == 'space' else ''}{self.repo_id}"


def find_target(
    repo_id: str,
    token: str | None = None,
    replace: bool = False,
    is_adapter: bool = False,
    repo_type: str = "model",
) -> Target:
    """Check, before anything is done, that a repository can be published to.

    Args:
        repo_id: `user/name`, or the name alone for one's own.
        token: in place of the one that `hf auth login` or `HF_TOKEN` left.
        replace: allow a repository that holds another kind of model.
        is_adapter: what will be published is an adapter alone.
        repo_type: `model` or `space`.

    Raises:
        PublishError: there is no token, or it has no rights; the name is malformed or taken; the Hub is not reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} cannot be the name of a repository: {first_line(error)}") from error
    api = HfApi(token=token)
    try:
        who = api.whoami()
    except LocalTokenNotFoundError as error:
        raise PublishError(
            f"there is no access token: log in with `hf auth login`, or set HF_TOKEN to one with write access "
            f"({TOKENS_PAGE})"
        ) from error
    except HUB_ERRORS as error:
        raise explained(error, repo_id) from error
    user, organizations = who["name"], [one["name"] for one in who.get("orgs", [])]
    if (who.get("auth", {}).get("accessToken") or {}).get("role") == "read":
        raise PublishError(f"the access token of {user} can only read: make one with write access at {TOKENS_PAGE}")
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    try:
        try:
            info = api.repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            # It does not exist, or it is private and another's. Only one's own namespaces can be created in.
            owner = repo_id.split("/")[0]
            if owner not in (user, *organizations):
                own = ", ".join([user, *organizations])
                message = f"{user} has no right to publish under {owner!r}: choose a name that begins with one of {own}"
                raise PublishError(message) from None
            return Target(api, repo_id, False, user, repo_type)
        try:
            api.auth_check(repo_id, repo_type=repo_type, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403, 404):
                raise PublishError(f"the name is taken: {repo_id} exists, and {user} may not write to it") from error
            raise
        files = {sibling.rfilename for sibling in info.siblings or []}
        if repo_type == "space":
            if "app.py" in files and SPACE_FILE not in files and not replace:
                message = f"the name is taken: {repo_id} holds another app; choose another name, or give --replace"
                raise PublishError(message)
        elif not replace:
            check_content(api, repo_id, files, is_adapter)
    except HUB_ERRORS as error:
        raise explained(error, repo_id) from error
    return Target(api, repo_id, True, user, repo_type)


def check_content(api: HfApi, repo_id: str, files: set[str], is_adapter: bool) -> None:
    """Refuse to write over a model of another kind, or over a whole model with an adapter alone or the reverse."""
    taken = f"the name is taken: {repo_id} holds"
    if "config.json" in files:
        path = api.hf_hub_download(repo_id, "config.json")
        found = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
        if found != MODEL_TYPE or is_adapter:
            raise PublishError(f"{taken} a model of the type {found!r}; choose another name, or give --replace")
    elif "adapter_config.json" in files:
        if not is_adapter:
            raise PublishError(f"{taken} an adapter; choose another name, or give --replace")
    elif weights := sorted(name for name in files if name.endswith((".safetensors", ".bin", ".gguf", ".pt"))):
        raise PublishError(f"{taken} other weights ({weights[0]}); choose another name, or give --replace")


def upload(
    target: Target,
    folder: Path,
    *,
    message: str,
    private: bool | None = None,
    tag: str | None = None,
    own_files: Iterable[str] = OWN_FILES,
) -> tuple[str, list[str]]:
    """Upload a stage as one commit to `main`, check what the Hub then holds, and tag it.

    Large files go first, outside of any commit; one commit then names all files, so `main` never shows a part of them.
    Stored files are known by their content: those that an interrupted upload has sent are not sent again.

    Args:
        target: from `find_target`.
        folder: the stage.
        message: of the commit.
        private: for a repository that is made now; None is the owner's default.
        tag: of the revision; it must be new, or already mark exactly these files.
        own_files: patterns of files that are deleted, in the same commit, where the stage no longer has them.

    Returns:
        The commit's id, and the files of the repository that are not this program's and stay.

    Raises:
        PublishError: the upload did not succeed; the message says what `main` holds and what to do.
    """
    api, repo_id, of_type = target.api, target.repo_id, {"repo_type": target.repo_type}
    local = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        if not target.exists:
            create(target, private)
        parent = api.repo_info(repo_id, **of_type).sha
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, **of_type).tags}
        if tag in tags and (different := differences(target, tags[tag], folder, local, own_files)):
            raise PublishError(
                f"the tag {tag} marks another revision of {repo_id} ({different[0]}): choose another tag. {UNTOUCHED}"
            )
        remote = api.list_repo_files(repo_id, **of_type)
        stale = [name for name in remote if name not in local and is_own(name, own_files)]
        kept = [name for name in remote if name not in local and name not in stale and name != ".gitattributes"]
        additions = [CommitOperationAdd(name, folder / name) for name in local]
        api.preupload_lfs_files(repo_id, additions, free_memory=False, **of_type)
    except (*HUB_ERRORS, RuntimeError) as error:
        raise explained(error, repo_id, f"{UNTOUCHED}. {AGAIN}") from error
    try:
        operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=parent, **of_type).oid
    except HUB_ERRORS as error:
        lost = getattr(error, "response", None) is None  # the commit may have been made, and only the answer lost
        raise explained(error, repo_id, f"{ALL_OR_NOTHING if lost else UNTOUCHED}. {AGAIN}") from error
    except ValueError as error:
        raise PublishError(f"the Hub does not accept the card: {' '.join(str(error).split())}. {UNTOUCHED}") from error
    try:
        if wrong := differences(target, commit, folder, local, own_files):
            raise PublishError(f"{repo_id} has the commit {commit}, but it differs from the stage: {', '.join(wrong)}")
        if tag is not None and tags.get(tag) != commit:
            api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=tag in tags, **of_type)
    except HUB_ERRORS as error:
        raise explained(error, repo_id, f"main is published as {commit}; the tag is missing. {AGAIN}") from error
    return commit, kept


def create(target: Target, private: bool | None) -> None:
    """Make the repository."""
    try:
        sdk = {"space_sdk": "gradio"} if target.repo_type == "space" else {}
        target.api.create_repo(target.repo_id, private=private, repo_type=target.repo_type, **sdk)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 409:
            message = f"the name is taken: {target.repo_id} exists, and {target.user} cannot read it. {UNTOUCHED}"
            raise PublishError(message) from error
        if status in (401, 403):
            raise PublishError(
                f"{target.user} has no right to create {target.repo_id}: {first_line(error)}. {UNTOUCHED}"
            ) from error
        raise
    target.exists = True


def is_own(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def differences(target: Target, revision: str, folder: Path, local: list[str], own_files: Iterable[str]) -> list[str]:
    """How a revision on the Hub differs from a stage: missing, other and surplus files, by their hashes."""
    entries = target.api.list_repo_tree(target.repo_id, recursive=True, revision=revision, repo_type=target.repo_type)
    remote = {entry.path: entry for entry in entries}
    remote = {path: entry for path, entry in remote.items() if isinstance(entry, RepoFile)}
    found = [f"{name} is missing" for name in local if name not in remote]
    for name in local:
        if name in remote:
            entry = remote[name]
            expected = entry.lfs.sha256 if entry.lfs else entry.blob_id
            if file_hash(folder / name, git_blob=not entry.lfs) != expected:
                found.append(f"{name} is another")
    return found + [f"{name} is left over" for name in remote if name not in local and is_own(name, own_files)]


def file_hash(path: Path, git_blob: bool) -> str:
    """The SHA-256 of a file or, for files that git itself keeps, the SHA-1 of its blob."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if git_blob else hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


# ---- messages --------------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def server_words(error: HfHubHTTPError) -> str:
    """What the server gives as the reason, or the first line of the error."""
    return error.response.headers.get("X-Error-Message") or error.server_message or first_line(error)


def explained(error: BaseException, repo_id: str, state: str = UNTOUCHED) -> PublishError:
    """The error for a user. One that has nothing to do with the network or the Hub is raised as it is.

    Args:
        error: from the client; the cause of a `RuntimeError` counts.
        repo_id: the repository.
        state: what `main` holds now, and what to do.
    """
    cause = error
    while not isinstance(cause, HUB_ERRORS):
        if cause.__cause__ is None:
            raise error
        cause = cause.__cause__
    response = getattr(cause, "response", None)
    if response is None:
        return PublishError(f"the connection to {HfApi().endpoint} was lost ({first_line(cause)}). {state}")
    status, reason = response.status_code, server_words(cause).rstrip(".")
    if status == 401:
        return PublishError(f"the access token was refused ({reason}): make a new one at {TOKENS_PAGE}. {state}")
    if status == 403:
        return PublishError(f"the access token has no right to write to {repo_id} ({reason}). {state}")
    if status in (409, 412):
        return PublishError(f"{repo_id} was changed by another upload meanwhile ({reason}). {state}")
    return PublishError(f"the Hub answered {status} for {repo_id} ({reason}). {state}")
