"""Sources made to do harm: each is one sentence and an exit code, and nothing of it is run."""

import builtins
import json
import os
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import dynamic_module_utils

from converter.checkpoints.layout import read_card, read_index
from converter.checkpoints.resolve import resolve
from converter.checkpoints.safetensors.header import parse_header
from converter.errors import CheckpointError, SourceError
from converter.models.loading import load_tokenizer
from tests.builders.errors import refused
from tests.builders.hostile import (
    CONFIGS,
    FILES,
    GGUFS,
    HEADERS,
    INDEXES,
    NATIVE,
    PICKLES,
    Case,
    link,
)
from tests.builders.invoke import Cli
from tests.builders.meta import write_native
from tests.builders.models import TINY_ARGS, Checkpoints

SECONDS = 20
"""After so many, something waits for ever."""


@pytest.fixture(autouse=True)
def hurried() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def refuse(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Plan a source, and expect an exit code and one sentence that has a part."""

    def check(source: Path, code: int, says: str) -> None:
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.iterdir())
        result = cli("plan", source)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.exit_code == code, result.stderr or result.exception
        assert len(errors) == 1
        assert says in errors[0]
        assert errors[0].isprintable()
        assert len(errors[0]) < 7000
        assert "Traceback" not in result.output + result.stderr
        assert sorted(tmp_path.iterdir()) == before
        assert not Path("executed").exists()

    return check


TABLE = {
    f"{kind}: {name}": case
    for kind, cases in {
        "header": HEADERS, "index": INDEXES, "config": CONFIGS, "file": FILES, "pickle": PICKLES,
    }.items()
    for name, case in cases.items()
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE.values(), ids=TABLE)
def test_hostile_folders_are_refused(
    case: Case, checkpoints: Checkpoints, refuse: Callable[..., None], tmp_path: Path
) -> None:
    damage, code, says = case
    (tmp_path / "secret").write_text("{}")
    source = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    damage(source)
    refuse(source, code, says)


@pytest.mark.parametrize("case", NATIVE.values(), ids=NATIVE)
def test_hostile_folders_in_metas_layout_are_refused(
    case: Case, refuse: Callable[..., None], tmp_path: Path
) -> None:
    damage, code, says = case
    (tmp_path / "secret").write_text("{}")
    write_native(tmp_path / "source")
    (tmp_path / "source/checklist.chk").unlink()  # the sums would tell first
    damage(tmp_path / "source")
    refuse(tmp_path / "source", code, says)


@pytest.mark.parametrize("case", GGUFS.values(), ids=GGUFS)
def test_hostile_gguf_files_are_refused(
    case: tuple[bytes, int, str], refuse: Callable[..., None], tmp_path: Path
) -> None:
    content, code, says = case
    (tmp_path / "a.gguf").write_bytes(content)
    refuse(tmp_path / "a.gguf", code, says)


def test_a_million_entries_are_read_in_seconds(tmp_path: Path) -> None:
    """Of an index; what took them by twos, or looked for each in a list, would take hours."""
    count = 100_000
    lines = ",".join(f'"{n}":"{n}.safetensors"' for n in range(count))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{lines}}}}}')
    start = time.process_time()
    assert len(read_index(tmp_path / "model.safetensors.index.json")) == count
    assert time.process_time() - start < 3


ENTRY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'

SWOLLEN = {
    "tensors": b"{" + b",".join(b'"%d":%s' % (n, ENTRY) for n in range(10_000)) + b"}",
    "lists": b'{"a":{"dtype":"U8","shape":[' + b"[]," * 300_000 + b"0]}}",
    "objects": b'{"a":{"dtype":"U8","shape":[' + b"{}," * 300_000 + b"0]}}",
    "axes": b'{"a":{"dtype":"U8","shape":[9' + b",9223372036854775807" * 50_000 + b"]}}",
    "metadata": b'{"__metadata__":{"":""%s}}' % b"".join(b',"%x":""' % n for n in range(99_999)),
    "one name": b'{"' + b"\\n" * 500_000 + b'":' + ENTRY + b"}",
    "one entry": b'{"a":{"' + b"a" * 1_000_000 + b'":1}}',
    "space": b"{" + b" " * 1_000_000 + b"}",
}  # fmt: skip
"""Headers of a megabyte."""


@pytest.mark.parametrize("raw", SWOLLEN.values(), ids=SWOLLEN)
def test_memory_and_time_are_bounded_by_the_header(raw: bytes) -> None:
    """A parser of JSON makes twenty to thirty times as much of some of these."""
    start = time.process_time()
    tracemalloc.start()
    try:
        parse_header(raw, 8 + len(raw), "x")
    except CheckpointError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10 * len(raw)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "front",
    [
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi",
                                                                       strict=True)
        ) + "license: *i\n",
        "license: " + "[" * 1500 + "]" * 1500 + "\n",
        "license: !!python/object/apply:pathlib.Path.touch [executed]\n",
        "license: \xff: : {\n",
    ],
    ids=["references", "nested", "code", "broken"],
)  # fmt: skip
def test_a_card_that_does_harm_is_one_that_says_nothing(
    front: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{front}---\nHello.\n", "latin-1")
    assert read_card(tmp_path / "README.md").get("license") is None
    assert not Path("executed").exists()


def as_in_the_cache_of_the_hub(source: Path, root: Path, subfolder: str = "") -> Path:
    """The files of a folder as the Hub's client keeps them: links to what is named by its hash."""
    blobs, snapshot = root / "models--a--b/blobs", root / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    (snapshot / subfolder).mkdir(parents=True)
    for path in source.iterdir():
        shutil.copyfile(path, blobs / f"hash-of-{path.name}")
        link = snapshot / subfolder / path.name
        link.symlink_to(os.path.relpath(blobs / f"hash-of-{path.name}", link.parent))
    return snapshot


@pytest.mark.parametrize("subfolder", ["", "below"])
def test_a_folder_of_the_hubs_cache_is_a_source(
    subfolder: str, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    snapshot = as_in_the_cache_of_the_hub(checkpoints("llama"), tmp_path, subfolder)
    more = ("--subfolder", subfolder) if subfolder else ()
    cli("plan", snapshot, *more, code=0)
    link("LICENSE.txt", "/etc/passwd")(snapshot)
    result = cli("plan", snapshot, *more)
    if subfolder:  # it has a licence of its own, so that the one above is not read
        assert result.exit_code == 0, result.stderr
    else:
        assert "LICENSE.txt is a link that leads out of the source" in result.stderr
        assert result.exit_code == 4


def test_a_licence_above_a_subfolder_must_not_lead_out(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    shutil.copytree(checkpoints("llama"), tmp_path / "top/below")
    (tmp_path / "top/below/LICENSE").unlink()
    link("LICENSE", "/etc/passwd")(tmp_path / "top")
    with refused(CheckpointError, what="LICENSE is a link that leads out of the source"):
        resolve(str(tmp_path / "top"), "below")


def test_links_within_a_source_and_linked_weights_are_taken(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    for shard in source.glob("*.safetensors"):
        shard.rename(tmp_path / shard.name)
        shard.symlink_to(tmp_path / shard.name)
    (source / "NOTICE").symlink_to("LICENSE")
    (source / "elsewhere").symlink_to(tmp_path)  # a folder, which is not entered
    args = ("--num-pairs", 32, *TINY_ARGS)
    cli("convert", source, tmp_path / "out", *args, code=0)
    assert (tmp_path / "out/NOTICE").read_text() == "A licence.\n"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert not (tmp_path / "out/elsewhere").exists()


CODE = "from pathlib import Path\nPath({!r}).touch()\n"


def hostile_code(source: Path, marker: Path) -> None:
    """Everything that could be imported or rendered, all of which makes a file if it is."""
    for name in ("own.py", "__init__.py", "setup.py", "conftest.py", "custom_generate/generate.py",
                 "torch.py", "json.py", "sitecustomize.py"):  # fmt: skip
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(CODE.format(str(marker)))
    template = (
        "{% for a in range(10 ** 12) %}{% endfor %}"
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.popen('x')"
    )
    (source / "chat_template.jinja").write_text(template)
    kinds = ("Config", "Model", "ModelForCausalLM", "Processor")
    auto = {f"Auto{kind}": "own.Own" for kind in kinds}
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"auto_map": auto, "architectures": ["own.Own", 3, None, "../x"]},
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "chat_template": template,
        },
        "processor_config.json": {"auto_map": auto, "processor_class": "Own"},
        "preprocessor_config.json": {"auto_map": auto},
    }  # fmt: skip
    for name, more in changes.items():
        path = source / name
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | more))


def test_nothing_of_a_source_is_run(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither imported, nor rendered, nor asked about: a prompt would wait for an answer."""
    source, marker = shutil.copytree(checkpoints("llama"), tmp_path / "source"), tmp_path / "ran"
    hostile_code(source, marker)
    monkeypatch.chdir(source)  # where a script would be started
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("asked"))
    cli("convert", source, tmp_path / "out", "--num-pairs", 32, *TINY_ARGS, code=0)
    cli("verify", tmp_path / "out", "--source", source, code=0)
    assert (tmp_path / "out/own.py").read_bytes() == (source / "own.py").read_bytes()
    assert not marker.exists()
    assert not (tmp_path / "m").exists()


def test_a_tokenizer_that_is_code_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, marker = shutil.copytree(checkpoints("llama"), tmp_path / "source"), tmp_path / "ran"
    hostile_code(source, marker)
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Own"}))
    with refused(SourceError, what="transformers cannot load the tokenizer"):
        load_tokenizer(source)
    assert not marker.exists()
