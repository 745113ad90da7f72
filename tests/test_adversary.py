"""Whoever alters a finished folder is found, or it is said how much he had to repair."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from converter.checkpoints.names import CARD, EDIT_FILE, INDEX, MANIFEST, SIGNATURE, SUMS
from converter.checkpoints.resolve import resolve
from converter.checkpoints.safetensors.header import read_header
from converter.checkpoints.source import Source
from converter.entrypoints import push as pushing
from converter.entrypoints import upload
from converter.entrypoints import verify as verification
from converter.entrypoints.convert import convert
from converter.entrypoints.delivery import Delivery
from converter.entrypoints.verify import verify
from converter.errors import PublishError
from converter.manifest import Manifest
from converter.recipe import Publication
from converter.release.manifest import read_manifest
from converter.release.signing import load_public_key, load_signer
from tests.builders.adversary import (
    BEFORE,
    CLAIMS,
    copy_of,
    flipped,
    forged,
    kind_of,
    leaves,
    load_manifest,
    others,
    put,
    record,
    reseal,
)
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import TINY, tiny_recipe
from tests.test_signing import write_key


@pytest.fixture(scope="module")
def source(converted: tuple[Path, Path], shared_cache: Path) -> Source:
    return resolve(str(converted[0]))


@pytest.fixture(scope="module")
def adapter(
    converted: tuple[Path, Path], shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An adapter for the same source, with a picture. Read only."""
    out = tmp_path_factory.mktemp("adapter") / "out"

    def draw(manifest: Manifest, folder: Path) -> list[Path]:
        (folder / "pictures").mkdir()
        (folder / "pictures/a.png").write_bytes(bytes(range(64)))
        return [folder / "pictures/a.png"]

    recipe = tiny_recipe(converted[0], num_pairs=64, output="adapter")
    convert(recipe, out, delivery=Delivery(pictures=draw))
    return out


@pytest.fixture(scope="module")
def seeded(
    converted: tuple[Path, Path], shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same conversion with another seed and rank. Read only."""
    out = tmp_path_factory.mktemp("seeded") / "out"
    convert(tiny_recipe(converted[0], num_pairs=64, options={**TINY, "rank": "2"}, seed=1), out)
    return out


@pytest.fixture
def out(converted: tuple[Path, Path], tmp_path: Path) -> Path:
    return copy_of(converted[1], tmp_path / "out")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers does not load the folder; it could only find more."""
    monkeypatch.setattr(verification, "_check_loading", lambda *_: iter(()))


def classes(path: Path) -> list[int]:
    """A byte of every class that a file has."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return sorted({0, size // 3, size // 2, size - 1})
    header = read_header(path)  # its length, its JSON, its padding, and tensors
    found = {0, 7, 8, header.data_start // 2, header.data_start - 1}
    for info in header.tensors.values():
        found |= {info.start, info.end - 1}
    return sorted(found)


@pytest.mark.usefixtures("quick")
def test_a_flipped_bit_of_any_class_is_found_and_named(
    out: Path, adapter: Path, tmp_path: Path
) -> None:
    """The rest of the bytes: ``make flips``."""
    count = 0
    for folder in (out, copy_of(adapter, tmp_path / "adapter")):
        shards = read_manifest(folder).shards
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            raw, owners = path.read_bytes(), {}
            if path.name in shards:
                tensors = read_header(path).tensors.values()
                owners = {place: t.name for t in tensors for place in (t.start, t.end - 1)}
            for place in classes(path):
                path.write_bytes(flipped(raw, place))
                problems = [text for text in verify(folder) if path.name in text]
                assert problems, (path, place)
                if place in owners:
                    assert any(f"tensor {owners[place]}" in text for text in problems), place
                count += 1
            path.write_bytes(raw)
        assert verify(folder) == []
    assert count > 200


@pytest.mark.usefixtures("quick")
def test_files_that_are_shorter_longer_empty_gone_or_renamed(out: Path) -> None:
    for path in sorted(out.iterdir()):
        raw = path.read_bytes()
        for data in (raw[:-1], raw[: len(raw) // 2], raw + b"\n", raw + bytes(512), b""):
            path.write_bytes(data)
            assert any(path.name in problem for problem in verify(out)), (path, len(data))
        path.unlink()
        assert any(path.name in problem for problem in verify(out)), path
        (out / "renamed").write_bytes(raw)
        assert path.name == MANIFEST or "renamed: is not in the manifest" in verify(out)
        (out / "renamed").rename(path)
    assert verify(out) == []


def link(path: Path, to: Path) -> None:
    path.symlink_to(to)


@pytest.mark.usefixtures("quick")
def test_whatever_is_added_is_found(out: Path, adapter: Path, tmp_path: Path) -> None:
    """Also what a loader would read before or instead of what is listed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "default.jinja").write_text("{{ messages }}")
    files = (
        "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.py",
        "adapter_config.json", "adapter_model.safetensors", "a/b/c", ".hidden.py", ".ssh/config",
        "additional_chat_templates/default.jinja", "tokenizer.model", "custom_generate/generate.py",
    )  # fmt: skip
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
        assert f"{name}: is not in the manifest" in verify(out), name
        (out / name).unlink()
    ways: dict[str, tuple[Callable[[Path], object], str]] = {
        "additional_chat_templates": (lambda p: link(p, elsewhere), "is a link to a folder"),
        "chat_template.jinja": (lambda p: link(p, elsewhere / p.name), "is not in the manifest"),
        "a/link.py": (lambda p: link(p, elsewhere / "default.jinja"), "is not in the manifest"),
        "pipe": (os.mkfifo, "is not in the manifest"),
    }
    for folder in (out, copy_of(adapter, tmp_path / "adapter")):
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
        (folder / "a").mkdir(exist_ok=True)
        for name, (make, says) in ways.items():
            make(folder / name)
            assert f"{name}: {says}" in verify(folder)
            (folder / name).unlink()
        assert verify(folder) == []


def test_what_changes_no_content_is_nothing(out: Path, source: Source) -> None:
    for path in out.iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o777)
    (out / "empty/folder").mkdir(parents=True)
    for name in (".gitattributes", ".cache/huggingface/x", ".git/config"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("of git, and of the Hub's client")
    blob = (out / "config.json").rename(out.parent / "blob")  # as in that client's cache
    (out / "config.json").symlink_to(blob)
    assert verify(out, source) == []
    blob.write_text(blob.read_text() + " ")
    assert "config.json: is not as recorded" in verify(out)


@pytest.mark.usefixtures("quick")
def test_files_of_another_conversion_are_found(out: Path, seeded: Path, tmp_path: Path) -> None:
    assert verify(seeded) == []
    ours = {path.name: path.read_bytes() for path in out.iterdir()}
    theirs = {path.name: path.read_bytes() for path in seeded.iterdir()}
    different = sorted(name for name in ours if ours[name] != theirs[name])
    assert {MANIFEST, CARD, SUMS, EDIT_FILE} < set(different)
    for name in different:  # one of B among those of A, and all but one
        (out / name).write_bytes(theirs[name])
        assert any(name in problem for problem in verify(out)), name
        mixed = copy_of(seeded, tmp_path / "mixed")
        (mixed / name).write_bytes(ours[name])
        assert any(name in problem for problem in verify(mixed)), name
        shutil.rmtree(mixed)
        (out / name).write_bytes(ours[name])
    for name in (MANIFEST, CARD, SUMS):  # the papers of B on the weights of A
        (out / name).write_bytes(theirs[name])
    found = {problem.split(":")[0] for problem in verify(out)}
    assert set(different) - {MANIFEST, CARD, SUMS} <= found
    for name in (MANIFEST, CARD, SUMS):
        (out / name).write_bytes(ours[name])
    first, second = sorted(out.glob("model-*.safetensors"))[:2]
    first.write_bytes(ours[second.name])
    second.write_bytes(ours[first.name])
    assert {first.name, second.name} <= {problem.split(":")[0] for problem in verify(out)}


# What someone repairs who knows the format. Each forger alters a folder and makes it agree again.


@contextmanager
def altered(folder: Path) -> Iterator[dict[str, Any]]:
    """The manifest of a folder, which is sealed again with what is changed in it."""
    manifest = load_manifest(folder)
    yield manifest
    put(folder, manifest)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor], list[str]], None]) -> None:
    """Alter tensors of the first shard with an edited one, then its records."""
    manifest = load_manifest(folder)
    edited = {entry["name"]: entry["shard"] for entry in manifest["edited"]}
    shard = next(iter(edited.values()))
    tensors = load_file(folder / shard)
    change(tensors, [name for name in tensors if name in edited])
    save_file(tensors, folder / shard, {"format": "pt"})
    record(folder, manifest, shard)
    for entry in manifest["edited"]:
        if entry["shard"] == shard:
            raw = tensors[entry["name"]].contiguous().view(torch.uint8).numpy().tobytes()
            entry["sha256_after"] = hashlib.sha256(raw).hexdigest()
    put(folder, manifest)


def untouched_weight(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], edited: list[str]) -> None:
        name = next(name for name in tensors if name not in edited)
        tensors[name] = -tensors[name]

    edit(folder, change)


def edited_weight(folder: Path) -> None:
    """Its sign: it stays orthogonal to U, and of the same norm."""

    def change(tensors: dict[str, torch.Tensor], edited: list[str]) -> None:
        tensors[edited[0]] = -tensors[edited[0]]

    edit(folder, change)


def edit_undone(folder: Path) -> None:
    """An edited weight gets back a tenth of something along U."""
    U = load_file(folder / EDIT_FILE)["U"]

    def change(tensors: dict[str, torch.Tensor], edited: list[str]) -> None:
        name = next(name for name in edited if tensors[name].ndim == 2)
        back = tensors[name].float() + 0.1 * U[:, :1] @ torch.ones(1, tensors[name].shape[1])
        tensors[name] = back.to(tensors[name].dtype)

    edit(folder, change)


def config(folder: Path, **changes: object) -> None:
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(data))
    reseal(folder, "config.json", copied=True)


def added(folder: Path, name: str) -> None:
    """A file that is recorded, and as the source's."""
    (folder / name).write_text("{}")
    reseal(folder, name, copied=True)


def dropped(folder: Path) -> None:
    with altered(folder) as manifest:
        for place in (manifest["files"], manifest["source"]["files"]):
            del place["generation_config.json"]
        (folder / "generation_config.json").unlink()


def claimed(folder: Path, **changes: object) -> None:
    """Another value for a key of the first edited tensor, or of its measures."""
    with altered(folder) as manifest:
        entry = manifest["edited"][0]
        for key, value in changes.items():
            (entry if key in entry else entry["measures"])[key] = value


def excused(folder: Path) -> None:
    """An altered config that the edit is said to have patched."""
    changes = {"rope_theta": 1.0}
    config(folder, **changes)
    with altered(folder) as manifest:
        manifest["edit"]["patches"] = {"config.json": changes}


def recorded(folder: Path, manifest: dict[str, Any], **more: torch.Tensor) -> None:
    """Put tensors into the edit's file, and a manifest that knows them into its place."""
    save_file(load_file(folder / EDIT_FILE) | more, folder / EDIT_FILE, {"format": "pt"})
    record(folder, manifest, EDIT_FILE)
    put(folder, manifest)


def brought(folder: Path) -> None:
    """A file of code that the edit is said to have added."""
    (folder / "evil.py").write_text("{}")
    manifest = load_manifest(folder)
    record(folder, manifest, "evil.py")
    manifest["edit"]["files"] = ["evil.py"]
    content = torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)
    recorded(folder, manifest, **{"file.evil.py": content})


def replaced(folder: Path) -> None:
    """Edited weights with another sign, which the edit is said to have put in their place."""

    def change(tensors: dict[str, torch.Tensor], edited: list[str]) -> None:
        tensors |= {name: -tensors[name] for name in edited}

    edit(folder, change)
    manifest = load_manifest(folder)
    entry = next(entry for entry in manifest["edited"] if len(entry["shape"]) == 2)
    new = load_file(folder / entry["shard"])[entry["name"]]
    entry |= {"kind": "replace", "tensors": {"new": "new"}, "measures": {}}
    entry |= {"relative_change": 2.0, "rounding_error": 0.0}
    recorded(folder, manifest, new=new)


def fewer_edits(folder: Path) -> None:
    """Layer 4 is said not to have been edited, everywhere."""
    with altered(folder) as manifest:
        manifest["edited"] = [entry for entry in manifest["edited"] if entry["layer"] != 4]
        manifest["method"]["options"]["layers"] = [2, 3]
        manifest["run"]["options"]["layers"] = "2-3"


def another_basis(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / EDIT_FILE)
    save_file(tensors | {"U": change(tensors["U"]).contiguous()}, folder / EDIT_FILE)
    reseal(folder, EDIT_FILE)


def scaled_basis(folder: Path) -> None:
    another_basis(folder, lambda U: U * 0.5)


def empty_basis(folder: Path) -> None:
    """Everything is orthogonal to nothing."""
    another_basis(folder, lambda U: U[:, :0].clone())


def exempted(folder: Path) -> None:
    """A tensor that was altered is passed off as the scales of an edited weight."""
    untouched_weight(folder)
    with altered(folder) as manifest:
        entry = manifest["edited"][0]
        header = read_header(folder / entry["shard"])
        edited = {entry["name"] for entry in manifest["edited"]}
        other = next(name for name in header.tensors if name not in edited)
        entry["requantized"] = {
            "scales": other, "shard": entry["shard"], "block": [1, 1],
            "sha256_before": "0" * 64, "sha256_after": "0" * 64,
        }  # fmt: skip


def card(folder: Path) -> None:
    with altered(folder):
        text = (folder / CARD).read_text().replace("license: mit", "license: apache-2.0")
        (folder / CARD).write_text(text)


def measured(folder: Path) -> None:
    with altered(folder) as manifest:
        manifest["pairs"]["count"] = 100_000


FORGERS: dict[str, tuple[Callable[[Path], object], bool, bool]] = {
    "an untouched weight": (untouched_weight, False, True),
    "the sign of an edited weight": (edited_weight, False, True),
    "an edit undone": (edit_undone, True, True),
    "another config": (lambda f: config(f, rope_theta=1.0), False, True),
    "auto_map": (lambda f: config(f, auto_map={"AutoConfig": "evil.Config"}), False, True),
    "a file of code": (lambda f: added(f, "evil.py"), False, True),
    "a chat template": (lambda f: added(f, "chat_template.jinja"), False, True),
    "other weights": (lambda f: added(f, "pytorch_model.bin"), True, True),
    "a second set of weights": (lambda f: added(f, "model.safetensors"), True, True),
    "a pointer to another model": (lambda f: added(f, "adapter_config.json"), True, True),
    "a file left out": (dropped, False, True),
    "leakage": (lambda f: claimed(f, leakage=0.0), True, True),
    "a larger effect": (lambda f: claimed(f, energy_removed=0.9), True, True),
    "a smaller change": (lambda f: claimed(f, relative_change=1e-6), True, True),
    "another norm": (lambda f: claimed(f, norm=1e9), True, True),
    "fewer edits than there were": (fewer_edits, True, True),
    "a basis that is not orthonormal": (scaled_basis, True, True),
    "an empty basis": (empty_basis, True, True),
    "a weight passed off as scales": (exempted, True, True),
    "another config, and a patch that makes it": (excused, True, True),
    "a file of code, and an edit that adds it": (brought, True, True),
    "another weight, and an edit that puts it there": (replaced, True, True),
    "another licence in the card": (card, False, False),
    "a measurement": (measured, False, False),
}
"""What is forged, how, whether it is found without the source, and with it. A key finds all."""


@pytest.mark.parametrize("name", FORGERS)
def test_who_repairs_all_that_he_can_is_found_by_this_much(
    name: str, out: Path, source: Source, key: Path
) -> None:
    forge, without, within = FORGERS[name]
    load_signer(key).sign(out, "tiny")
    public = load_public_key(key.with_suffix(".pub"))
    assert public.check(out) == []
    forge(out)
    problems = verify(out)
    assert bool(problems) == without, problems
    assert not any("SHA256SUMS" in problem or "does not state" in problem for problem in problems)
    assert bool(verify(out, source)) == within
    assert public.check(out)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_key(tmp_path_factory.mktemp("key"))


@pytest.mark.usefixtures("quick")
def test_what_a_signature_does_not_cover_is_found_without_it(
    out: Path, key: Path, tmp_path: Path
) -> None:
    load_signer(key).sign(out, "tiny")
    public = load_public_key(key.with_suffix(".pub"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/default.jinja").write_text("{{ messages }}")
    (out / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    (out / ".cache").mkdir()
    (out / ".cache/x").write_text("of the Hub's client")
    assert public.check(out) == []  # the package follows no links to folders
    assert verify(out) == ["additional_chat_templates: is a link to a folder"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("output", ["checkpoint", "adapter"])
def test_a_forged_value_is_found_or_is_a_claim(
    output: str, out: Path, adapter: Path, source: Source, tmp_path: Path
) -> None:
    """Of each kind of value in a manifest; each value of each: ``make flips``."""
    folder = out if output == "checkpoint" else copy_of(adapter, tmp_path / "adapter")
    manifest = load_manifest(folder)
    kinds = {kind_of(path): (path, value) for path, value in leaves(manifest)}
    count = 0
    for kind, (path, value) in kinds.items():
        if kind.startswith(CLAIMS) or ("prefixes" in kind and not kind.endswith("head.weight")):
            continue  # nothing contradicts it; one of them is as good as all
        other = next(o for o in others(value) if type(o) is not type(value) or o != value)
        put(folder, forged(manifest, path, other))
        told = BEFORE if output == "checkpoint" else (*BEFORE, "architecture.", "method.")
        if not kind.startswith(told):  # an adapter has no config of the model
            assert verify(folder), (kind, other)
        assert verify(folder, source), (kind, other)
        count += 1
    assert count > 50
    put(folder, manifest)
    assert verify(folder, source) == []


def test_two_keys_and_no_numbers_are_no_manifest(out: Path) -> None:
    text = (out / MANIFEST).read_text()
    for old, new, says in (
        ('"files": {', '"files": {}, "files": {', "it has the key files twice"),
        ('"schema_version": 1', '"schema_version": NaN', "it has the number NaN, which is none"),
        ('"num_pairs": 64', '"num_pairs": 64.0', "expected `int | null`, got `float`"),
    ):
        (out / MANIFEST).write_text(text.replace(old, new, 1))
        (problem, *_) = verify(out)
        assert says in problem


CODE = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).touch()
class Config(LlamaConfig):
    pass
"""


def test_code_runs_only_in_a_folder_that_is_whole(
    converted: tuple[Path, Path],
    key: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even where it is trusted: what is trusted is the author's."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    marker = tmp_path / "ran"
    source = copy_of(converted[0], tmp_path / "source")
    data = json.loads((source / "config.json").read_text())
    data["auto_map"] = {"AutoConfig": "configuration_own.Config"}
    (source / "config.json").write_text(json.dumps(data))
    (source / "configuration_own.py").write_text(CODE.format(marker=str(marker)))
    convert(tiny_recipe(source), tmp_path / "out")
    assert not marker.exists()
    load_signer(key).sign(tmp_path / "out", "tiny")
    public = key.with_suffix(".pub")
    args = ("verify", tmp_path / "out", "--trust-remote-code", "--key", public)
    cli(*args, code=0)
    assert marker.exists()
    marker.unlink()
    code = tmp_path / "out/configuration_own.py"
    code.write_text(code.read_text() + "\n# altered\n")
    cli(*args, code=8)
    assert not marker.exists()
    reseal(tmp_path / "out", code.name, copied=True)  # all agrees again, but nobody signed that
    cli(*args, code=8)
    assert not marker.exists()


class Sent(Exception):  # noqa: N818 - it is not an error
    """Everything was uploaded."""


@pytest.mark.parametrize("name", [MANIFEST, CARD, SUMS, SIGNATURE, "config.json", INDEX, None])
def test_what_is_uploaded_is_what_was_verified(
    name: str | None, out: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes between the two is noticed, also those that no manifest lists."""
    load_signer(key).sign(out, "tiny")

    def verified(folder: Path, **given: Any) -> list[str]:
        problems = verify(folder, **given)
        if name is not None:
            path = folder / name
            text = path.read_text()
            path.write_text(text.replace("0.", "1.", 1) if name == MANIFEST else text + " ")
        return problems

    class Upload(upload.Upload):
        def __init__(self, place: Publication) -> None:
            super().__init__(place)
            self._api.preupload_lfs_files = lambda *_, **__: None  # type: ignore[method-assign]

        def commit(self, message: str) -> upload.Published:
            raise Sent

    monkeypatch.setattr(pushing, "verify", verified)
    monkeypatch.setattr(upload, "open_repo", lambda place: None)
    monkeypatch.setattr(pushing, "Upload", Upload)
    place = Publication(repo_id="someone/tiny", exists=True)
    changed = f"{name} changed while it was uploaded"
    with pytest.raises(Sent) if name is None else refused(PublishError, what=changed):
        pushing.push(out, place)


def test_a_recorded_lie_is_not_replayed(
    out: Path, converted: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    """Nothing is written from a record whose shards do not follow from it."""
    untouched_weight(out)
    result = cli("replay", out, tmp_path / "again", "--source", converted[0], code=8)
    assert "the replay gave other bytes than recorded" in result.stderr
    scaled_basis(out)
    result = cli("diff", converted[0], out, "--json")
    changed = json.loads(result.stdout)["changed"]
    shares = [entry["measured"]["in_span"] for entry in changed]
    assert max(share for share in shares if share) > 0.9  # of the span, whatever the length
    empty_basis(out)
    cli("replay", out, tmp_path / "again", "--source", converted[0], code=8, says="U has 0 columns")
    assert not (tmp_path / "again").exists()
    cli("diff", converted[0], out, code=0)
