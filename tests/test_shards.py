"""Shards as byte streams."""

import errno
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter.checkpoints.safetensors import direct_writer
from converter.checkpoints.safetensors.direct_writer import BUFFER, Writer
from converter.checkpoints.safetensors.header import TensorInfo, parse_header, read_header, to_bytes
from converter.checkpoints.safetensors.rewrite import (
    Change,
    Region,
    ShardRecord,
    as_tensor,
    find_damage,
    read_rows,
    read_tensor,
    rewrite,
    to_tensor,
)
from converter.errors import CheckpointError
from tests.builders.errors import refused


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    tensors = {
        "bf16": torch.randn(5, 7).bfloat16(),
        "f16": torch.randn(3).half(),
        "f32": torch.randn(2, 3, 4),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(9),
        "scalar": torch.tensor(3.5),
    }
    save_file(tensors, path, metadata={"format": "pt", "note": "ä"})
    return path


def rewritten(source: Path, target: Path, changes: Mapping[str, Change]) -> ShardRecord:
    with source.open("rb", buffering=0) as file:
        return rewrite(file, target, changes)


def negated(region: Region) -> Iterator[memoryview]:
    """In pieces of one row, each read twice."""
    row = region.info.nbytes // region.info.shape[0]
    for start in range(0, region.info.nbytes, row):
        region.read(start, row)
        part = TensorInfo("", region.info.dtype, region.info.shape[1:], 0, 0)
        yield to_bytes(-as_tensor(region.read(start, row), part))


def tensor_of(path: Path, info: TensorInfo) -> torch.Tensor:
    with path.open("rb", buffering=0) as file:
        return read_tensor(file, info)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Larger than a buffer, of a size that no disk is aligned to, with one byte between tensors."""
    path = tmp_path / "large.safetensors"
    tensors = {
        "a": torch.randint(0, 255, (BUFFER + 12345,), dtype=torch.uint8),
        "b": torch.randn(1000, 1001).bfloat16(),
        "c": torch.randint(0, 255, (BUFFER + 1,), dtype=torch.uint8),
    }
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("clones", [False, True])
def test_however_it_is_written_the_bytes_are_the_same(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, clones: bool
) -> None:
    written: list[int] = []
    pwrite = os.pwrite

    def counting(file: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            assert direct
            assert offset % 4096 == len(data) % 4096 == 0
        written.append(pwrite(file, data, offset))
        return written[-1]

    def clone(source: int, target: int) -> bool:
        """Where no file system can, a copy is as good."""
        size = os.fstat(source).st_size
        return clones and pwrite(target, os.pread(source, size, 0), 0) == size

    monkeypatch.setattr(direct_writer, "_clone", clone)
    if not direct:
        monkeypatch.setattr(direct_writer, "_open_direct", lambda path: None)
    monkeypatch.setattr(os, "pwrite", counting)
    advanced: list[int] = []
    with large.open("rb", buffering=0) as file:
        record = rewrite(file, tmp_path / "out", {"b": negated}, advanced.append)
    assert sum(advanced) == record.nbytes == large.stat().st_size
    raw, info = bytearray(large.read_bytes()), read_header(large).tensors["b"]
    for place in range(info.start + 1, info.end, 2):  # the byte with the sign
        raw[place] ^= 0x80
    assert (tmp_path / "out").read_bytes() == raw
    assert record.sha256 == hashlib.sha256(raw).hexdigest()
    assert record.source_sha256 == hashlib.sha256(large.read_bytes()).hexdigest()
    for name, digest in record.prefixes.items():
        end = read_header(large).tensors[name].end if name else read_header(large).data_start
        assert digest == hashlib.sha256(raw[:end]).hexdigest()[: len(digest)]
    assert list(record.prefixes) == ["", *read_header(large).tensors]
    # a clone costs no more than the changed bytes and what aligns them
    assert sum(written) <= info.nbytes + 4 * 4096 if clones else sum(written) == len(raw)


def test_the_file_has_the_usual_permissions(shard: Path, tmp_path: Path) -> None:
    rewritten(shard, tmp_path / "b", {})
    (tmp_path / "usual").touch()
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("direct", [False, True])
def test_an_error_of_the_disk_reaches_the_caller(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    def full(file: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    if not direct:
        monkeypatch.setattr(direct_writer, "_open_direct", lambda path: None)
    threads = threading.active_count()
    with pytest.raises(OSError, match="no space"):
        rewritten(large, tmp_path / "out", {})
    assert threading.active_count() == threads


def test_a_disk_that_refuses_direct_writes_is_written_to_all_the_same(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, refused = os.pwrite, []

    def picky(file: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(file)
            raise OSError(errno.EINVAL, "not aligned as I like it")
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", picky)
    rewritten(large, tmp_path / "out", {})
    assert (tmp_path / "out").read_bytes() == large.read_bytes()
    assert len(refused) <= 1


def test_a_change_of_another_length_is_noticed(shard: Path, tmp_path: Path) -> None:
    def short(region: Region) -> Iterator[memoryview]:
        yield region.read(0, region.info.nbytes)[1:]

    threads = threading.active_count()
    with pytest.raises(AssertionError, match="bf16"):
        rewritten(shard, tmp_path / "b", {"bf16": short})
    assert threading.active_count() == threads


def test_a_file_is_flushed_when_it_is_complete(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append((tmp_path / "b").read_bytes()))
    rewritten(large, tmp_path / "b", {})
    assert flushed == [large.read_bytes()]


def test_a_writer_reserves_room_first_and_leaves_no_thread(tmp_path: Path) -> None:
    threads = threading.active_count()
    writer = Writer(tmp_path / "a", 3 * BUFFER + 1, [], None)
    assert (tmp_path / "a").stat().st_blocks * 512 >= 3 * BUFFER
    writer.put(memoryview(b"some"))
    writer.abandon()
    assert threading.active_count() == threads


def test_tensors_are_read_as_safetensors_reads_them(shard: Path) -> None:
    for name, expected in load_file(shard).items():
        info = read_header(shard).tensors[name]
        if name == "ids":
            with refused(CheckpointError, what="tensor ids cannot be read as numbers"):
                tensor_of(shard, info)
        else:
            assert torch.equal(tensor_of(shard, info), expected)
    with shard.open("rb", buffering=0) as file:
        rows = read_rows(file, read_header(shard).tensors["bf16"], 1, 4)
    assert torch.equal(rows, load_file(shard)["bf16"][1:4])


@pytest.mark.parametrize(("dtype", "width"), [("F16", 2), ("BF16", 2), ("F32", 4), ("F64", 8)])
def test_bytes_and_tensors_are_inverse(dtype: str, width: int) -> None:
    data = bytes(range(3 * width))
    info = TensorInfo("x", dtype, (3,), 0, len(data))
    assert bytes(to_bytes(to_tensor(bytearray(data), info))) == data


def test_every_flipped_byte_is_found_and_named(shard: Path, tmp_path: Path) -> None:
    record = rewritten(shard, tmp_path / "b", {})
    raw, header = shard.read_bytes(), read_header(shard)
    for place in range(len(raw)):
        damaged = bytearray(raw)
        damaged[place] ^= 1
        (tmp_path / "c").write_bytes(damaged)
        owners = [t.name for t in header.tensors.values() if t.start <= place < t.end]
        expected = f"tensor {owners[0]}" if owners else "the header"
        assert find_damage(tmp_path / "c", record.prefixes) == expected


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("keys", "is_refused"),
    [
        ("", False),
        (', "note": "more", "sizes": [1]', False),
        (', "dtype": "F32"', True),
        (', "\\u0064type": "F32"', True),
        (', "shape": [2]', True),
        (', "note": 1, "note": 2', True),
        (', "note": NaN', True),
        (', "note": "\\ud800"', True),
    ],
)
def test_an_entry_may_have_more_keys_but_none_twice(keys: str, is_refused: bool) -> None:
    raw = ('{"a": ' + json.dumps(entry())[:-1] + keys + "}}").encode()
    if is_refused:
        what = "x: the header has an entry without dtype, shape or offsets: that of tensor a"
        with refused(CheckpointError, what=what):
            parse_header(raw, 8 + len(raw) + 8, "x")
    else:
        assert parse_header(raw, 8 + len(raw) + 8, "x").tensors["a"].shape == (2,)
