"""Download from the Hugging Face Hub, with errors that say what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from minicache_trt.checkpoint.weights import INDEX_FILE
from minicache_trt.errors import UserError

SIDECAR_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
)
"""Files beside the weights that an engine directory takes along."""

CONFIG_PATTERNS = ("config.json", "generation_config.json")
WEIGHT_PATTERNS = (INDEX_FILE, "model*.safetensors")
PYTORCH_PATTERNS = ("pytorch_model.bin.index.json", "pytorch_model*.bin")
"""For repositories without safetensors."""

_NETWORK_MODULES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "socket", "ssl"}


def is_hub_id(name: str) -> bool:
    """Whether a string has the form ``organisation/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def download(
    hub_id: str, patterns: tuple[str, ...], *, revision: str | None = None, token: str | None = None
) -> tuple[Path, str | None]:
    """Files of a hub repository that match ``patterns``, through the local hub cache.

    Parameters
    ----------
    hub_id : str
        ``organisation/name``.
    patterns : tuple of str
        Shell patterns of file names.
    revision : str, optional
        Branch, tag or commit.
    token : str, optional
        Access token. Default: ``HF_TOKEN`` or the token of ``hf auth login``.

    Returns
    -------
    directory : Path
        Snapshot in the cache.
    commit : str or None
        Commit of the snapshot, so that the same files can be had again.

    Raises
    ------
    UserError
        No access, no such repository or revision, no network, or no space left.
    """
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(hub_id, revision=revision, token=token, allow_patterns=list(patterns)))
    except Exception as error:
        explained = _explain(error, hub_id, revision)
        if explained is None:
            raise
        raise explained from error
    return directory, directory.name if re.fullmatch(r"[0-9a-f]{40}", directory.name) else revision


def _explain(error: Exception, hub_id: str, revision: str | None) -> UserError | None:
    from huggingface_hub import errors

    chain = list(_chain(error))
    statuses = {getattr(getattr(link, "response", None), "status_code", None) for link in chain}

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if any_is(errors.RevisionNotFoundError):
        return UserError(
            f"{hub_id}: no revision {revision!r} on the Hugging Face Hub", "check the branch, tag or commit"
        )
    if any_is(errors.GatedRepoError) or 403 in statuses:
        return UserError(
            f"{hub_id}: access on the Hugging Face Hub is restricted",
            f"ask for access at https://huggingface.co/{hub_id}, then set HF_TOKEN to a token of that account",
        )
    if any_is(errors.RepositoryNotFoundError):
        return UserError(
            f"{hub_id}: no such directory here, and no such repository on the Hugging Face Hub or no access to it",
            "check the spelling; if it is private, set HF_TOKEN",
        )
    if 401 in statuses:
        return UserError(f"{hub_id}: the Hugging Face Hub refused the access token", "set HF_TOKEN to a valid token")
    if 429 in statuses:
        return UserError(f"{hub_id}: too many requests to the Hugging Face Hub", "wait some minutes, or set HF_TOKEN")
    if any_is(errors.DisabledRepoError):
        return UserError(f"{hub_id}: the repository is disabled on the Hugging Face Hub", "use another repository")
    if any_is(errors.HFValidationError):
        return UserError(f"{hub_id}: not a valid name on the Hugging Face Hub", "expected organisation/name")
    return _explain_machine(chain, hub_id)


def _explain_machine(chain: list[BaseException], hub_id: str) -> UserError | None:
    """Errors of this machine or its network."""
    from huggingface_hub import errors

    codes = {link.errno for link in chain if isinstance(link, OSError)}
    modules = {type(link).__module__.partition(".")[0] for link in chain}
    text = " ".join(str(link) for link in chain)
    if codes & {errno.ENOSPC, errno.EDQUOT} or "No space left" in text:
        return UserError(f"{hub_id}: the disk is full", "free some space, or set HF_HOME to a larger disk")
    if codes & {errno.EACCES, errno.EPERM, errno.EROFS} and not modules & _NETWORK_MODULES:
        return UserError(f"{hub_id}: the hub cache cannot be written", "set HF_HOME to a directory that can be written")
    network = (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, ConnectionError)
    if isinstance(chain[0], (*network, TimeoutError)) or modules & _NETWORK_MODULES:
        return UserError(
            f"{hub_id}: the Hugging Face Hub cannot be reached, and the local cache does not hold this model",
            "check the network, proxy and HF_HUB_OFFLINE, or give a local directory",
        )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
