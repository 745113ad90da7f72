"""What the Hub says to somebody who publishes, as one sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    FileDuplicationError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RevisionNotFoundError,
)

from converter.errors import ConverterError, PublishError, is_out_of_memory
from converter.hub.limits import NETWORK_ERRORS

AGAIN = "run the same command again: what was uploaded is not sent twice"
LOG_IN = (
    "log in with 'hf auth login', set HF_TOKEN, or HF_OIDC_RESOURCE in a job that is a trusted "
    "publisher"
)
FULL = re.compile(r"(?i)storage|quota|limit reached|too large|exceed")
"""What is said of a repo or an account that can hold no more."""

STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")
"""How hf_xet, whose errors are ConnectionErrors and the like, says what it was answered."""


@contextmanager
def plain_refusals(repo_id: str) -> Iterator[None]:
    """Turn what the client raises into one sentence about the repo that is written to.

    Raises:
        PublishError: no token, no right, no room, or no Hub.
    """
    try:
        yield
    except ConverterError:
        raise
    except Exception as error:  # the client's two ways of uploading have an error tree each
        explained = explain(repo_id, error)
        if explained is None or is_out_of_memory(error):
            raise
        raise explained from error


def explain(repo_id: str, error: Exception) -> PublishError | None:
    """What an error of the client means; None if it is none of the client's."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of the thread that uploaded
    said = _said(error)
    if isinstance(error, OfflineModeIsEnabled):
        return PublishError("HF_HUB_OFFLINE is set, so nothing can be published", hint="unset it")
    if isinstance(error, LocalTokenNotFoundError):
        return PublishError("there is no token of the Hugging Face Hub", hint=LOG_IN)
    if isinstance(error, OIDCError):
        return PublishError("the job cannot prove who it is to the Hub", found=said)
    if isinstance(error, RevisionNotFoundError):
        return PublishError(
            f"{repo_id} has no such branch", hint="check --branch, and the right to make one"
        )
    if isinstance(error, HfHubHTTPError):
        return of_status(repo_id, error.response.status_code, error.server_message or said)
    if status := STATUS.search(said):
        return of_status(repo_id, int(status[1]), said)
    if isinstance(error, NETWORK_ERRORS):
        return PublishError(
            f"{repo_id}: the Hub cannot be reached, or the connection broke", found=said,
            hint=f"check the network and HF_ENDPOINT, then {AGAIN}",
        )  # fmt: skip
    if _is_of_xet(error):
        return PublishError(
            f"{repo_id}: the upload to the Hub's storage failed", found=said, hint=AGAIN
        )
    if isinstance(error, (EntryNotFoundError, FileDuplicationError, ValueError)):
        if FULL.search(said):
            return _full(repo_id, said)
        return PublishError(f"{repo_id}: the Hub refuses the upload", found=said)
    return None


def refuses_copies(repo_id: str, error: Exception) -> bool:
    """Whether an error of a commit to ``repo_id`` is of the copies in it, not of the commit itself.

    The Hub is asked for copies on a route of the source, and so is what it has there.
    """
    if isinstance(error, HfHubHTTPError):
        path = error.response.url.path
        listing = "/paths-info/" in path and f"/{repo_id}/" not in path
        return listing or path.endswith("/lfs-files/duplicate")
    missing = isinstance(error, (FileDuplicationError, EntryNotFoundError))
    return missing or "no xet hash" in str(error)


def of_status(repo_id: str, status: int, said: str) -> PublishError:
    """What an answer of the Hub means.

    Args:
        repo_id: that was written to.
        status: of HTTP.
        said: by the Hub.
    """
    plain = re.match(r"(?:Client|Server) error '\d+ (.*?)' for url", said)
    said = " ".join((plain[1] if plain else said).split())[:200]
    if status in (402, 413) or (status in (400, 403, 422) and FULL.search(said)):
        return _full(repo_id, said)
    if status == 401:
        return PublishError("the Hub does not accept the token", hint=LOG_IN)
    if status == 403:
        return PublishError(
            f"the token may not write to {repo_id}", found=said or None,
            hint="use a token with write permission of somebody who may, or another repo",
        )  # fmt: skip
    if status == 404:
        return PublishError(
            f"there is no {repo_id} on the Hub, or the token may not see it",
            hint="check the name and the token",
        )
    if status in (409, 412):
        return PublishError(
            f"{repo_id} was changed by somebody else meanwhile", found=said or None, hint=AGAIN
        )
    if status == 429:
        return PublishError(
            f"{repo_id}: too many requests for the Hub's rate limit", found="429 again and again",
            hint=f"wait some minutes, then {AGAIN}",
        )  # fmt: skip
    if status >= 500:
        return PublishError(
            f"{repo_id}: the Hub failed", found=f"{status} {said}".strip(), hint=f"later, {AGAIN}"
        )
    return PublishError(f"{repo_id}: the Hub refuses the upload", found=f"{status} {said}".strip())


def _full(repo_id: str, said: str) -> PublishError:
    return PublishError(
        f"{repo_id}: the Hub has no room for this", found=said or None,
        hint="free storage, choose --public or another account; nothing was committed",
    )  # fmt: skip


def _said(error: Exception) -> str:
    """The words of an error, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_of_xet(error: Exception) -> bool:
    """Whether hf_xet raised it: it has types of its own, and RuntimeErrors."""
    return type(error).__module__.startswith("hf_xet") or isinstance(error, RuntimeError)
