"""The command ``gloss push``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from converter.cli.command import Answer, Console, command, quiet_libraries
from converter.cli.convert import published_text
from converter.cli.fields import Part
from converter.errors import OptionError
from converter.hub.publication import Publication
from converter.option import Option, Options
from converter.recipe import TrustRemoteCode


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions(Options):
    """What is published."""

    # fmt: off
    destination: Annotated[Path, Option(
        "Folder with a checkpoint or adapter.", flag="DESTINATION", path="folder", exists=True,
    )]
    trust_remote_code: TrustRemoteCode = False
    # fmt: on


@command(
    "push",
    asked=Part(PushOptions),
    wanted=Part(Publication),
    console=Part(Console, without=("cache_dir",)),
)
def push_command(asked: PushOptions, wanted: Publication) -> Answer:
    """Publish the checkpoint DESTINATION as the model REPO of the Hugging Face Hub, in one commit.

    It is verified first. The token is that of HF_TOKEN, of 'hf auth login', or of a job that is a
    trusted publisher; it is never an argument.
    """
    from converter.entrypoints.push import push
    from converter.hub.permissions import check_rights

    quiet_libraries()
    if not wanted.repo_id.strip():
        raise OptionError("REPO", expected="a repo id such as owner/name", found="nothing")
    published = push(asked.destination, check_rights(wanted, "REPO"), asked.trust_remote_code)
    text = f"{asked.destination}{published_text(published)}"
    return Answer({"destination": str(asked.destination), **published.record()}, text)
