"""Object stores as sources: what is read, what is recorded, and what goes wrong."""

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest

from converter.checkpoints.resolve import resolve
from converter.errors import CheckpointError, OptionError, SourceError
from converter.hub import stores
from converter.hub.addresses import model_place
from converter.hub.store_addresses import is_store
from converter.hub.stores import Store
from converter.runtime import extras
from converter.runtime.cache import cache_folder
from tests.builders.errors import refused
from tests.builders.invoke import invoke
from tests.builders.models import TINY_ARGS, Checkpoints
from tests.builders.object_stores import BUCKET, connect, drop, objects, put, s3_server

PLACE = "memory://tiny-models/acme/tiny"


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def memory(checkpoints: Checkpoints) -> Iterator[str]:
    """The address of a tiny checkpoint in a store in memory."""
    put(checkpoints("llama"), PLACE)
    yield PLACE
    if fsspec.url_to_fs(PLACE)[0].find(PLACE):
        drop(PLACE)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def s3(endpoint: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same in a bucket of S3."""
    connect(monkeypatch, endpoint)
    put(checkpoints("llama"), f"{BUCKET}/acme/tiny")
    return f"{BUCKET}/acme/tiny"


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def fetched() -> list[str]:
    """The shards in the cache."""
    return sorted(path.name for path in (cache_folder() / "stores").rglob("*.safetensors"))


def test_a_plan_reads_headers_by_ranges_and_fetches_no_shard(place: str) -> None:
    plan = json.loads(invoke("plan", f"{place}/", "--json", *TINY_ARGS, code=0).stdout)
    assert plan["source"] == "tiny"
    assert len(plan["shards"]) > 1
    assert fetched() == []


@pytest.mark.slow
def test_a_prefix_converts_as_its_folder_does(
    place: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    out, again, folder = tmp_path / "out", tmp_path / "again", tmp_path / "folder"
    invoke("convert", place, out, *TINY_ARGS, "--no-keep-source", code=0)
    assert fetched() == []  # each was deleted once it was edited
    invoke("convert", checkpoints("llama"), folder, *TINY_ARGS, code=0)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in shards:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    manifest = json.loads((out / "gloss_manifest.json").read_text())
    source = manifest["source"]
    assert manifest["run"]["source"] == place
    assert (source["name"], source["repo_id"], source["commit"]) == ("tiny", None, None)
    assert {*source["versions"]} == {*source["files"]}
    assert f"gloss verify THIS_FOLDER --source {place}\n" in (out / "README.md").read_text("utf-8")
    invoke("verify", out, "--source", place, code=0)
    invoke("replay", out, again, code=0)  # the manifest says where the source is
    assert (again / shards[0]).read_bytes() == (out / shards[0]).read_bytes()
    invoke("convert", place, out, *TINY_ARGS, code=0, says="is the result of this run already")


def test_the_record_names_the_etags_of_s3(s3: str) -> None:
    files, prefix = fsspec.url_to_fs(s3)
    source = resolve(s3)
    listed = {name: files.info(f"{prefix}/{name}")["ETag"].strip('"') for name in source.shards}
    assert {name: source.versions[name] for name in source.shards} == listed


def test_a_store_without_etags_has_times() -> None:
    assert stores._version({"modificationTime": 1, "name": "x"}) == "1"  # webhdfs
    assert stores._version({"mtime": datetime.fromtimestamp(2, UTC)}) == "2.0"  # sftp
    assert stores._version({"ETag": '"ab"', "mtime": 3}) == "ab"
    assert stores._version({"name": "x"}) == ""


def test_a_subfolder_of_a_prefix(memory: str, checkpoints: Checkpoints) -> None:
    (source, below) = (resolve(memory), resolve("memory://tiny-models", "acme/tiny"))
    assert source.config == below.config
    assert source.headers() == below.headers() == resolve(str(checkpoints("llama"))).headers()
    assert source.versions.keys() == below.versions.keys()
    with refused(SourceError, what="...has no folder nowhere"):
        resolve(memory, "nowhere")


def test_a_replaced_object_is_fetched_anew(memory: str, checkpoints: Checkpoints) -> None:
    before = resolve(memory)
    before.fetch()
    drop(memory)
    put(checkpoints("llama"), memory)
    after = resolve(memory)
    assert after.folder != before.folder  # the same bytes, but the store does not say so
    assert not (after.folder / after.shards[0]).exists()


def test_an_object_that_changes_meanwhile_is_not_kept(memory: str) -> None:
    source = resolve(memory)
    files, prefix = fsspec.url_to_fs(memory)
    path = f"{prefix}/{source.shards[0]}"
    data = files.cat_file(path)
    for other in (data, data + b"x", data[:-1]):  # written again, longer, shorter
        files.pipe_file(path, other)
        with refused(SourceError, what="...changed while it was read", hint="run again..."):
            source.fetch([source.shards[0]])
        assert fetched() == []


def test_a_store_that_goes_away_half_way_leaves_nothing(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Store._fetch

    def vanishing(self: Store, name: str, path: Path) -> None:
        fetch(self, name, path)
        if name.endswith(".safetensors") and objects(memory):
            drop(memory)

    monkeypatch.setattr(Store, "_fetch", vanishing)
    says = "is not there"
    invoke("convert", memory, tmp_path / "out", *TINY_ARGS, code=3, says=says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_a_package_that_is_missing_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    says = "s3://b/tiny needs the package s3fs; pip install 'gloss-convert[s3]'"
    invoke("plan", "s3://b/tiny", code=2, says=says)
    monkeypatch.undo()
    with refused(OptionError, what="oss://b/tiny needs another package", found="...ossfs..."):
        resolve("oss://b/tiny")


def test_what_is_wrong_with_s3_is_one_sentence(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = "s3://no-such-bucket/tiny is not there: found The specified bucket does not exist"
    invoke("convert", "s3://no-such-bucket/tiny", tmp_path / "out", code=3, says=bucket)
    says = f"there is nothing below {BUCKET}/acme/other; check bucket and prefix"
    invoke("plan", f"{BUCKET}/acme/other", code=3, says=says)
    says = f"{s3}/config.json is a single object"
    invoke("plan", f"{s3}/config.json", code=3, says=says)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    type(fsspec.url_to_fs(s3)[0]).clear_instance_cache()
    says = f"{s3} cannot be read: found Could not connect to the endpoint URL"
    invoke("plan", s3, code=3, says=says)


def test_no_right_is_one_sentence(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError("Access Denied")

    source = resolve(memory)
    monkeypatch.setattr(type(fsspec.url_to_fs(memory)[0]), "cat_file", denied)
    with refused(SourceError, what="...no right to it", hint="check the c..."):
        source.fetch()


def test_what_is_no_checkpoint_is_said(
    memory: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    for name, says in (("config.json", "...no config.json"), ("tokenizer.json", "...no tokenizer")):
        folder = tmp_path / name
        shutil.copytree(checkpoints("llama"), folder)
        (folder / name).unlink()
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
        put(folder, f"{memory}-without/{name}")
        with refused(CheckpointError, what=says):
            resolve(f"{memory}-without/{name}")


@pytest.mark.parametrize(
    "address",
    [
        "s3://",
        "hdfs:///",
        "s3:///bucket/tiny",
        "s3://bucket//tiny",
        "s3://bucket/../tiny",
        "s3://me:secret@bucket/tiny",
        "s3://me:a/secret/with+slashes@bucket/tiny",
        "s3://bucket/tiny?X-Amz-Signature=secret",
        "s3://bucket/tiny::file:///etc",
    ],
)
def test_an_address_is_one_plain_place_without_secrets(address: str) -> None:
    with refused(OptionError, expected="...://bucket/prefix, without...") as caught:
        model_place(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/mine/tiny",
        "sftp://me@host:22/models/tiny@1",
        "hdfs:///models/tiny",
        "abfs://c@a.dfs.core.windows.net/a b/ü*[x]#y",
    ],
)
def test_a_colon_an_at_or_a_space_is_no_secret(address: str) -> None:
    assert model_place(f"{address}/") == (address, "")


def test_addresses_of_stores_are_told_apart() -> None:
    for address in ("s3://b/x", "gs://b/x", "abfs://c@a.dfs.core.windows.net/x", "memory://x"):
        assert is_store(address)
        assert model_place(f"{address}/") == (address, "")
    assert model_place("S3://Bucket/x") == ("s3://Bucket/x", "")
    for other in (
        "hf://a/b",
        "https://hf.co/a/b",
        "file:///a",
        "zip://a",
        "s4://b/x",
        "a/b",
        "s3:",
    ):
        assert not is_store(other)
