"""Verification finds one wrong byte anywhere, and names it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converter.checkpoints.names import EDIT_FILE
from converter.checkpoints.resolve import resolve
from converter.entrypoints.verify import verify
from converter.release.manifest import read_manifest
from tests.builders.adversary import forged, load_manifest, put, reseal
from tests.builders.invoke import Cli
from tests.fuzz import skeleton


@pytest.fixture
def out(converted: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(converted[1], tmp_path / "out")


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x01
    path.write_bytes(raw)


def test_what_was_converted_verifies(converted: tuple[Path, Path], cli: Cli) -> None:
    source, out = converted
    assert verify(out) == []
    assert verify(out, resolve(str(source))) == []
    result = cli("verify", out, "--source", source, "--json", code=0)
    told = json.loads(result.stdout)
    assert "pairs" in told.pop("recorded_not_checked")
    assert told == {
        "verified": True,
        "problems": [],
        "destination": str(out),
        "source": str(source),
    }


def test_what_the_guard_says_of_other_words_must_fit_together(tmp_path: Path) -> None:
    """All of its measurements are of them or none is, and a gate has the guard's number."""
    skeleton.write_output(tmp_path)
    known = verify(tmp_path)  # it has no tokenizer
    number = {"value": 1.05, "error": 0.01}
    manifest = load_manifest(tmp_path)
    guard = manifest["guard"]
    guard["edit"] = {**guard["edit"], "context_ratio": number}

    def says() -> str:
        put(tmp_path, manifest)
        return "; ".join(problem for problem in verify(tmp_path) if problem not in known)

    false = "the guard's measurements are not of the same texts"
    assert false in says()
    guard["context_tokens"] = 7
    assert false in says()
    guard["controls"] = [{**control, "context_ratio": number} for control in guard["controls"]]
    assert says() == ""
    gate = {"gate": "--max-informal-perplexity-ratio", "by": "guard", "limit": 1.1}
    manifest["gates"] = [{**gate, "measured": 1.05}]
    assert says() == ""
    manifest["gates"] = [{**gate, "measured": 1.04}]
    assert "the guard has not measured what the gate says" in says()
    manifest["gates"] = [{**gate, "measured": 1.2}]
    assert "--max-informal-perplexity-ratio 1.1 was not passed" in says()


def test_a_weight_that_was_not_edited_is_not_orthogonal(
    converted: tuple[Path, Path], out: Path
) -> None:
    source, _ = converted
    name = "model.layers.3.mlp.down_proj.weight"
    entry = next(e for e in read_manifest(out).edited if e.name == name)
    shutil.copyfile(source / entry.shard, out / entry.shard)
    reseal(out, entry.shard)
    problems = verify(out)
    assert any(f"tensor {name} is not orthogonal to U" in problem for problem in problems)


def test_with_the_source_a_resealed_change_is_found_too(
    converted: tuple[Path, Path], out: Path
) -> None:
    source = resolve(str(converted[0]))
    edited = {entry.name: entry.shard for entry in read_manifest(out).edited}
    shard = next(iter(edited.values()))
    tensors = load_file(out / shard)
    for name, says in (
        (next(n for n in tensors if n not in edited), "differs from that of the source"),
        (next(n for n in tensors if n in edited), "is not the source's with the recorded edit"),
    ):
        altered = dict(tensors)
        altered[name] = tensors[name] * 1.02  # still orthogonal to U, if it was
        save_file(altered, out / shard, {"format": "pt"})
        reseal(out, shard)
        assert not any(f"{shard}: is not" in problem for problem in verify(out))
        problems = verify(out, source)
        assert any(f"{shard}: tensor {name} {says}" in problem for problem in problems)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("edited", 0, "sha256_after"), "0" * 64, "has another sha256 than recorded"),
        (("edited", 0, "sha256_before"), "0" * 64, "was another one before the edit"),
        (("edited", 0, "norm"), 1e300, "had another norm before the edit"),
        (("source", "files", "config.json", "sha256"), "0" * 64, "config.json of the source is"),
        (("activations", "key"), "0" * 64, "the key of the activations is not that of"),
        (("edited",), [], "the list of edited tensors disagree"),
    ],
)
def test_false_records_are_found(
    path: tuple[str | int, ...], value: object, says: str, converted: tuple[Path, Path], out: Path
) -> None:
    put(out, forged(load_manifest(out), path, value))
    assert any(says in problem for problem in verify(out, resolve(str(converted[0]))))


def test_a_copied_file_that_was_altered_and_resealed_is_found(out: Path) -> None:
    (out / "generation_config.json").write_text("{}")
    reseal(out, "generation_config.json")
    assert "generation_config.json: was to be a copy of the source's and is not" in verify(out)


def test_a_basis_that_is_not_orthonormal_is_found(out: Path) -> None:
    tensors = load_file(out / EDIT_FILE)
    tensors["U"] = tensors["U"] * 0.99
    save_file(tensors, out / EDIT_FILE)
    reseal(out, EDIT_FILE)
    assert any("U is not orthonormal" in problem for problem in verify(out))


def test_a_manifest_that_points_out_of_the_folder_is_refused(out: Path) -> None:
    (out.parent / "secret").write_text("x")
    manifest = load_manifest(out)
    manifest["files"]["../secret"] = {"sha256": "0" * 64, "bytes": 1}
    put(out, manifest)
    assert "../secret: lies outside the folder" in verify(out)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("name",), "no.such.tensor", "tensor no.such.tensor is recorded as edited and is not"),
        (("tensors", "U"), "U.99", "holds no U.99"),
        (("axis",), 1, "is recorded as edited and is not that weight"),
        (("shard",), "x.safetensors", "is recorded as edited and is not that weight"),
        (("kind",), "remove-all", "there is no kind of edit remove-all"),
        (("tensors",), {"V": "U"}, "remove-subspace takes the tensors U"),
    ],
)
def test_a_manifest_that_names_what_is_not_there_is_refused(
    path: tuple[str, ...], value: object, says: str, out: Path
) -> None:
    put(out, forged(load_manifest(out), ("edited", 0, *path), value))
    assert says in verify(out)[0]


def test_a_folder_without_a_manifest_does_not_verify(tmp_path: Path, cli: Cli) -> None:
    result = cli("verify", tmp_path, code=8)
    assert "has no gloss_manifest.json; only what gloss-convert wrote" in result.stderr
