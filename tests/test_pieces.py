"""A stopped run goes on from the batch where it stopped, and writes the same bytes."""

import errno
import gc
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from converter.calibration import gradients
from converter.calibration.word_list import load_words
from converter.entrypoints.convert import prepare
from converter.errors import DestinationError
from converter.evaluation import continuations
from converter.methods import workbench
from converter.methods.workbench import Bench
from converter.models import course, resident, streamed
from converter.models.batching import Batch, Encoder, token_batches
from converter.models.likelihood import log_probabilities
from converter.models.pieces import Pieces, keeping, pieces_of, temporary_pieces, under
from converter.models.resident import Model
from converter.runtime.cache import using_cache
from tests.builders.invoke import Cli
from tests.builders.models import LAYERS, Checkpoints, tiny_recipe
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
    args = (*planted_args(planted, None), *pairs, *cache, "--forward", forward)
    return (planted, folder / "out", *args)


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


def test_a_stopped_evaluation_goes_on(
    planted: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, prompts = Calls(monkeypatch), tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["w1 w2 fucking", "w3 damn", "w4 w5", "w6 w7 w8"] * 2))
    asked = (
        planted, *planted_args(planted), "--num-pairs", 60, "--system", "gloss", "--prompts",
        prompts, "--scorer", "bad-words", "--max-new-tokens", 4, "--generation-batch-size", 4,
        "--passages", 2, "--json",
    )  # fmt: skip
    whole = cli("evaluate", *asked, "--cache-dir", tmp_path / "whole", code=0)
    batches = calls.done
    calls.until(batches - 3)
    cli("evaluate", *asked, "--cache-dir", tmp_path / "stopped", code=STOPPED)
    calls.until()
    again = cli("evaluate", *asked, "--cache-dir", tmp_path / "stopped", code=0)
    assert again.stdout == whole.stdout
    assert calls.done == 3


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
            assert "piece" in found
            assert torch.equal(found.get("piece")["x"], torch.ones(3))


def test_a_second_run_at_the_same_time_has_pieces_of_its_own(pieces: Pieces) -> None:
    pieces.put("piece", {"x": torch.ones(1)})
    with keeping("run") as other:
        assert "piece" not in other
        other.put("piece", {"x": torch.zeros(1)})
    assert pieces.get("piece")["x"] == 1
    assert not other.folder.exists()


def stopped(key: str, days: float = 0.0) -> Path:
    """The folder of a run that was stopped so many days ago."""
    with suppress(InterruptedError), keeping(key) as found:
        found.put("piece", {"x": torch.ones(1)})
        raise InterruptedError
    then = time.time() - days * 24 * 3600
    os.utime(found.folder, (then, then))
    return found.folder


def test_pieces_are_deleted_after_a_day_unless_their_run_goes_on(tmp_path: Path) -> None:
    with using_cache(tmp_path), keeping("long") as long:
        long.put("piece", {"x": torch.ones(1)})
        with temporary_pieces() as own:
            own.put("piece", {"x": torch.ones(1)})
            folders = [stopped("yesterday", 0.9), stopped("old", 2), stopped("older", 2)]
            for each in (long, own):
                os.utime(each.folder, (0, 0))
            with keeping("older") as found:
                assert "piece" in found
                assert [folder.exists() for folder in folders] == [True, False, True]
            assert "piece" in long
            assert own.get("piece")["x"] == 1
    assert [*(tmp_path / "pieces").iterdir()] == [folders[0]]


def test_only_the_user_can_read_pieces(pieces: Pieces) -> None:
    with temporary_pieces() as own:
        for each in (pieces, own):
            assert each.folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_pieces_that_cannot_be_used_is_not(tmp_path: Path) -> None:
    """Such as that of another user."""
    with using_cache(tmp_path):
        folder = stopped("run")
        (folder / "lock").unlink()
        (folder / "lock").mkdir()
        with keeping("run") as found:
            assert found.folder != folder
            assert "piece" not in found
    assert (folder / "piece").exists()
    assert [*folder.parent.iterdir()] == [folder]


@pytest.mark.parametrize("full", ["write_bytes", "mkdir"])
def test_a_disk_that_is_full_is_told_in_a_sentence(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run() -> None:
        with keeping("run") as found:
            found.put("piece", {"x": torch.ones(1)})

    with using_cache(tmp_path):
        (tmp_path / "pieces").mkdir()
        monkeypatch.setattr(Path, full, fails)
        with pytest.raises(DestinationError, match=r"the cache .* cannot be written") as error:
            run()
    assert "No space left" in str(error.value)


def test_pieces_that_are_there_do_not_count_as_a_full_disk(
    pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped run must find room for what it has kept already."""
    disk = SimpleNamespace(free=4_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    room = pieces.room()
    pieces.put("piece", {"x": torch.ones(500_000)})
    disk.free -= (pieces.folder / "piece").stat().st_size
    assert pieces.room() == room == 2_000_000


def bench_of(checkpoints: Checkpoints, **changes: Any) -> Bench:
    recipe = tiny_recipe(checkpoints("llama"), **changes)
    source, plan, _ = prepare(recipe)
    return Bench.of(recipe, source, plan, load_words("builtin"), "cpu")


def test_a_model_is_released_before_another_is_loaded(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models at a time would take twice the memory."""
    bench, gone = bench_of(checkpoints, guard=True), list[bool]()
    with using_cache(tmp_path), suppress(InterruptedError), bench.keeping():
        first = weakref.ref(bench.load().module)

        def load(*given: Any) -> Any:
            gc.collect()
            gone.append(first() is None)
            raise InterruptedError

        monkeypatch.setattr(workbench, "load_language_model", load)
        bench.load(torch.bfloat16)
    assert gone == [True]
    assert bench.pieces is None


def batches_of(model: Model, texts: Sequence[str]) -> list[Batch]:
    encode = Encoder(model.tokenizer, model.module)
    return [batch for text in texts for batch in token_batches([encode.predicted(text)], 64, "cpu")]


@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_gradients_of_a_stopped_run_come_as_in_a_whole_one(
    way: str, checkpoints: Checkpoints, pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch has each layer once, even if two batches are the same."""
    model = bench_of(checkpoints, forward=way).load()
    pieces.module = model.module
    batched = batches_of(model, ["one text to read", "and another one", "one text to read"])
    modules = {layer: model.architecture.sites(layer) for layer in (1, 3)}
    whole = [*gradients.gradients(model, modules, batched)]
    calls = Calls(monkeypatch)
    calls.until(1)
    with pytest.raises(SystemExit):
        [*gradients.Remembered(pieces)(model, modules, batched)]
    for left in (True, False, False):  # then all is read
        calls.until()
        remembered = gradients.Remembered(pieces)
        found = [*remembered(model, modules, batched)]
        assert (calls.done > 0) == left
        assert sorted(map(at, found)) == sorted(map(at, whole))
        for layer in modules:  # a sum over batches must not depend on what was kept
            assert [number for number, of, *_ in found if of == layer] == [0, 1, 2]
    assert [of for _, of, *_ in found] == ([1] * 3 + [3] * 3)[:: 1 if way == "resident" else -1]
    remembered.drop()
    assert [path.name for path in pieces.folder.iterdir()] == ["lock"]


def at(found: tuple[int, int, torch.Tensor, torch.Tensor]) -> tuple[Any, ...]:
    number, layer, f, g = found
    return number, layer, f.tolist(), g.tolist()


@pytest.mark.parametrize("has_room", [True, False])
def test_hidden_states_are_kept_if_the_disk_has_room_for_them(
    has_room: bool, checkpoints: Checkpoints, pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them, a stopped pass begins anew; and a pass that came to its end is not needed."""
    monkeypatch.setattr(course, "_EVERY", 0.0)
    monkeypatch.setattr(Pieces, "room", lambda _: has_room * 1_000_000)
    model = bench_of(checkpoints, forward="streamed").load()
    pieces.module = model.module
    texts = [[Encoder(model.tokenizer, model.module)("one text to read", "mean", ())]]
    calls = Calls(monkeypatch)
    calls.until(LAYERS)  # only the head is left
    with pytest.raises(SystemExit):
        log_probabilities(model, texts)
    for left in ((1 if has_room else LAYERS + 1), 0):
        calls.until()
        log_probabilities(model, texts)
        assert calls.done == left
