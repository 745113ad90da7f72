"""Names of Hub repos: an id, a pasted address, or a folder of the client's cache.

Only this module reads them. Records and messages have the short form: owner/name@revision.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

from converter.errors import CheckpointError, OptionError, SourceError
from converter.hub.store_addresses import is_store, store_address
from converter.recipe import Recipe

Kind = Literal["model", "dataset"]

REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[^\s@]+)?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")

_SSH = re.compile(r"(?:ssh://)?git@([\w.-]+)[:/]")
_HOST = re.compile(r"(?i)(?:www\.)?(?:huggingface\.co|hf\.co)(?:/|$)")
_ROUTES = ("tree", "blob", "resolve", "raw", "blame")
"""Parts of an address between a repo id and a revision; all except the first lead to files."""

_OF_HUB = re.compile(  # without a host
    rf"[\w.-]+/[\w.-]+/(?:{'|'.join(_ROUTES)})/[^/]+.*"
    r"|datasets/[\w.-]+/(?!.*\.(?:jsonl|tsv|csv|txt)$)[\w.-]+(?:@[^\s@]+)?"
)
_FILE = re.compile(rf"/(?:{'|'.join(_ROUTES[1:])})/|\.(?:json|safetensors|bin|pth|model|md|txt)$")
_NO_OWNER = "no-owner"
"""Placeholder for the owner, which old names such as gpt2 lack and the client's parser requires."""


@dataclass(frozen=True, slots=True)
class Address:
    """A place on the Hub.

    Attributes:
        kind: of the repo: a ``Kind``, or another kind, which is never returned.
        path: of a file or folder in the repo, or empty.
    """

    kind: str
    repo_id: str
    revision: str | None = None
    path: str = ""

    @property
    def name(self) -> str:
        """The repo id, with the revision if there is one."""
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    @property
    def text(self) -> str:
        """The whole place, in the form that ``parse_address`` reads."""
        return f"hf://{self.kind}s/{self.name}/{self.path}" if self.path else self.name


def looks_like_repo(text: str) -> bool:
    """Whether ``text`` can be a repo id with an optional ``@revision``, rather than a path."""
    return REPO_ID.fullmatch(text) is not None and not text.startswith(".")


def is_address(text: str) -> bool:
    """Whether ``text`` is meant as an address of any server, and not as a path."""
    if os.path.exists(text):  # noqa: PTH110 - pathlib's raises if the name is too long
        return False
    return (
        "://" in text
        or any(known.match(text) for known in (_HOST, _SSH))
        or (_OF_HUB.fullmatch(text) is not None)
    )


def parse_address(text: str, kind: Kind) -> Address:
    """The place on the Hub that a repo id or an address names.

    Args:
        text: a repo id with an optional ``@revision``, or an address as pasted from the browser: of
            the page of a repo, a folder or a file, of a clone, or one with ``hf://``.
        kind: the wanted kind of repo.

    Raises:
        SourceError: it names no repo, or one of another kind.
    """
    if is_address(text):
        found = _parse(text)
        if found.kind != kind:
            raise SourceError(f"{text} is a {found.kind} of the Hub", expected=f"a {kind}")
        return found
    if looks_like_repo(text):
        repo_id, _, revision = text.partition("@")
        return Address(kind, repo_id, revision or None)
    hint, repo_id = "check the path", text.removeprefix("models/")
    if "/" in repo_id and looks_like_repo(repo_id):
        hint += f", or give {repo_id} for the repo of the Hub"
    elif not text.startswith(("/", "~", ".")):
        hint += ", or give a repo of the Hub as owner/name@revision"
    raise SourceError(f"{text} does not exist", hint=hint)


def _parse(text: str) -> Address:
    """The place that an address names, of any kind."""
    from huggingface_hub import parse_hf_uri  # a quarter of a second, as those below
    from huggingface_hub.errors import HfUriError

    known = f"hf.co/{text}" if _OF_HUB.fullmatch(text) else _SSH.sub(r"https://\1/", text)
    try:
        url = urlsplit(known if "://" in known else f"https://{known}")
    except ValueError as error:  # such as brackets that are no IPv6 address
        raise _not_understood(text, "", "") from error
    host, is_uri = (url.hostname or "").removeprefix("www."), url.scheme == "hf"
    parts = [part for part in url.path.removesuffix(".git").split("/") if part]
    if is_uri:
        parts.insert(0, url.netloc)
    place = int(bool(parts) and parts[0] in constants.HF_URI_TYPE_PREFIXES)
    if len(parts) == place + 1 or (len(parts) > place + 1 and parts[place + 1] in _ROUTES):
        parts.insert(place, _NO_OWNER)
    try:
        found = parse_hf_uri(
            f"{'hf:/' if is_uri else f'https://{host}'}/{'/'.join(parts)}", constants.ENDPOINT
        )
    except (HfUriError, ValueError) as error:
        raise _not_understood(text, url.scheme, host) from error
    revision, path = found.revision, found.path_in_repo.rstrip("/")
    if "@" in (revision or ""):
        raise SourceError(f"{text} names two revisions", hint="leave out one")
    if {".", "..", ""} & {*path.split("/")} and path:
        raise SourceError(f"{text} leads out of the repo", hint="check the path")
    return Address(found.type, found.id.removeprefix(f"{_NO_OWNER}/"), revision, path)


def _not_understood(text: str, scheme: str, host: str) -> SourceError:
    """The error about an address that names no repo."""
    expected = (
        "https://huggingface.co/owner/name, owner/name@revision, s3://bucket/prefix or a path"
    )
    if scheme == "file":
        path = unquote(urlsplit(text).path)
        return SourceError(f"{text} is the address of a path", hint=f"give the path: {path}")
    if scheme == "hf" or host in {*constants.HF_URL_HOSTS, urlsplit(constants.ENDPOINT).hostname}:
        what = f"{text} is not the address of a repo, folder or file on the Hub"
        return SourceError(what, expected=expected, hint="copy the address of the model's page")
    return SourceError(
        f"{text} is not an address on the Hugging Face Hub or of a store", expected=expected,
        found=f"the server {host}" if scheme in ("http", "https") else scheme or None,
        hint="download the model and give its folder; if this is a Hub, set HF_ENDPOINT",
    )  # fmt: skip


def repo_named(option: str, text: str) -> str:
    """The repo that an option names, without a revision and a path.

    Raises OptionError.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        found = Address("model", text)
        if is_address(text):
            found = parse_address(text, "model")
        validate_repo_id(found.repo_id)
    except (SourceError, HFValidationError) as error:
        raise OptionError(option, expected="a repo id such as owner/name", found=text) from error
    if found.path or found.revision not in (None, constants.DEFAULT_REVISION):
        raise OptionError(option, expected="a repo, without revision and path", found=text)
    return found.repo_id


def model_place(source: str, subfolder: str = "") -> tuple[str, str]:
    """A source and its subfolder, in the short form if it is an address.

    The address of a file means the folder of that file. A folder in a snapshot of the Hub's client
    is a subfolder of the snapshot.

    Raises:
        SourceError: the address is none of a model.
        CheckpointError: it is that of a GGUF file.
        OptionError: it names another folder than ``subfolder``.
    """
    if os.path.isdir(source) and (kept := snapshot_of(Path(source))) and kept.path:  # noqa: PTH112
        top = Path(source).resolve().parents[kept.path.count("/")]
        return str(top), str(PurePosixPath(kept.path, subfolder))
    if not is_address(source):
        return source, subfolder
    if is_store(source):
        return store_address(source), subfolder
    found = parse_address(source, "model")
    path, file = found.path, PurePosixPath(found.path)
    if path.endswith(".gguf"):
        raise CheckpointError(
            f"{path} of {found.repo_id} is on the Hub, and a GGUF file is read from disk",
            hint=f"fetch it with: hf download {found.repo_id} {path}; then give its path as SOURCE",
        )
    if path and _FILE.search(urlsplit(source).path):
        path = "" if file.parent == PurePosixPath() else str(file.parent)
    if path and subfolder and PurePosixPath(subfolder) != PurePosixPath(path):
        raise OptionError(
            "--subfolder", expected=f"{path}, which SOURCE names, or none", found=subfolder
        )
    return found.name, path or subfolder


def settled(recipe: Recipe) -> Recipe:
    """A recipe with the short form of every address in it, as a manifest records it.

    Raises:
        SourceError, CheckpointError, OptionError: an address names something else.
    """
    source, subfolder = model_place(recipe.source, recipe.subfolder)
    base = recipe.base_model
    return replace(
        recipe,
        source=source,
        subfolder=subfolder,
        pairs=_short(recipe.pairs),
        instances=_short(recipe.instances),
        prompts=_short_prompts(recipe.prompts),
        base_model=None if base is None else repo_named("--base-model", base),
    )


def _short(data: str) -> str:
    """A name of data, in the short form if it is the address of a dataset."""
    return parse_address(data, "dataset").text if is_address(data) else data


def _short_prompts(origin: str) -> str:
    """The same of prompts, whose address may be followed by ``#FIELD``."""
    if Path(origin).exists():
        return origin
    address, sign, field = origin.partition("#")
    return _short(address) + sign + field


def snapshot_of(folder: Path) -> Address | None:
    """The repo, commit and folder of a path in the cache of the Hub's client, by its name.

    None if it is not in ``models--OWNER--NAME/snapshots/COMMIT``.
    """
    parts = folder.resolve().parts
    for place in range(len(parts) - 2, 0, -1):
        name, middle, commit = parts[place - 1 : place + 2]
        repo_id = name.removeprefix("models--").replace("--", "/")
        if middle == "snapshots" and name.startswith("models--") and COMMIT.fullmatch(commit):
            inside = "/".join(parts[place + 2 :])
            return Address("model", repo_id, commit, inside) if looks_like_repo(repo_id) else None
    return None
