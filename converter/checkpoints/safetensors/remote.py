"""The header of a safetensors file on the Hub, by range requests.

Not by ``HfFileSystem``: it holds all that is sent (``Response.content``), however little it asked
for, and takes the whole file of a server without ranges for the range; its streams ask for no end.
"""

from huggingface_hub import hf_hub_url

from converter.checkpoints.safetensors.header import Header, length_of, parse_header
from converter.errors import SourceError
from converter.hub.limits import read_range
from converter.hub.repos import Repo, plain_errors

FIRST = 100_000
"""Bytes of a shard that are asked for first: nearly all headers end in them."""


def remote_header(repo: Repo, name: str) -> Header:
    """The header of one safetensors file, by range requests; no weights are fetched.

    Raises:
        SourceError: see ``plain_errors``; or the file breaks off.
        CheckpointError: it is not well-formed safetensors.
    """
    size = repo.sizes[name]
    start = _range(repo, name, 0, min(FIRST, size))
    length = length_of(start[:8], size, name)
    if 8 + length > len(start):
        start += _range(repo, name, len(start), 8 + length)
    return parse_header(start[8 : 8 + length], size, name)


def _range(repo: Repo, name: str, start: int, end: int) -> bytes:
    """Bytes of a file at the commit."""
    url = hf_hub_url(repo.repo_id, name, repo_type=repo.kind, revision=repo.commit)
    with plain_errors(repo.kind, repo.repo_id):
        found = read_range(url, start, end)
    if len(found) < end - start:
        raise SourceError(
            f"{name} of {repo.kind} {repo.repo_id} breaks off",
            expected=f"{repo.sizes[name]:,} bytes, as the Hub lists",
            found=f"the end after {start + len(found):,}",
            hint="run again",
        )
    return found
