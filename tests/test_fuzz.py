"""The fuzzer's corpus, without the fuzzer: right files, and all that once broke a reader."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from converter.runtime.progress import peak_memory
from tests.fuzz.mutate import change_json, change_safetensors
from tests.fuzz.readers import FORMS, READERS, run

CORPUS = Path(__file__).parent / "fuzz/corpus"
FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())

SECONDS, BYTES = 10, 500_000_000
"""What one file may take, on a machine that is busy."""


def test_every_reader_has_a_seed_that_it_accepts() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(READERS)
    assert sum(path.stat().st_size for path in FILES) < 200_000
    for name in READERS:
        assert any(path.name.startswith("right") for path in (CORPUS / name).iterdir()), name


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_is_accepted_or_refused_in_a_sentence(path: Path) -> None:
    start, before = time.monotonic(), peak_memory()
    refused = run(path.parent.name, path.read_bytes())
    assert time.monotonic() - start < SECONDS
    assert peak_memory() - before < BYTES
    if path.name.startswith("right") and path.parent.name not in ("message", "options"):
        assert refused is None, refused


@pytest.mark.parametrize(
    ("form", "change"), [("json", change_json), ("safetensors", change_safetensors)]
)
def test_the_fuzzers_changes_are_functions_of_the_seed(
    form: str, change: Callable[..., bytes]
) -> None:
    for name in sorted(name for name, known in FORMS.items() if known == form):
        data = (CORPUS / name / "right").read_bytes()
        made = [change(data, 8192, seed, lambda data, size: data) for seed in range(20)]
        assert made == [change(data, 8192, seed, lambda data, size: data) for seed in range(20)]
        assert len(set(made)) > 10
