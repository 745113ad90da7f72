"""Object stores as destinations: what is seen there, in which order, and what goes wrong."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from converter.checkpoints.names import MANIFEST, SUMS
from converter.checkpoints.resolve import resolve
from converter.entrypoints.push import put, put_and_drop
from converter.errors import DestinationError, PublishError
from converter.hub import store_uploads
from converter.hub.store_uploads import upload
from converter.hub.stores import plain_errors
from converter.runtime.cache import outgoing
from tests.builders.errors import refused
from tests.builders.invoke import invoke
from tests.builders.models import TINY_ARGS, Checkpoints
from tests.builders.object_stores import BUCKET, connect, drop, fetch, objects, s3_server

PLACE = "memory://results/out"


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def memory() -> Iterator[str]:
    yield PLACE
    if objects(PLACE):
        drop(PLACE)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    connect(monkeypatch, endpoint)
    return f"{BUCKET}/out"


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the objects that are sent, in order."""
    names: list[str] = []
    put_file = store_uploads._Target.put

    def noted(self: Any, name: str, *args: Any) -> None:
        names.append(name)
        put_file(self, name, *args)

    monkeypatch.setattr(store_uploads._Target, "put", noted)
    return names


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """Let the store refuse one object."""
    put_file = store_uploads._Target.put

    def failing(self: Any, wanted: str, *args: Any) -> None:
        if wanted == name:
            with plain_errors(self.address, PublishError, "written"):
                raise error
        put_file(self, wanted, *args)

    monkeypatch.setattr(store_uploads._Target, "put", failing)


@pytest.mark.slow
def test_a_result_in_a_store_is_that_of_a_folder(
    place: str, checkpoints: Checkpoints, sent: list[str], tmp_path: Path
) -> None:
    source, folder = checkpoints("llama"), tmp_path / "folder"
    result = invoke("convert", source, place, *TINY_ARGS, code=0)
    assert f"-> {place}" in result.stdout
    assert not outgoing(place).exists()
    invoke("convert", source, folder, *TINY_ARGS, code=0)
    there = fetch(place, tmp_path / "there")
    assert {p.name for p in there.iterdir()} == {p.name for p in folder.iterdir()} == {*sent}
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert sent[: len(shards)] == shards
    assert sent[-4:] == ["model.safetensors.index.json", "config.json", MANIFEST, SUMS]
    for name in shards:
        assert (there / name).read_bytes() == (folder / name).read_bytes()
    invoke("verify", there, "--source", source, code=0)
    says = f"destination {place} is not empty: found LICENSE"
    invoke("convert", source, place, *TINY_ARGS, code=7, says=says)


def test_an_object_of_s3_has_its_sha256_in_its_metadata(
    s3: str, converted: tuple[Path, Path]
) -> None:
    answer = json.loads(invoke("push", converted[1], s3, "--json", code=0).stdout)
    assert answer == {"destination": str(converted[1]), "address": s3}
    files, prefix = fsspec.url_to_fs(s3)
    for name, data in objects(s3).items():
        said = files.metadata(f"{prefix}/{name}")["sha256"]
        assert said == hashlib.sha256(data).hexdigest()


@pytest.mark.slow
def test_an_upload_that_fails_is_no_checkpoint_and_goes_on(
    s3: str, checkpoints: Checkpoints, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints("llama")
    with monkeypatch.context() as patch:
        fail_at(patch, "config.json", ConnectionError("broken pipe"))
        says = "what was sent is not sent twice; the result is kept in"
        invoke("convert", source, s3, *TINY_ARGS, code=10, says=says)
    before = [name for name in sent if name != "config.json"]
    assert before
    assert not {"config.json", MANIFEST, SUMS} & objects(s3).keys()
    sent.clear()
    says = "is the result of this run already"
    invoke("convert", source, s3, *TINY_ARGS, code=0, says=says)
    assert sent == ["config.json", MANIFEST, SUMS]
    assert not outgoing(s3).exists()


@pytest.mark.slow
def test_the_result_of_another_recipe_is_replaced(
    memory: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, "model-00001-of-00005.safetensors", PermissionError("Access Denied"))
        says = "no right to it: found Access Denied"
        invoke("convert", checkpoints("llama"), memory, *TINY_ARGS, code=10, says=says)
    assert outgoing(memory).is_dir()
    invoke("convert", checkpoints("mistral"), memory, *TINY_ARGS, code=0)
    assert b'"model_type": "mistral"' in objects(memory)["config.json"]


def test_a_cache_that_cannot_be_written_is_named(
    memory: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    says = f"the result for {memory} is made in the cache, which --cache-dir chooses"
    cache = ("--cache-dir", tmp_path / "file/cache")
    invoke("convert", checkpoints("llama"), memory, *cache, *TINY_ARGS, code=7, says=says)


def test_a_second_run_beside_an_upload_is_refused(
    memory: str, converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(converted[1], outgoing(memory))
    put_file, held = store_uploads._Target.put, refused(DestinationError, what="...another run")

    def disturbed(self: Any, name: str, *args: Any) -> None:
        if name == SUMS:
            with held:
                put_and_drop(folder, memory, False)
        put_file(self, name, *args)

    monkeypatch.setattr(store_uploads._Target, "put", disturbed)
    put_and_drop(folder, memory, False)
    assert SUMS in objects(memory)
    assert list(folder.parent.glob("*")) == []


def test_a_large_file_is_sent_in_parts_and_no_part_is_left(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_uploads, "_PART", 5 << 20)  # the least that S3 takes
    files, prefix = fsspec.url_to_fs(s3)
    bucket, _, key = f"{prefix}/x.safetensors".partition("/")
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(11 << 20))
    wanted = {"x.safetensors": (path, "ab" * 32)}

    def unfinished() -> list[str]:
        return [each["Key"] for each in files.list_multipart_uploads(bucket)]

    files.call_s3("create_multipart_upload", Bucket=bucket, Key="someone/else")
    with monkeypatch.context() as patch:
        call = type(files)._call_s3

        async def failing(self: Any, method: str, *args: Any, **how: Any) -> Any:
            if method == "upload_part" and how["PartNumber"] == 3:
                raise ConnectionError("broken pipe")
            return await call(self, method, *args, **how)

        patch.setattr(type(files), "_call_s3", failing)
        with refused(PublishError, what=f"{s3}/x.safetensors cannot...", found="broken pipe"):
            upload(s3, wanted)
    assert unfinished() == ["someone/else"]
    assert objects(s3) == {}
    with monkeypatch.context() as patch:

        def stopped(*args: Any, **how: Any) -> None:  # its thread would go on
            files.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
            raise KeyboardInterrupt

        patch.setattr(files, "put_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            upload(s3, wanted)
    assert unfinished() == ["someone/else"]
    files.call_s3("create_multipart_upload", Bucket=bucket, Key=key)  # of a run that was killed
    upload(s3, wanted)
    assert files.info(f"{prefix}/x.safetensors")["ETag"].endswith('-3"')  # it was in parts
    assert files.metadata(f"{prefix}/x.safetensors")["sha256"] == "ab" * 32
    assert unfinished() == ["someone/else"]


def test_what_is_there_is_neither_overwritten_nor_mixed(
    place: str, converted: tuple[Path, Path], checkpoints: Checkpoints
) -> None:
    files, prefix = fsspec.url_to_fs(place)
    files.pipe_file(f"{prefix}/config.json", b"{}")
    says = f"destination {place} is not empty: found config.json; choose another prefix"
    invoke("push", converted[1], place, code=7, says=says)
    invoke("convert", checkpoints("llama"), place, code=7, says=says)
    invoke("convert", checkpoints("llama"), place, "--overwrite", code=2, says="--overwrite")
    assert objects(place) == {"config.json": b"{}"}


def test_an_object_that_stands_for_an_empty_folder_does_not_count(
    s3: str, converted: tuple[Path, Path]
) -> None:
    """The console of Amazon makes one where a user makes a folder."""
    files, prefix = fsspec.url_to_fs(s3)
    bucket, _, key = prefix.partition("/")
    for each in (f"{key}/", f"{key}/old/"):
        files.call_s3("put_object", Bucket=bucket, Key=each)
    put(converted[1], s3, verified=True)
    assert {*resolve(s3).shards} == {path.name for path in converted[1].glob("model-*.safetensors")}


def test_what_is_wrong_with_a_store_is_said_before_the_model_is_looked_at(
    s3: str, checkpoints: Checkpoints, converted: tuple[Path, Path], tmp_path: Path
) -> None:
    source = checkpoints("llama")
    says = "s3://no-such-bucket/out is not there: found The specified bucket does not exist"
    invoke("convert", source, "s3://no-such-bucket/out", code=10, says=says)
    invoke("push", converted[1], "s3://no-such-bucket/out", code=10, says=says)
    says = "DESTINATION: expected a folder, or an address such as s3://bucket/prefix, found s4://b"
    invoke("convert", source, "s4://b", code=2, says=says)
    invoke("convert", source, s3, "--push-to-hub", "a/b", code=2, says="--push-to-hub")
    says = f"destination {s3}/a is the source or lies inside it; choose another prefix"
    invoke("convert", f"{s3}/", f"{s3}/a", code=3, says=says)  # nor is the source there
    invoke("push", converted[1], s3, "--create-pr", code=2, says="--create-pr")
    assert objects(s3) == {}


def test_a_store_that_loses_an_object_is_found_out(
    memory: str, converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file = store_uploads._Target.put

    def losing(self: Any, name: str, *args: Any) -> None:
        put_file(self, name, *args)
        if name == SUMS:
            self.files.rm_file(f"{self.prefix}/config.json")

    monkeypatch.setattr(store_uploads._Target, "put", losing)
    with refused(PublishError, what="...does not have what was sent", found="...of config.json"):
        put(converted[1], memory, verified=True)
    with refused(DestinationError, what="...is not empty"):
        put(converted[1], memory, verified=True)


@pytest.mark.parametrize(
    ("option", "command"),
    [
        ("DESTINATION", ("verify", "s3://b/x")),
        ("DESTINATION", ("report", "s3://b/x")),
        ("DESTINATION", ("push", "s3://b/x", "someone/x")),
        ("DESTINATION", ("replay", "manifests", "s3://b/x")),
        ("MANIFEST", ("replay", "s3://b/x", "out")),
        ("--plots", ("convert", "demo", "out", "--plots", "s3://b/x")),
        ("--like", ("plan", "demo", "--like", "s3://b/x")),
        ("--cache-dir", ("plan", "demo", "--cache-dir", "s3://b/x")),
    ],
)
def test_what_must_be_on_this_machine_is_no_address(option: str, command: tuple[str, ...]) -> None:
    says = f"Invalid value for '{option}': 's3://b/x' is an address; give a path on this machine"
    invoke(*command, code=2, says=says)
