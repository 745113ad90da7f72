"""What names a repo of the Hub: addresses as people paste them, folders of its client's cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from converter.calibration.datasets import is_dataset
from converter.checkpoints.resolve import resolve
from converter.errors import CheckpointError, ConverterError, OptionError, SourceError
from converter.hub.addresses import model_place, parse_address, repo_named, settled, snapshot_of
from converter.recipe import Recipe
from tests.builders.errors import refused
from tests.builders.models import TINY_ARGS

Checkpoints = Callable[..., Path]
Cli = Callable[..., Result]

PLACES = {
    "https://huggingface.co/acme/tiny": ("acme/tiny", ""),
    "HTTP://www.HuggingFace.co:443/acme/tiny/?library=transformers#usage": ("acme/tiny", ""),
    "huggingface.co/acme/tiny": ("acme/tiny", ""),
    "hf.co/acme/tiny/tree/v1/": ("acme/tiny@v1", ""),
    "https://me:secret@hf.co/acme/tiny.git": ("acme/tiny", ""),
    "git@hf.co:acme/tiny": ("acme/tiny", ""),
    "https://huggingface.co/acme/tiny/tree/main/sub/a%20b": ("acme/tiny@main", "sub/a b"),
    "https://huggingface.co/acme/tiny/tree/refs%2Fpr%2F3": ("acme/tiny@refs/pr/3", ""),
    "https://huggingface.co/acme/tiny/resolve/main/a/config.json?download=true": (
        "acme/tiny@main", "a",
    ),
    "https://huggingface.co/acme/tiny/blob/main/LICENSE": ("acme/tiny@main", ""),
    "https://huggingface.co/gpt2": ("gpt2", ""),
    "https://huggingface.co/gpt2/tree/main": ("gpt2@main", ""),
    "hf://acme/tiny@v1/sub": ("acme/tiny@v1", "sub"),
    "hf://models/acme/tiny/sub/config.json": ("acme/tiny", "sub"),
    "acme/tiny/tree/main/sub": ("acme/tiny@main", "sub"),
    # no addresses:
    "acme/tiny@v1": ("acme/tiny@v1", ""),
    "/a/b/tree/main": ("/a/b/tree/main", ""),
    "demo": ("demo", ""),
}  # fmt: skip


@pytest.mark.parametrize("text", PLACES)
def test_an_address_is_a_repo_a_revision_and_a_folder(text: str) -> None:
    assert model_place(text) == PLACES[text]
    assert model_place(*model_place(text)) == PLACES[text]


@pytest.mark.parametrize(
    ("text", "kind", "fields"),
    [
        ("https://huggingface.co/datasets/acme/pairs", SourceError, {"expected": "a model"}),
        ("datasets/acme/pairs", SourceError, {"expected": "a model"}),
        ("https://huggingface.co/spaces/acme/x", SourceError, {"what": "...is a space..."}),
        ("https://hub.elsewhere.org/acme/tiny", SourceError, {"found": "the server hub.else..."}),
        ("s4://bucket/tiny", SourceError, {"found": "s4"}),
        ("http://[acme/tiny", SourceError, {"hint": "download the model..."}),
        ("file:///srv/my%20model", SourceError, {"hint": "...: /srv/my model"}),
        ("https://huggingface.co/acme/tiny/discussions/3", SourceError, {"hint": "copy the..."}),
        ("https://huggingface.co/", SourceError, {"hint": "copy the address..."}),
        ("https://huggingface.co/acme/tiny/tree/v1@v2", SourceError, {"what": "...two revisions"}),
        (
            "https://huggingface.co/acme/tiny/tree/main/../x",
            SourceError,
            {"what": "...leads out..."},
        ),
        (
            "hf.co/acme/tiny/blob/main/q4.gguf",
            CheckpointError,
            {"hint": "...acme/tiny q4.gguf;..."},
        ),
    ],
)
def test_what_is_no_address_of_a_model_is_one_sentence(
    text: str, kind: type[ConverterError], fields: dict[str, str]
) -> None:
    with refused(kind, **fields):
        model_place(text)


def test_a_subfolder_is_not_given_twice() -> None:
    page = "https://huggingface.co/acme/tiny/tree/main/a"
    assert model_place(page, "a/") == ("acme/tiny@main", "a")
    with refused(OptionError, what="--subfolder", expected="a, which...", found="b"):
        model_place(page, "b")


def test_the_endpoint_of_another_hub_is_an_address_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.acme.org/hf")
    assert model_place("https://hub.acme.org/hf/acme/tiny/tree/main") == ("acme/tiny@main", "")


def test_a_path_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("acme/tiny/tree/main", "hf.co/acme/tiny", "datasets/acme/pairs"):
        Path(name).mkdir(parents=True)
        assert model_place(name) == (name, "")
        assert not is_dataset(name)
    with refused(SourceError, hint="check the path, or give acme/other for..."):
        parse_address("models/acme/other", "model")


def test_a_file_of_a_dataset_is_kept_with_its_revision() -> None:
    page = "https://huggingface.co/datasets/acme/pairs/blob/v2/data/train.tsv"
    place = parse_address(page, "dataset")
    assert place.text == "hf://datasets/acme/pairs@v2/data/train.tsv"
    assert parse_address(place.text, "dataset") == place
    assert is_dataset(page)
    assert is_dataset("datasets/acme/pairs")
    assert not is_dataset("datasets/acme/pairs.tsv")  # a file that is not there
    with refused(SourceError, expected="a dataset"):
        parse_address("https://huggingface.co/acme/tiny", "dataset")


def test_a_recipe_records_the_short_form_and_no_secret() -> None:
    page = "https://me:secret@huggingface.co/acme/tiny/tree/v1/sub?token=x"
    recipe = settled(
        Recipe(source=page, pairs="hf.co/datasets/acme/pairs", base_model="hf.co/acme/base")
    )
    found = (recipe.source, recipe.subfolder, recipe.pairs, recipe.base_model)
    assert found == ("acme/tiny@v1", "sub", "acme/pairs", "acme/base")
    assert settled(recipe) == recipe


def test_where_a_repo_is_named_a_revision_is_refused() -> None:
    assert repo_named("REPO", "https://huggingface.co/acme/tiny/tree/main") == "acme/tiny"
    assert repo_named("REPO", "tiny") == "tiny"
    for text in (
        "hf.co/acme/tiny/tree/v1",
        "hf.co/acme/tiny/blob/main/x.json",
        "https://x.org/a/b",
    ):
        with refused(OptionError, what="REPO", found=text):
            repo_named("REPO", text)


COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (f"models--acme--tiny/snapshots/{COMMIT}", ("acme/tiny", "")),
        (f"models--acme--tiny/snapshots/{COMMIT}/a/b", ("acme/tiny", "a/b")),
        (f"models--gpt2/snapshots/{COMMIT}", ("gpt2", "")),
        (f"datasets--acme--tiny/snapshots/{COMMIT}", None),
        (f"datasets--squad/snapshots/{COMMIT}", None),
        (f"spaces--acme--tiny/snapshots/{COMMIT}", None),
        (f"models--a--b--c/snapshots/{COMMIT}", None),
        ("models--acme--tiny/snapshots/main", None),
        (f"models--acme--tiny/snapshots/{COMMIT[1:]}", None),
        (f"models--acme--tiny/{COMMIT}", None),
    ],
)
def test_a_snapshot_of_the_clients_cache_says_what_it_is(
    path: str, found: tuple[str, str] | None, tmp_path: Path
) -> None:
    place = tmp_path / path
    place.mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    for each in (place, tmp_path / "link"):
        said = snapshot_of(each)
        assert (said and (said.repo_id, said.path)) == found
        assert said is None or said.revision == COMMIT


def test_a_source_in_the_clients_cache_is_the_repo(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    top = tmp_path / f"models--acme--tiny/snapshots/{COMMIT}"
    shutil.copytree(checkpoints("llama"), top / "sub")
    for source in (resolve(str(top), "sub"), resolve(f"{top}/sub/")):
        assert (source.name, source.base, source.base_commit) == ("acme/tiny", "acme/tiny", COMMIT)
        assert source.inside == "sub/"
        assert set(source.headers()) == set(source.shards)
    recipe = settled(Recipe(source=f"{top}/sub"))
    assert (recipe.source, recipe.subfolder) == (str(top), "sub")


def test_an_adapter_and_a_card_name_nothing_that_leads_elsewhere(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoints("llama", torch.bfloat16), "demo")
    args = ("--output", "adapter", *TINY_ARGS, "--num-pairs", 32)
    result = cli("convert", "./demo", "out", *args)
    assert result.exit_code == 0, result.stderr
    assert "the card and the adapter name no base model; give --base-model" in result.stderr
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (None, None)
    card = Path("out/README.md").read_text()
    assert "huggingface.co/demo" not in card
    assert "gloss verify THIS_FOLDER --source ./demo" in card
    assert "AutoPeftModelForCausalLM` cannot find it" in card
    assert json.loads(Path("out/gloss_manifest.json").read_text())["run"]["source"] == "./demo"
    assert cli("verify", "out", "--source", "./demo").exit_code == 0
    # its config must be what the manifest says
    path = Path("out/adapter_config.json")
    path.write_text(path.read_text().replace("null", '"gpt2"', 1))
    assert cli("verify", "out").exit_code == 8


def test_a_folder_with_the_name_of_a_repo_is_said(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("acme/tiny").mkdir(parents=True)
    with refused(CheckpointError, hint="remove it, or give https://huggingface.co/acme/tiny..."):
        resolve("acme/tiny")
    shutil.rmtree("acme/tiny")
    shutil.copytree(checkpoints("llama"), "acme/tiny")
    assert "acme/tiny is the folder here, not a repo of the Hub" in cli("plan", "acme/tiny").stderr
