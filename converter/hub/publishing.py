"""Publishing: check the rights before any work, and turn the Hub's errors into sentences."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileDuplicationError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from converter.errors import ConverterError, OptionError, PublishError, is_out_of_memory
from converter.hub.addresses import repo_named
from converter.hub.limits import NETWORK_ERRORS
from converter.recipe import Publication
from converter.runtime import progress
from converter.text import redact_log, redacted

_AGAIN = "run the same command again: what was uploaded is not sent twice"
_LOG_IN = (
    "log in with 'hf auth login', set HF_TOKEN, or HF_OIDC_RESOURCE in a job that is a trusted "
    "publisher"
)
_FULL = re.compile(r"(?i)storage|quota|limit reached|too large|exceed")
"""Words in messages about a full repo or account."""

_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")
"""The HTTP status in messages of hf_xet, whose errors are ConnectionErrors and the like."""

_WRITES = ("repo.write", "repo.content.write")
"""Permissions of a fine-grained token, either of which lets it write."""


def check_named(asked: Publication, option: str) -> Publication:
    """Check a request without asking the Hub, and return it with the plain name of the repo.

    Raises:
        OptionError: not the name of a repo, or options that exclude each other.
        PublishError: no token, or no Hub.
    """
    if asked.create_pr and asked.branch is not None:
        raise OptionError(
            "--create-pr", expected="no --branch", found=f"--branch {asked.branch}",
            hint="the Hub opens pull requests against the main branch",
        )  # fmt: skip
    if redacted(bare := asked.repo_id.partition("?")[0]) != bare:
        raise OptionError(option, expected="a repo id such as owner/name", found="a token")
    asked = replace(asked, repo_id=repo_named(option, asked.repo_id))
    with plain_refusals(asked.repo_id):
        if constants.is_offline_mode():
            raise OfflineModeIsEnabled
        if get_token() is None:
            raise LocalTokenNotFoundError
    return asked


def check_rights(asked: Publication, option: str) -> Publication:
    """Ask the Hub whether ``asked`` can be done, which takes seconds. Nothing is changed.

    A message names the visibility of an existing repo. ``option`` is the option that named the
    repo.

    Returns:
        the same with the whole name of the repo, and whether it exists.

    Raises:
        OptionError: not the name of a repo, or options that exclude each other.
        PublishError: no token, a read-only one, no right to write there, or no Hub.
    """
    asked = check_named(asked, option)
    redact_log("huggingface_hub")
    if not progress.current().shows_bars:
        disable_progress_bars()  # of the client
    with plain_refusals(asked.repo_id):
        api, repo_id = HfApi(), asked.repo_id
        trusted = bool(os.environ.get("HF_OIDC_RESOURCE"))  # its token is for a repo, not a user
        if not trusted:
            who = api.whoami()
            repo_id = repo_id if "/" in repo_id else f"{who['name']}/{repo_id}"
            check_account(who, replace(asked, repo_id=repo_id))
        elif "/" not in repo_id:
            raise OptionError(option, expected="owner/name", found=repo_id)
        try:
            info = api.repo_info(repo_id)
        except RepositoryNotFoundError:
            if trusted:
                raise  # such a job may write to a repo, but not create one
            return replace(asked, repo_id=repo_id)
        if not asked.create_pr:
            _check_write(api, repo_id)
    seen = "private" if info.private else "public"
    progress.note(f"{info.id} exists and is {seen}, which it stays")
    return replace(asked, repo_id=str(info.id), exists=True)


def _check_write(api: HfApi, repo_id: str) -> None:
    """Ask whether the token may write to a repo that exists."""
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code != 404:  # a Hub without this route is asked by the upload
            raise


def check_account(who: Mapping[str, Any], asked: Publication) -> None:
    """Refuse a request that the Hub's answer to "who am I" rules out.

    Args:
        who: as ``whoami`` returns it: a name, organisations with roles, and the token's role.
        asked: with the whole name of the repo.

    Raises:
        PublishError: the token cannot write, or the user not there.
    """
    owner = asked.repo_id.partition("/")[0]
    token = (who.get("auth") or {}).get("accessToken") or {}
    name = f"the token {token['displayName']}" if token.get("displayName") else "the token"
    if token.get("role") == "read":
        raise PublishError(
            f"{name} is read-only", expected="one with write permission",
            hint="make one on https://huggingface.co/settings/tokens",
        )  # fmt: skip
    if asked.create_pr:
        return  # everyone who can read may propose
    organisations = {org.get("name"): org.get("roleInOrg") for org in who.get("orgs") or []}
    if owner != who["name"] and owner not in organisations:
        raise PublishError(
            f"{who['name']} may not write to {asked.repo_id}",
            expected=f"a token of {owner} or of one of its members",
            hint="choose a repo of yours, or propose a change with --create-pr",
        )
    if organisations.get(owner) == "read" and owner != who["name"]:
        raise PublishError(
            f"{who['name']} may only read what {owner} has", hint=f"ask {owner} for the role write"
        )
    scoped = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and scoped is not None:
        names = {owner, asked.repo_id}
        granted = [s for s in scoped if (s.get("entity") or {}).get("name") in names]
        if not any(set(_WRITES) & set(scope.get("permissions") or ()) for scope in granted):
            raise PublishError(
                f"{name} may not write to {asked.repo_id}", expected="the permission repo.write",
                hint="give it on https://huggingface.co/settings/tokens",
            )  # fmt: skip


def open_repo(place: Publication) -> None:
    """Create a missing repo and branch; an existing repo keeps its visibility."""
    api = HfApi()
    if not place.exists:
        api.create_repo(place.repo_id, private=place.private is not False, exist_ok=True)
    if place.branch not in (None, "main") and not str(place.branch).startswith("refs/"):
        api.create_branch(place.repo_id, branch=str(place.branch), exist_ok=True)


@contextmanager
def plain_refusals(repo_id: str) -> Iterator[None]:
    """Turn the client's exceptions into one sentence about the repo that is written to.

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
    """The ``PublishError`` for an exception of the client; None for other exceptions."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of the thread that uploaded
    said = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        return PublishError("HF_HUB_OFFLINE is set, so nothing can be published", hint="unset it")
    if isinstance(error, LocalTokenNotFoundError):
        return PublishError("there is no token of the Hugging Face Hub", hint=_LOG_IN)
    if isinstance(error, OIDCError):
        return PublishError("the job cannot prove who it is to the Hub", found=said)
    if isinstance(error, RevisionNotFoundError):
        return PublishError(
            f"{repo_id} has no such branch", hint="check --branch, and the right to make one"
        )
    if isinstance(error, HfHubHTTPError):
        return _of_status(repo_id, error.response.status_code, error.server_message or said)
    if status := _STATUS.search(said):
        return _of_status(repo_id, int(status[1]), said)
    if isinstance(error, NETWORK_ERRORS):
        return PublishError(
            f"{repo_id}: the Hub cannot be reached, or the connection broke", found=said,
            hint=f"check the network and HF_ENDPOINT, then {_AGAIN}",
        )  # fmt: skip
    is_of_xet = type(error).__module__.startswith("hf_xet") or isinstance(error, RuntimeError)
    if is_of_xet:  # which has types of its own, and RuntimeErrors
        return PublishError(
            f"{repo_id}: the upload to the Hub's storage failed", found=said, hint=_AGAIN
        )
    if isinstance(error, (EntryNotFoundError, FileDuplicationError, ValueError)):
        if _FULL.search(said):
            return _full(repo_id, said)
        return PublishError(f"{repo_id}: the Hub refuses the upload", found=said)
    return None


def refuses_copies(repo_id: str, error: Exception) -> bool:
    """Whether an error of a commit to ``repo_id`` is of the copies in it, not of the commit itself.

    The Hub's route for copies is one of the source, so such errors name the source.
    """
    if isinstance(error, HfHubHTTPError):
        path = error.response.url.path
        listing = "/paths-info/" in path and f"/{repo_id}/" not in path
        return listing or path.endswith("/lfs-files/duplicate")
    missing = isinstance(error, (FileDuplicationError, EntryNotFoundError))
    return missing or "no xet hash" in str(error)


def _of_status(repo_id: str, status: int, said: str) -> PublishError:
    """The ``PublishError`` for an answer of the Hub, by its HTTP status and its text."""
    plain = re.match(r"(?:Client|Server) error '\d+ (.*?)' for url", said)
    said = " ".join((plain[1] if plain else said).split())[:200]
    if status in (402, 413) or (status in (400, 403, 422) and _FULL.search(said)):
        return _full(repo_id, said)
    if status == 401:
        return PublishError("the Hub does not accept the token", hint=_LOG_IN)
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
            f"{repo_id} was changed by somebody else meanwhile", found=said or None, hint=_AGAIN
        )
    if status == 429:
        return PublishError(
            f"{repo_id}: too many requests for the Hub's rate limit", found="429 again and again",
            hint=f"wait some minutes, then {_AGAIN}",
        )  # fmt: skip
    if status >= 500:
        return PublishError(
            f"{repo_id}: the Hub failed", found=f"{status} {said}".strip(), hint=f"later, {_AGAIN}"
        )
    return PublishError(f"{repo_id}: the Hub refuses the upload", found=f"{status} {said}".strip())


def _full(repo_id: str, said: str) -> PublishError:
    return PublishError(
        f"{repo_id}: the Hub has no room for this", found=said or None,
        hint="free storage, choose --public or another account; nothing was committed",
    )  # fmt: skip
