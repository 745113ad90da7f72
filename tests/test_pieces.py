"""A stopped run goes on from the batch where it stopped, and writes the same bytes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from converter.evaluation import continuations
from converter.models import course, resident, streamed
from converter.models.pieces import Pieces, keeping, pieces_of, under
from converter.runtime.cache import using_cache
from tests.builders.invoke import Cli
from tests.builders.planted import planted_args
from tests.test_resume import content

STOPPED = 77
"""An exit code of no other reason."""


class Calls:
    """Counts the batches that go through the model, or through a layer of a streamed one, and stops
    the run before one of them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.last = 0, -1
        for module, name in ((resident, "call"), (streamed, "call"), (continuations, "_continue")):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any) -> Any:
            if self.done == self.last:
                raise SystemExit(STOPPED)
            self.done += 1
            return run(*given)

        return counted

    def until(self, last: int = -1) -> None:
        self.done, self.last = 0, last


def arguments(planted: Path, folder: Path, forward: str) -> tuple[object, ...]:
    cache = ("--cache-dir", folder / "cache")
    pairs = ("--num-pairs", 60, "--guard-draws", 1)
    return (
        planted,
        folder / "out",
        *planted_args(planted, None),
        *pairs,
        *cache,
        "--forward",
        forward,
    )


@pytest.mark.parametrize("forward", ["resident", "streamed"])
def test_a_stopped_run_goes_on_from_its_last_batch(
    forward: str, planted: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A streamed model goes on from the last layer, but begins anew in a pass with gradients."""
    monkeypatch.setattr(course, "_EVERY", 0.0)
    calls, whole, stopped = Calls(monkeypatch), tmp_path / "whole", tmp_path / "stopped"
    cli("convert", *arguments(planted, whole, forward), code=0)
    batches, spent = calls.done, 0
    for share in (0.1, 0.6) if forward == "resident" else (0.6, 0.8):
        calls.until(int(batches * share) - spent)
        cli("convert", *arguments(planted, stopped, forward), code=STOPPED)
        spent += calls.done
    calls.until()
    said = cli("convert", *arguments(planted, stopped, forward), code=0)
    assert "continuing from the results of a stopped run" in said.stderr
    assert content(stopped / "out") == content(whole / "out")
    assert spent + calls.done < batches * 1.2
    assert not [*(stopped / "cache" / "pieces").iterdir()]


@pytest.fixture
def pieces(tmp_path: Path) -> Iterator[Pieces]:
    with using_cache(tmp_path), keeping("run") as found:
        found.module = nn.Linear(2, 2)
        yield found


def test_a_piece_is_found_by_everything_that_it_depends_on(pieces: Pieces) -> None:
    ids, other = torch.tensor([[1, 2]]), torch.tensor([[1], [2]])
    module = pieces.module
    assert module is not None
    names = [pieces.name("a", ids), pieces.name("b", ids), pieces.name("a", other)]
    names += [pieces.name("a", ids.int()), pieces.name("a", ids, 1)]
    for digest in ("one", "two"):
        with under(module, digest):
            names.append(pieces.name("a", ids))
            with under(module, "one"):
                names.append(pieces.name("a", ids))
    assert pieces.name("a", ids) == names[0]
    module.to(torch.bfloat16)
    names.append(pieces.name("a", ids))
    assert len({*names}) == len(names)
    assert pieces_of(nn.Linear(2, 2)) is None


def test_a_piece_that_was_half_written_is_made_again(tmp_path: Path) -> None:
    def stopped_run(data: bytes | None) -> None:
        with keeping("run") as found:
            assert "piece" not in found
            found.put("piece", {"x": torch.ones(3)})
            if data is not None:
                (found.folder / "piece").write_bytes(data)
            raise InterruptedError

    with using_cache(tmp_path):
        for data in (b"", b"x" * 100, None):
            with pytest.raises(InterruptedError):
                stopped_run(data)
        with keeping("run") as found:
            made = found.made("piece", lambda: {"x": torch.zeros(3)})
            assert torch.equal(made["x"], torch.ones(3))


def test_a_second_run_at_the_same_time_has_pieces_of_its_own(pieces: Pieces) -> None:
    pieces.put("piece", {"x": torch.ones(1)})
    with keeping("run") as other:
        assert "piece" not in other
        other.put("piece", {"x": torch.zeros(1)})
    assert pieces.get("piece")["x"] == 1
    assert not other.folder.exists()
