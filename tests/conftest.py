"""Tiny models, built here: real architectures with random weights, and a real tokenizer."""

import os

# Set before any Hub client is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch is: tests run side by side, and models this small lose time to a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import Result

from converter.runtime.cache import using_cache
from tests.builders.invoke import invoke
from tests.builders.models import make_checkpoint, tiny_recipe
from tests.builders.planted import make_planted


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoints by kind and dtype, made once. Read only: a test that alters one copies it."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def get(kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "60KB") -> Path:
        name = f"{kind}-{str(dtype).removeprefix('torch.')}-{shard}"
        return make_checkpoint(root / name, kind, dtype, shard)

    return get


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of tests that do not care whether the model has run before."""
    folder = tmp_path_factory.mktemp("cache")
    with using_cache(folder):
        yield folder


@pytest.fixture(scope="session", autouse=True)
def plain_processor() -> Iterator[None]:
    """Held-out text is measured in the dtype of the fit, whatever the processor can multiply."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test alone."""
    monkeypatch.setenv("GLOSS_CACHE_DIR", str(tmp_path / "cache"))
    with using_cache(tmp_path / "cache"):
        yield


@pytest.fixture
def cli(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``tests.builders.invoke``, with the cache that tests share."""
    monkeypatch.setenv("GLOSS_CACHE_DIR", str(shared_cache))
    return invoke


@pytest.fixture(scope="session")
def converted(
    checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A bfloat16 Llama and its conversion with all defaults. Read only."""
    from converter.entrypoints.convert import convert

    source = checkpoints("llama", torch.bfloat16)
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(tiny_recipe(source, num_pairs=64), out)
    return source, out


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted checkpoint, with its pairs in ``pairs.jsonl`` beside it. Read only."""
    return make_planted(tmp_path_factory.mktemp("planted"))
