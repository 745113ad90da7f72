"""The command ``gloss push``, and the options with which a conversion is published."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.environment import FromEnvironment
from converter.cli.options import (
    EXIT_CODES,
    Command,
    plain_exit,
    print_json,
    quiet_libraries,
    refuse_settings,
)
from converter.cli.terminal import reporting
from converter.errors import OptionError
from converter.runtime.console import say

if TYPE_CHECKING:
    from converter.entrypoints.push import Published
    from converter.entrypoints.stream_push import Streaming
    from converter.hub.permissions import Publication

DETAILS = ("private", "branch", "create_pr", "message")
"""Parameters that say how to publish."""


def publishing_options(command: Command) -> Command:
    """The options that say how to publish."""
    options = [
        click.option(
            "--private/--public", default=None,
            help="Visibility of a repo that is made.  [default: private]",
        ),
        click.option("--branch", help="To commit to, made if it is missing.  [default: main]"),
        click.option("--create-pr", is_flag=True, help="Open a pull request instead."),
        click.option("--message", help="Of the commit."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def hub_options(command: Command) -> Command:
    """The options of a conversion that is published."""
    options = [
        click.option("--push-to-hub", metavar="REPO", help="Publish the result; see gloss push."),
        click.option(
            "--stream-to-hub", is_flag=True,
            help="Publish each shard once it is finished and delete it here; needs --push-to-hub.",
        ),
    ]  # fmt: skip
    command = publishing_options(command)
    for option in reversed(options):
        command = option(command)
    return command


class Publishing:
    """What a conversion does about the Hub: it asks first, and publishes last.

    Args:
        repo: of ``--push-to-hub``, or None.
        streamed: of ``--stream-to-hub``.
        details: the other options.

    Attributes:
        place: where to publish, or None.
        stream: for ``convert``, or None.

    Raises:
        OptionError, PublishError: see ``check_rights``.
    """

    def __init__(self, repo: str | None, streamed: bool, details: dict[str, Any]) -> None:
        self.place: Publication | None = None
        self.stream: Streaming | None = None
        if repo is None:
            refuse_settings(
                (*DETAILS, "stream_to_hub"), "without --push-to-hub REPO", "add --push-to-hub REPO"
            )
            return
        from converter.entrypoints import stream_push as stream
        from converter.hub import permissions as publication

        asked = publication.Publication(repo_id=repo, **details)
        self.place = publication.check_rights(asked, "--push-to-hub")
        if streamed:
            self.stream = stream.Streaming(self.place)

    @property
    def may_be_done(self) -> bool:
        """Whether a checkpoint at the destination may serve instead of a new one."""
        return self.stream is None

    def finish(self, destination: Path, trust: bool) -> "Published | None":
        """Publish what is verified, unless it is published already or is not to be."""
        from converter.entrypoints.push import push

        if self.place is None or self.stream is not None:
            return self.stream.published if self.stream else None
        return push(destination, self.place, trust, verified=True)


def published_text(published: "Published | None") -> str:
    """A line of the summary."""
    return f"\n  published     {published.pull_request or published.url}" if published else ""


@click.command("push", cls=FromEnvironment, epilog=EXIT_CODES)
@click.argument("destination", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo")
@publishing_options
@click.option("--trust-remote-code", is_flag=True, help="Execute code of the checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON.")
@click.option("--quiet", is_flag=True, help="No progress, only warnings and results.")
def push_command(
    destination: Path,
    repo: str,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **details: Any,
) -> None:
    """Publish the checkpoint DESTINATION as the model REPO of the Hugging Face Hub, in one commit.

    It is verified first. The token is that of HF_TOKEN, of 'hf auth login', or of a job that is a
    trusted publisher; it is never an argument.
    """
    with plain_exit(as_json), reporting(quiet=quiet):
        from converter.entrypoints.push import push
        from converter.hub.permissions import Publication, check_rights

        quiet_libraries()
        if not repo.strip():
            raise OptionError("REPO", expected="a repo id such as owner/name", found="nothing")
        place = check_rights(Publication(repo_id=repo, **details), "REPO")
        published = push(destination, place, trust_remote_code)
        if as_json:
            print_json({"destination": str(destination), **published.record()})
        else:
            say(f"{destination}{published_text(published)}")
