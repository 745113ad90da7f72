"""Where and how a checkpoint is published."""

from dataclasses import dataclass
from typing import Annotated

from converter.option import Option, Options


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicationOptions(Options):
    """How a result is published."""

    # fmt: off
    private: Annotated[bool | None, Option(
        "Visibility of a repo that is made; one that exists keeps its own.",
        flag="--private/--public", by_default="private",
    )] = None
    branch: Annotated[str | None, Option(
        "Branch to commit to; it is made if it is missing.", by_default="main", example="detox",
    )] = None
    create_pr: Annotated[bool, Option("Open a pull request instead.")] = False
    message: Annotated[str | None, Option(
        "Message of the commit.", by_default="one that names the source", example="Rank 2",
    )] = None
    # fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication(PublicationOptions):
    """Where a result is published, and how.

    Attributes:
        repo_id: ``owner/name``; without an owner, that of the token.
        exists: whether the repo is there; known after ``publishing.check_rights``.
    """

    repo_id: str
    exists: bool = False
