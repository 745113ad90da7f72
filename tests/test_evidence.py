"""What a manifest says of strengths and evidence, against the edit: found, or said to be unproved.

Each lie is told everywhere that it is recorded, and the folder is sealed again.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter.checkpoints.names import EDIT_FILE
from converter.checkpoints.resolve import resolve
from converter.entrypoints import verify as verification
from converter.entrypoints.convert import convert
from converter.entrypoints.verify import verify
from converter.release.evidence import differing, unproved
from tests.builders.adversary import copy_of, load_manifest, put, record
from tests.builders.invoke import Cli
from tests.builders.models import TINY, Checkpoints, tiny_recipe

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
FUSION = {"scale": "0.2", "rank": "4", "tokens": "300", "depth": "2"}
GLOSS = {"rank": "2", "layers": "2-4", "protect_shared": "4", "protect_own": "2", "per_layer": "2",
         "directions": "8"}  # fmt: skip
RUNS: dict[str, tuple[str, str, dict[str, str]]] = {
    "gloss": ("llama", "gloss", GLOSS),
    "gloss-paper": ("llama", "gloss-paper", TINY),
    "profs": ("llama", "profs", {"rank": "2"}),
    "random": ("llama", "random", {"rank": "2", "protect_shared": "0"}),
    "destein": ("llama", "destein", {"alpha": "0.1"}),
    "destein-bias": ("gpt2", "destein", {"alpha": "0.1"}),
    "fusion": ("llama", "fusion", FUSION),
    "fusion-tied": ("llama-tied", "fusion", FUSION),
    "model-surgery": ("llama", "model-surgery", {"scale": "0.5"}),
    "dinm": ("chat", "dinm", {"learning_rate": "0.05", "steps": "3"}),
    "both": ("llama", "profs+destein", {"profs.rank": "2", "destein.alpha": "0.1"}),
}
"""What is converted: kind of model, method, options."""


@pytest.fixture(scope="module")
def made(
    checkpoints: Checkpoints, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """A source and what a run of ``RUNS`` made of it, once. Read only."""

    @cache
    def make(name: str) -> tuple[Path, Path]:
        kind, method, options = RUNS[name]
        root = tmp_path_factory.mktemp(name)
        if kind == "chat":
            source = copy_of(checkpoints("llama"), root / "chat")
            (source / "chat_template.jinja").write_text(TEMPLATE)
        else:
            source = checkpoints(kind, torch.bfloat16)
        convert(tiny_recipe(source, num_pairs=64, method=method, options=options), root / "out")
        return source, root / "out"

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers does not load the folder; it could only find more."""
    monkeypatch.setattr(verification, "_check_loading", lambda *_: iter(()))


def stronger(manifest: dict[str, Any], number: int = 0) -> None:
    """Another strength in all places that have it, of one of several methods."""
    steps = manifest.get("steps") or [manifest]
    step = steps[number]
    key, before = step["method"]["strength"], step["choice"]["strength"]
    after = before / 2 if isinstance(before, float) or key == "part" else before + 1
    step["choice"]["strength"] = step["method"]["options"][key] = after
    typed = key if len(steps) == 1 else f"{step['method']['name']}.{key}"
    manifest["method"]["options"][typed] = after
    manifest["run"]["options"][typed] = str(after)
    manifest["choice"] = steps[-1]["choice"]


@pytest.mark.parametrize("name", [*RUNS])
def test_a_strength_is_that_of_the_edit_wherever_another_is_said(
    name: str, made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Nothing but the edit contradicts it: run, method, options and choice agree."""
    source, out = made(name)
    original = resolve(str(source))
    assert verify(out) == verify(out, original) == []
    for number in range(len(load_manifest(out).get("steps") or [1])):
        folder = copy_of(out, tmp_path / str(number))
        manifest = load_manifest(folder)
        stronger(manifest, number)
        put(folder, manifest)
        method = (manifest.get("steps") or [manifest])[number]["method"]
        says = f"the {method['strength']} of {method['name']} is recorded as"
        for problems in (verify(folder), verify(folder, original)):
            assert any(says in problem for problem in problems), problems


def halved(manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Vectors of alpha = 1 that are half as long, and an alpha that is twice as large."""
    tensors["evidence.steps"] = tensors["evidence.steps"] / 2
    stronger(manifest)


def turned(manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["evidence.probe"] = tensors["evidence.probe"].flip(0)


def payload(manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["evidence.payload"] = torch.zeros(3)


def of(place: str, value: Any) -> Callable[..., None]:
    def change(manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        *path, last = place.split(".")
        inner = manifest["method"]["evidence"]
        for key in path:
            inner = inner[int(key) if isinstance(inner, list) else key]
        assert last not in inner or inner[last] != value
        inner[last] = value

    return change


def option(key: str, value: Any) -> Callable[..., None]:
    def change(manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        manifest["method"]["options"][key] = value
        manifest["run"]["options"][key] = str(value)

    return change


LIES: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("destein", payload, "holds a tensor evidence.payload that destein does not keep"),
    ("both", payload, "holds a tensor evidence.payload that no method keeps"),
    ("destein", halved, "the recorded vectors: expected chunks of their norms"),
    ("destein", of("chunks", 8), "chunks is not what the edit makes it"),
    ("destein", of("layers.1.chunks_left_alone", 3), "layers.#.chunks_left_alone is not what"),
    ("destein", of("layers.9", {}), "layers.# is not what the edit makes it"),
    ("destein", option("direction", "causal"), "direction is not what the edit makes it"),
    ("fusion", of("singular_values", [2.0, 1.0, 0.5, 0.2]), "singular_values is not what"),
    ("fusion", option("rank", 5), "-o rank: expected 4, by the edit, found 5"),
    ("model-surgery", turned, "what is added to the rows: expected the recorded probe"),
    ("model-surgery", of("median_row", 9.0), "median_row is not what the edit makes it"),
    ("model-surgery", of("largest_cosine", -0.9), "largest_cosine is not what the edit makes it"),
    ("model-surgery", option("rows", "random"), "the rows that are changed"),
    ("model-surgery", option("count", 7), "the rows that are changed"),
    ("dinm", of("relative_change", 0.9), "relative_change is not what the edit makes it"),
    ("dinm", of("largest_change", 0.9), "largest_change is not what the edit makes it"),
    ("dinm", of("rank", 77), "rank is not what the edit makes it"),
    ("dinm", of("control_layer", 99), "control_layer is not what the edit makes it"),
    ("dinm", option("suffix", "Be kind."), "the suffix of chat_template.jinja: expected Be kind."),
    ("dinm", of("nll", [1.0]), "the steps of the training"),
    ("profs", of("candidates.0.kept", False), "candidates.#.kept is not what"),
    ("random", option("draw", 1), "the basis is not the one that is drawn with the seed"),
    ("gloss", option("per_layer", 3), "the evidence of gloss is not what that method keeps"),
    ("gloss", option("top_tokens", 11), "-o top_tokens: expected 10, as recorded, found 11"),
    (
        "gloss-paper",
        option("alpha", 0.5),
        "gloss-paper: rank 4 is larger than the candidates",
    ),
)
"""Of a run: a lie, and how it is named."""


@pytest.mark.parametrize("number", range(len(LIES)))
def test_evidence_that_the_edit_contradicts_is_named(
    number: int, made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    name, lie, says = LIES[number]
    _, out = made(name)
    folder = copy_of(out, tmp_path / "out")
    manifest, tensors = load_manifest(folder), load_file(folder / EDIT_FILE)
    lie(manifest, tensors)
    save_file(tensors, folder / EDIT_FILE, {"format": "pt"})
    record(folder, manifest, EDIT_FILE)
    put(folder, manifest)
    problems = verify(folder)
    assert any(says in problem for problem in problems), problems


def silent(source: Path, folder: Path, *parts: str) -> Path:
    """A copy whose layer 3 writes nothing by some projections, as a block that is put in."""
    copy_of(source, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if ".3." in name and any(part in name for part in parts):
                tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, path, {"format": "pt"})
    return folder


def test_what_destein_really_did_is_believed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Bits that float16 has not, and heads that write nothing and get no vector."""
    half = checkpoints("llama", torch.float16)
    still = silent(checkpoints("llama"), tmp_path / "still", "o_proj")
    for source, options in (
        (half, {"alpha": "0.0001"}),
        (still, {"alpha": "0.05", "direction": "causal"}),
    ):
        out = tmp_path / options["alpha"]
        convert(tiny_recipe(source, num_pairs=64, method="destein", options=options), out)
        assert verify(out) == verify(out, resolve(str(source))) == []


def test_a_large_scale_on_a_head_that_is_nearly_singular_is_not_checked(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """The rounding of a head that has grown says little of the one before."""
    source, out = copy_of(checkpoints("llama", torch.bfloat16), tmp_path / "source"), tmp_path / "o"
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        if "lm_head.weight" in tensors:
            U, S, V = torch.linalg.svd(tensors["lm_head.weight"].float(), full_matrices=False)
            flat = (U * S[0] * torch.logspace(0, -2, len(S))) @ V
            tensors["lm_head.weight"] = flat.bfloat16().contiguous()
            save_file(tensors, path, {"format": "pt"})
    options = {**FUSION, "scale": "50"}
    convert(tiny_recipe(source, num_pairs=64, method="fusion", options=options), out)
    assert verify(out) == verify(out, resolve(str(source))) == []


def test_cosines_near_zero_are_known_to_the_rounding_of_edited_rows(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Half of the rows are chosen, so that the largest cosine of these is next to nothing."""
    source, out = checkpoints("llama", torch.bfloat16), tmp_path / "out"
    options = {"count": "143", "scale": "1"}
    convert(tiny_recipe(source, num_pairs=64, method="model-surgery", options=options), out)
    assert verify(out) == verify(out, resolve(str(source))) == []


def test_a_step_whose_strength_is_not_the_rank_of_its_edit_is_found(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = copy_of(made("both")[1], tmp_path / "out")
    manifest = load_manifest(folder)
    manifest["steps"][0]["choice"]["strength"] = 3
    put(folder, manifest)
    says = "the rank of profs is recorded as 3, and its edit has 2"
    assert any(says in problem for problem in verify(folder))


def test_what_nothing_proves_is_said_to_be_unproved(
    made: Callable[[str], tuple[Path, Path]], cli: Cli, tmp_path: Path
) -> None:
    """Whoever alters it everywhere is not found, and whoever reads the answer knows that."""
    source, out = made("both")
    told = cli("verify", out, "--source", source, code=0).stdout
    assert "recorded, not checked: " in told
    assert "split_cosine of destein" in told
    known = json.loads(cli("verify", out, "--json", code=0).stdout)["recorded_not_checked"]
    assert "steps.1.method.evidence.layers.#.split_cosine" in known
    assert not {"steps.0.method.evidence.hidden_size", "steps.1.method"} & {*known}
    folder = copy_of(out, tmp_path / "out")
    manifest = load_manifest(folder)
    manifest["steps"][1]["method"]["evidence"]["layers"]["1"]["split_cosine"] = 1.0
    manifest["pairs"]["count"] = 100_000
    put(folder, manifest)
    assert verify(folder, resolve(str(source))) == []
    assert "pairs" in known


def test_numbers_agree_to_rounding_and_all_else_exactly() -> None:
    told = {"a": 1.0, "b": [1.0, 1e-9], "c": {"1": {"x": 2, "y": 3}}, "d": "text", "e": [{"f": 1}]}
    implied = {"a": 1.001, "b": [0.999, 0.0], "c": {"1": {"x": 2}}, "e": [{"f": 1}]}
    assert list(differing(implied, told)) == []
    assert list(unproved(implied, told)) == ["c.#.y", "d"]
    for wrong, path in (
        ({"a": 1.1}, "a"), ({"b": [1.0]}, "b"), ({"b": [1.0, 0.1]}, "b"),
        ({"c": {"1": {"x": 3}}}, "c.#.x"), ({"c": {"2": {}}}, "c.#"), ({"d": "other"}, "d"),
        ({"e": [{"f": True}]}, "e.#.f"), ({"z": 1}, "z"), ({"a": "1"}, "a"), ({"d": {}}, "d"),
    ):  # fmt: skip
        assert next(differing(wrong, told)) == path
