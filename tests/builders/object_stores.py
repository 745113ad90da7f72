"""Object stores: fsspec's in memory, and moto's server of S3 on the loopback interface."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import fsspec
import pytest

BUCKET = "s3://tiny-models"


@contextmanager
def s3_server() -> Iterator[str]:
    """A server of S3 without a bucket; yields its endpoint.

    Skips the test if the extra ``s3`` or moto is missing.
    """
    pytest.importorskip("s3fs", reason="pip install 'gloss-convert[s3]'")
    moto = pytest.importorskip("moto.server", reason="pip install 'gloss-convert[test]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints every request
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


def connect(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Lead the clients of this process to a server, which forgets what it has, and make BUCKET."""
    import s3fs

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)  # a profile, or a server for S3 alone
    for name, value in {
        "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "a-secret-of-someone",
        "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
        "NO_PROXY": "127.0.0.1",
        "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    urlopen(Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    fsspec.url_to_fs(BUCKET)[0].mkdir(BUCKET)


def put(folder: Path, address: str) -> None:
    """Upload the files of a folder below an address."""
    files, prefix = fsspec.url_to_fs(address)
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    files.invalidate_cache()


def objects(address: str) -> dict[str, bytes]:
    """The objects below an address."""
    files, prefix = fsspec.url_to_fs(address)
    files.invalidate_cache()
    return {name.removeprefix(f"{prefix}/"): files.cat_file(name) for name in files.find(prefix)}


def fetch(address: str, folder: Path) -> Path:
    """Download what is below an address into a folder."""
    for name, data in objects(address).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def drop(address: str) -> None:
    """Delete all objects below an address."""
    files, prefix = fsspec.url_to_fs(address)
    files.invalidate_cache()
    files.rm(files.find(prefix))
    files.invalidate_cache()
