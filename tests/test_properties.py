"""Facts that hold for whatever is read, tried on what hypothesis thinks of.

``make properties`` tries thirty times as much; ``make test`` the same few each time.
"""

import hashlib
import json
import os
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from converter.checkpoints.layout import check_config, read_index
from converter.checkpoints.names import MANIFEST, plain_name
from converter.checkpoints.safetensors import direct_writer
from converter.checkpoints.safetensors import rewrite as rewriting
from converter.checkpoints.safetensors.header import BITS, Header, parse_header, read_header
from converter.checkpoints.safetensors.rewrite import Region, find_damage, rewrite
from converter.errors import CheckpointError, VerificationError
from converter.release.manifest import read_manifest
from tests.builders.errors import refused

COMMON: dict[str, Any] = {
    "database": None, "deadline": None, "suppress_health_check": list(HealthCheck),
}  # fmt: skip
settings.register_profile("few", max_examples=60, derandomize=True, **COMMON)
settings.register_profile("many", max_examples=2000, **COMMON)
settings.load_profile(os.environ.get("GLOSS_PROPERTIES", "few"))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=5),
    max_leaves=20,
)  # fmt: skip

NUMBERS = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
PLAIN = st.text(min_size=1, max_size=20).filter(
    lambda name: name.isprintable() and name != "__metadata__"
)
TEXTS = st.dictionaries(st.text(max_size=9), st.text(max_size=9))
ARRAYS = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 2, shape).astype(dtype),
    st.sampled_from(NUMBERS), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 9),
)  # fmt: skip
TENSORS = st.dictionaries(PLAIN, ARRAYS, max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties")


def one_line(error: Exception) -> None:
    """A message steers no terminal and has an end."""
    assert str(error).isprintable()
    assert len(str(error)) < 9000


def file_of(raw: bytes, data: int) -> bytes:
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def what_safetensors_reads(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Name -> dtype and shape, or None if it refuses the file."""
    try:
        with safe_open(path, "numpy") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (p.get_dtype(), tuple(p.get_shape())) for n, p in parts.items()}
    except (SafetensorError, OSError):
        return None


def compare(path: Path) -> None:
    """Whatever we accept, safetensors accepts and reads alike; but for dtypes that it lacks."""
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    if any(info.dtype not in BITS for info in ours.tensors.values()):
        return
    theirs = what_safetensors_reads(path)
    assert theirs == {name: (info.dtype, info.shape) for name, info in ours.tensors.items()}


@given(TENSORS, st.none() | TEXTS)
def test_what_safetensors_writes_is_read_alike(
    folder: Path, tensors: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    assume(tensors or metadata != {})  # of which safetensors 0.8 makes what it cannot read
    save_file(tensors, folder / "a", metadata)
    header, raw = read_header(folder / "a"), (folder / "a").read_bytes()
    assert header.tensors.keys() == tensors.keys()
    for name, info in header.tensors.items():
        assert info.shape == tensors[name].shape
        assert raw[info.start : info.end] == tensors[name].tobytes()
    compare(folder / "a")


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """The JSON of a header that is right, and how many bytes belong to it; then a mistake."""
    entries: dict[str, Any] = {}
    start = 0
    for name in draw(st.lists(PLAIN, unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = int(np.prod(shape, dtype=int)) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    if draw(st.booleans()):
        entries["__metadata__"] = draw(
            st.dictionaries(st.text(max_size=5), st.text(max_size=5)) | JSON
        )
    for name in draw(st.lists(st.sampled_from(sorted(entries)), max_size=2)) if entries else ():
        if name == "__metadata__" or draw(st.booleans()):
            entries[name] = draw(JSON)
        elif isinstance(entries[name], dict):
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            value = draw(
                JSON
                | st.lists(st.integers(-1, 1 << 65), max_size=5)
                | st.sampled_from(sorted(BITS))
            )
            entries[name] = entries[name] | {key: value}
    spaced = draw(st.sampled_from([(",", ":"), (" , ", "\n:\t")]))
    raw = json.dumps(entries, separators=spaced, ensure_ascii=draw(st.booleans()))
    return raw.encode("utf-8", "surrogatepass"), start + draw(st.sampled_from([0, 0, 0, 1, -1]))


@given(headers(), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=2),
       st.sampled_from([b"", b" ", b"\0", b"\n"]))  # fmt: skip
def test_what_we_accept_safetensors_accepts(
    folder: Path, made: tuple[bytes, int], flips: list[tuple[int, int]], rest: bytes
) -> None:
    """Also after some bytes of it were changed; and what we refuse is one of our errors."""
    raw = bytearray(made[0] + rest)
    for place, value in flips:
        raw[place % len(raw)] = value
    (folder / "b").write_bytes(file_of(bytes(raw), max(made[1], 0)))
    compare(folder / "b")


@given(st.binary(max_size=200), st.integers(0, 300))
def test_bytes_are_no_header(raw: bytes, size: int) -> None:
    with refused(CheckpointError, what="x: the header is not a JSON object"):
        parse_header(b"\xff" + raw, size, "x")


@given(headers(), st.integers(1, 200))
def test_a_header_is_read_within_a_small_multiple_of_its_bytes(
    made: tuple[bytes, int], times: int
) -> None:
    raw = b"{" + b",".join([made[0][1:-1] or b'"a":0'] * times) + b"}"
    tracemalloc.start()
    try:
        parse_header(raw, 8 + len(raw) + made[1], "x")
    except CheckpointError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 12 * len(raw) + 50_000


SHARD = st.sampled_from([
    "a.safetensors", "b.safetensors", "../a.safetensors", "A.safetensors", "/a", "", ".",
    "gloss_edit.safetensors", "\0.safetensors",
])  # fmt: skip
STEPS = st.sampled_from(["..", ".", "", "a", "/", "\\", "\0", "C:"])


@given(
    JSON
    | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(), SHARD | JSON, max_size=6)})
)
def test_an_index_places_tensors_in_plain_files_or_is_refused(folder: Path, content: Any) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(content))
    try:
        found = read_index(path)
    except CheckpointError as error:
        one_line(error)
        return
    names = set(found.values())
    assert all((folder / name).parent == folder for name in names)
    assert all(name.endswith(".safetensors") and name.isprintable() for name in names)
    assert len({name.casefold() for name in names}) == len(names)
    assert not any(name.startswith((".", "gloss_")) for name in names)


@given(st.dictionaries(st.text(max_size=12), JSON, max_size=6))
def test_a_config_is_good_or_refused(config: dict[str, Any]) -> None:
    try:
        check_config(config)
    except CheckpointError as error:
        one_line(error)


@given(
    st.dictionaries(PLAIN, ARRAYS, min_size=1, max_size=6),
    st.sets(st.integers(0, 5)),
    st.integers(3, 90),
    st.integers(3, 90),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
def test_a_shard_is_rewritten_as_in_memory(
    tensors: dict[str, Any], changed: set[int], piece: int, buffer: int, steps: list[int]
) -> None:
    """Whichever tensors change, in whatever steps, through whatever buffers."""
    with TemporaryDirectory() as root:
        source, target = Path(root) / "a", Path(root) / "b"
        save_file(tensors, source)
        header, raw = read_header(source), bytearray(source.read_bytes())
        names = [name for n, name in enumerate(header.tensors) if n in changed]
        for name in names:
            info = header.tensors[name]
            raw[info.start : info.end] = bytes(b ^ 1 for b in raw[info.start : info.end])

        def flipped(region: Region) -> Iterator[memoryview]:
            place, size, turn = 0, region.info.nbytes, 0
            while place < size:
                count = min(steps[turn % len(steps)], size - place)
                yield memoryview(bytes(b ^ 1 for b in region.read(place, count)))
                place, turn = place + count, turn + 1

        with (
            mock.patch.object(rewriting, "PIECE", piece),
            mock.patch.object(direct_writer, "BUFFER", buffer),
            source.open("rb", buffering=0) as file,
        ):
            before = hashlib.sha256(source.read_bytes()).hexdigest()
            record = rewrite(file, target, dict.fromkeys(names, flipped))
        assert target.read_bytes() == raw
        assert (record.source_sha256, record.nbytes) == (before, len(raw))
        assert record.sha256 == hashlib.sha256(raw).hexdigest()
        assert load_file(target).keys() == tensors.keys()
        _check_damage(target, bytes(raw), record.prefixes, header)


def _check_damage(target: Path, raw: bytes, prefixes: Mapping[str, str], header: Header) -> None:
    """A byte that is changed later is found where it is."""
    damaged = bytearray(raw)
    damaged[-1] ^= 1
    target.write_bytes(damaged)
    full = [info.name for info in header.tensors.values() if info.nbytes]
    assume(full)
    assert find_damage(target, prefixes) == f"tensor {full[-1]}"


@given(
    st.text() | st.lists(st.sampled_from(["..", ".", "", "a", "/", "\\", "\0", "C:"])).map("/".join)
)
def test_names_of_a_manifest_stay_in_their_folder(folder: Path, name: str) -> None:
    try:
        plain_name(name)
    except VerificationError as error:
        one_line(error)
        return
    place = Path(os.path.normpath(folder / name))
    assert place != folder
    assert place.is_relative_to(folder)


@given(JSON)
def test_no_json_is_a_manifest(folder: Path, content: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps(content))
    with refused(VerificationError, what=f"{MANIFEST} ..."):
        read_manifest(folder)


@given(st.lists(st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=4), JSON), min_size=1,
                max_size=3))  # fmt: skip
def test_a_manifest_that_was_changed_follows_its_schema_or_is_refused(
    folder: Path, changes: list[tuple[list[int], Any]]
) -> None:
    """The values at some places of a good one are replaced by others."""
    manifest = json.loads(GOOD.read_text())
    for path, value in changes:
        part: Any = manifest
        for step in path[:-1]:
            inner = list(part.values()) if isinstance(part, dict) else part
            if not isinstance(inner, list) or not inner:
                break
            if isinstance(inner[step % len(inner)], (dict, list)):
                part = inner[step % len(inner)]
        if isinstance(part, dict) and part:
            part[sorted(part)[path[-1] % len(part)]] = value
        elif isinstance(part, list) and part:
            part[path[-1] % len(part)] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))
    try:
        read_manifest(folder)
    except VerificationError as error:
        one_line(error)


GOOD = Path(__file__).parents[1] / "manifests/smollm2-135m-instruct.json"
