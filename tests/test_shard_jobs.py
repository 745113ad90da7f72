"""Shards are edited in other processes as in threads: the same bytes, records and errors."""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.rewrite import rewrite
from converter.checkpoints.source import Source
from converter.edits.base import Edit
from converter.edits.deltas import AddBits, AddLowRank, AddToRows, Delta, RemoveSubspace, Replace
from converter.edits.engine import Engine
from converter.errors import CheckpointError, OptionError, SourceError
from converter.methods.behind_norm import removal_behind
from converter.outputs.base import WriteJob, Written
from converter.outputs.checkpoint import shard_job
from converter.outputs.checkpoint.write import jobs_of, users_of, write_checkpoint
from converter.outputs.journal import Journal
from converter.runtime import progress
from tests.builders.edits import removal
from tests.builders.errors import refused
from tests.builders.models import FFN, HIDDEN, OTHER_LAYOUTS, TINY_MODELS, Checkpoints, planned
from tests.test_formats import as_pickles
from tests.test_quantization import BLOCKS, ROWS, WHOLE, as_fp8

LAYERS = (2, 3)


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


class Counting(Executor):
    """Gives its work to another executor, and counts it."""

    def __init__(self, inner: Executor) -> None:
        self.inner, self.count = inner, 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.count += 1
        return self.inner.submit(fn, *args, **kwargs)


def subspace(plan: Plan, rank: int = 3) -> Edit:
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(HIDDEN, rank))[0]
    return removal(plan, dict.fromkeys(LAYERS, U), bias=False)


def written(
    source: Source, plan: Plan, edit: Edit, folder: Path, executor: Executor | None, **more: Any
) -> Written:
    folder.mkdir(exist_ok=True)
    job = WriteJob(
        source=source, plan=plan, edit=edit, folder=folder, engine=Engine(workers=2),
        executor=executor, **more,
    )  # fmt: skip
    return write_checkpoint(job)


def check_same(source: Source, plan: Plan, edit: Edit, where: Path, pool: Executor) -> None:
    """Threads and processes write the same, and say the same of it."""
    assert edit.tensors
    ours = written(source, plan, edit, where / "threads", None)
    theirs = written(source, plan, edit, where / "processes", pool)
    assert ours == theirs
    for path in (where / "threads").iterdir():
        assert path.read_bytes() == (where / "processes" / path.name).read_bytes()
    assert len([*(where / "threads").iterdir()]) == len([*(where / "processes").iterdir()])


@pytest.mark.parametrize("kind", sorted(TINY_MODELS | OTHER_LAYOUTS))
def test_processes_write_what_threads_write(
    kind: str, checkpoints: Checkpoints, processes: Executor, tmp_path: Path
) -> None:
    source, plan = planned(checkpoints(kind))
    check_same(source, plan, subspace(plan), tmp_path, processes)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("scheme", [BLOCKS, ROWS, WHOLE], ids=["blocks", "rows", "whole"])
def test_an_fp8_weight_and_its_scales_are_one_job(
    scheme: dict[str, Any],
    apart: bool,
    checkpoints: Checkpoints,
    processes: Executor,
    tmp_path: Path,
) -> None:
    plain = checkpoints("qwen3", torch.bfloat16)
    source, plan = planned(as_fp8(plain, tmp_path / "fp8", scheme, apart=apart))
    counting = Counting(processes)
    check_same(source, plan, subspace(plan), tmp_path, counting)
    assert len(source.shards) == 1 + apart
    assert counting.count == 1


def test_shards_that_hang_together_are_one_job(checkpoints: Checkpoints) -> None:
    """A weight of the first has its scales in the second, and one of the second in the third."""
    source, plan = planned(checkpoints("llama"))
    first, second, third, *others = source.shards

    class Scaled:
        def __init__(self, shard: str, scales: str) -> None:
            self.shard, self.scales = shard, scales

    class Place:
        def __init__(self, shard: str) -> None:
            self.shard = shard

    weights: Any = [Scaled(first, second), Scaled(third, second)]
    for weight in weights:
        weight.scales = Place(weight.scales)
    users = users_of(source, weights)
    assert all(users[shard] == {first, second, third} for shard in (first, second, third))
    assert all(users[shard] == {shard} for shard in others)
    job = WriteJob(source=source, plan=plan, edit=Edit(), folder=Path(), engine=Engine())
    jobs = [job.source.shards for job in jobs_of(job, users, (), 1)]
    assert jobs == [(first, second, third), *((shard,) for shard in others)]


KINDS: dict[str, Callable[[], Delta]] = {
    "columns of a wider matrix": lambda: RemoveSubspace(torch.eye(HIDDEN)[:, :2]),
    "oblique": lambda: removal_behind(torch.eye(HIDDEN)[:, :2], torch.logspace(0, 2, HIDDEN), 0.5),
    "low rank": lambda: AddLowRank(torch.randn(HIDDEN, 2), torch.randn(2, FFN)),
    "rows": lambda: AddToRows(torch.tensor([0, 5]), torch.randn(FFN)),
    "dense": lambda: Replace(torch.randn(HIDDEN, FFN)),
    "bits": lambda: AddBits(
        torch.ones(HIDDEN, FFN, dtype=torch.int16), torch.empty(0, dtype=torch.bfloat16)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_change_is_sent(
    kind: str, checkpoints: Checkpoints, processes: Executor, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    source, plan = planned(checkpoints("llama", torch.bfloat16))
    names = [weight.info.name for weight in plan.weights("down_proj", LAYERS)]
    edit = Edit({name: KINDS[kind]() for name in names})
    check_same(source, plan, edit, tmp_path, processes)


def one_job(checkpoints: Checkpoints, edited: Callable[[Plan], Edit] = subspace) -> Any:
    """The job of a model of one shard."""
    source, plan = planned(checkpoints("llama", torch.float32, "1GB"))
    job = WriteJob(
        source=source, plan=plan, edit=edited(plan), folder=Path("/nowhere"), engine=Engine()
    )
    (found,) = jobs_of(job, users_of(source, job.weights), (), 1)
    return found


def test_a_job_has_the_tensors_of_its_edit_once_and_little_else(checkpoints: Checkpoints) -> None:
    """Neither the storage that a basis is cut from, nor the names of other tensors."""
    wide = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0].repeat(1, 200)
    job = one_job(checkpoints, lambda plan: removal(plan, dict.fromkeys(LAYERS, wide[:, :4])))
    data = shard_job.packed(job)
    assert len(data) < HIDDEN * 4 * 4 + 6_000
    back: Any = pickle.loads(data)
    bases = [edit.delta.U for edit in back.edits]
    assert len(bases) > 1
    assert all(basis is bases[0] for basis in bases)
    assert torch.equal(bases[0], wide[:, :4])


def test_a_job_that_is_too_large_is_refused(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_job, "LIMIT", 1000)
    with refused(
        OptionError,
        what="the job of model.safetensors is too large for another process",
        expected="at most 1,000 bytes beside the tensors of the edit",
        hint="edit it in threads",
    ):
        shard_job.packed(one_job(checkpoints))


def test_shards_that_are_made_are_not_sent(
    checkpoints: Checkpoints, processes: Executor, tmp_path: Path
) -> None:
    """Their recipes would take the model along."""
    source, plan = planned(as_pickles(checkpoints("llama"), tmp_path / "pickles", 3))
    with refused(
        OptionError,
        what="the shards of this source cannot be edited in other processes",
        expected="a checkpoint of safetensors files",
        found=".bin",
        hint="edit it in threads, or convert it to safetensors first",
    ) as caught:
        written(source, plan, subspace(plan), tmp_path / "out", processes)
    assert caught.value.exit_code == 2
    assert not [*(tmp_path / "out").iterdir()]


def damaged(folder: Path, plan: Plan) -> tuple[Path, dict[str, Tensor]]:
    """A copy's shard whose edited weight holds NaN by now, and what it held before."""
    (weight, *_) = plan.weights("down_proj", LAYERS[-1:])
    path = folder / weight.shard
    before = load_file(path)
    after = {name: tensor.clone() for name, tensor in before.items()}
    after[weight.info.name][0, 0] = torch.nan
    save_file(after, path, {"format": "pt"})
    return path, before


def test_an_error_in_a_job_is_that_of_a_thread(
    checkpoints: Checkpoints, processes: Executor, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    source, plan = planned(folder)
    path, _ = damaged(folder, plan)
    said = []
    for name, pool in (("threads", None), ("processes", processes)):
        with refused(
            CheckpointError,
            what=f"tensor ... of {path.name} holds NaN or Inf",
            hint="the source is damaged; get an intact copy",
        ) as caught:
            written(source, plan, subspace(plan), tmp_path / name, pool)
        said.append((str(caught.value), caught.value.exit_code))
        assert not (tmp_path / name / "config.json").exists()
    assert said[0] == said[1]


def test_a_job_that_was_begun_before_is_done_again(
    checkpoints: Checkpoints, processes: Executor, tmp_path: Path
) -> None:
    """A process that is lost may have written its shard, and half of it beside the folder."""
    source, plan = planned(checkpoints("llama"))
    for name in ("out", "out.parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / source.shards[1]).write_text("half")
    theirs = written(source, plan, subspace(plan), tmp_path / "out", processes)
    assert theirs == written(source, plan, subspace(plan), tmp_path / "whole", None)
    for shard in source.shards:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "whole" / shard).read_bytes()


def test_what_the_system_refuses_is_raised_as_it_was(
    checkpoints: Checkpoints, processes: Executor, tmp_path: Path
) -> None:
    source, plan = planned(checkpoints("llama"))
    (tmp_path / "out" / source.shards[1]).mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        written(source, plan, subspace(plan), tmp_path / "out", processes)


def test_threads_go_on_from_what_processes_have_finished(
    checkpoints: Checkpoints, processes: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    source, plan = planned(folder)
    edit, out = subspace(plan), tmp_path / "out"
    path, intact = damaged(folder, plan)
    journal = Journal(tmp_path / "journal", out, "key", source.digests)
    with refused(CheckpointError):
        written(source, plan, edit, out, processes, receiver=journal)
    finished = {name.name for name in out.glob("*.safetensors")} - {path.name}
    assert finished
    save_file(intact, path, {"format": "pt"})
    again = set()

    def note(reading: Any, target: Path, *args: Any) -> Any:
        again.add(target.name)
        return rewrite(reading, target, *args)

    monkeypatch.setattr(shard_job, "rewrite", note)
    found = written(source, plan, edit, out, None, receiver=journal)
    assert again == {*source.shards} - finished
    assert found == written(source, plan, edit, tmp_path / "whole", None)


class Deadly(Executor):
    """Its processes end before they have done anything."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.inner.submit(os._exit, 9)


def test_a_lost_process_is_one_sentence(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, plan = planned(checkpoints("llama"))
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
        refused(SourceError, what="a process that edits shards was lost") as caught,
    ):
        written(source, plan, subspace(plan), tmp_path / "out", Deadly(pool))
    assert caught.value.exit_code == 3


def test_a_gpu_that_is_out_of_memory_is_one_sentence(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan = planned(checkpoints("llama"))

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(shard_job, "rewrite", full)
    with refused(
        SourceError,
        what="the GPU is out of memory with the edit of ...",
        hint="give --workers 1, or --device cpu",
    ):
        written(source, plan, subspace(plan), tmp_path / "out", None)


def test_what_a_job_warns_of_is_told_by_the_run(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of a plain pool knows as little of the run as another process."""
    source, plan = planned(checkpoints("llama"))

    def doubtful(reading: Any, target: Path, *args: Any) -> Any:
        progress.warn(target.name)
        return rewrite(reading, target, *args)

    monkeypatch.setattr(shard_job, "rewrite", doubtful)
    with progress.recording() as told, ThreadPoolExecutor(2) as pool:
        written(source, plan, subspace(plan), tmp_path / "out", pool)
    assert sorted(told.warnings) == list(source.shards)


class Stuck(Executor):
    """Never begins the first job, and fails with the second."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.futures.append(Future())
        if len(self.futures) == 2:
            self.futures[1].set_exception(OSError("no"))
        return self.futures[-1]


def test_jobs_that_have_not_begun_are_given_up(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, plan = planned(checkpoints("llama"))
    executor = Stuck()
    with pytest.raises(OSError, match="no"):
        written(source, plan, subspace(plan), tmp_path / "out", executor)
    assert [future.cancelled() for future in executor.futures] == [True, False]
