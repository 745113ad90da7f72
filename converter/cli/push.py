"""The command ``gloss push``."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from converter.cli.command import Answer, Console, command, quiet_libraries
from converter.cli.convert import published_text
from converter.cli.fields import Part
from converter.errors import OptionError
from converter.hub.publication import Publication, PublicationOptions
from converter.option import Option, Options
from converter.recipe import TrustRemoteCode


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions(Options):
    """What is published, and where to."""

    # fmt: off
    destination: Annotated[Path, Option(
        "Folder with a checkpoint or adapter.", flag="DESTINATION", path="folder", exists=True,
    )]
    repo_id: Annotated[str, Option(
        "Repo of the Hub, such as owner/name; the owner is that of the token unless it is given.",
        flag="REPO",
    )]
    trust_remote_code: TrustRemoteCode = False
    # fmt: on


@command(
    "push",
    asked=Part(PushOptions),
    how=Part(PublicationOptions),
    console=Part(Console, without=("cache_dir",)),
)
def push_command(asked: PushOptions, how: PublicationOptions) -> Answer:
    """Publish the checkpoint DESTINATION as the model REPO of the Hugging Face Hub, in one commit.

    It is verified first. The token is that of HF_TOKEN, of 'hf auth login', or of a job that is a
    trusted publisher; it is never an argument.
    """
    from converter.entrypoints.push import push
    from converter.hub.publishing import check_rights

    quiet_libraries()
    if not asked.repo_id.strip():
        raise OptionError("REPO", expected="a repo id such as owner/name", found="nothing")
    place = check_rights(Publication(repo_id=asked.repo_id, **asdict(how)), "REPO")
    published = push(asked.destination, place, asked.trust_remote_code)
    text = f"{asked.destination}{published_text(published)}"
    return Answer({"destination": str(asked.destination), **published.record()}, text)
