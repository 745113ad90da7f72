"""Where a checkpoint is to be published, and whether it may be; asked before anything is done."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from converter.errors import OptionError, PublishError
from converter.hub.errors import plain_refusals
from converter.hub.publication import Publication
from converter.hub.repos import check_repo_id
from converter.runtime import progress
from converter.text import redact_log, redacted

WRITES = ("repo.write", "repo.content.write")
"""Permissions of a fine-grained token, either of which lets it write."""


def check_rights(asked: Publication, option: str) -> Publication:
    """Ask the Hub whether ``asked`` can be done, which takes seconds. Nothing is changed.

    The visibility of a repo that exists is noted.

    Args:
        asked: as typed.
        option: that the repo was given with, for messages.

    Returns:
        the same with the whole name of the repo, and whether it exists.

    Raises:
        OptionError: not the name of a repo, or options that exclude each other.
        PublishError: no token, a read-only one, no right to write there, or no Hub.
    """
    if asked.create_pr and asked.branch is not None:
        raise OptionError(
            "--create-pr", expected="no --branch", found=f"--branch {asked.branch}",
            hint="the Hub opens pull requests against the main branch",
        )  # fmt: skip
    check_repo_id(option, asked.repo_id)
    if redacted(asked.repo_id) != asked.repo_id:
        raise OptionError(option, expected="a repo id such as owner/name", found="a token")
    quiet_client()
    with plain_refusals(asked.repo_id):
        if constants.is_offline_mode():
            raise OfflineModeIsEnabled
        if get_token() is None:
            raise LocalTokenNotFoundError
        api, repo_id = HfApi(), asked.repo_id
        trusted = bool(os.environ.get("HF_OIDC_RESOURCE"))  # whose token is for a repo, not a user
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
                raise  # such a job may write to a repo, and not make one
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
    """Refuse what the Hub's answer to "who am I" rules out.

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
        return  # anybody who can read may propose
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
        if not any(set(WRITES) & set(scope.get("permissions") or ()) for scope in granted):
            raise PublishError(
                f"{name} may not write to {asked.repo_id}", expected="the permission repo.write",
                hint="give it on https://huggingface.co/settings/tokens",
            )  # fmt: skip


def open_repo(place: Publication) -> None:
    """Make the repo and the branch where they are missing; the visibility of one is left alone."""
    api = HfApi()
    if not place.exists:
        api.create_repo(place.repo_id, private=place.private is not False, exist_ok=True)
    if place.branch not in (None, "main") and not str(place.branch).startswith("refs/"):
        api.create_branch(place.repo_id, branch=str(place.branch), exist_ok=True)


def quiet_client() -> None:
    """No bars of the client where there are none of ours, and no tokens in what it logs."""
    redact_log("huggingface_hub")
    if not progress.current().shows_bars:
        disable_progress_bars()
