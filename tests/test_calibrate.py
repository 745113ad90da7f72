"""``gloss calibrate``: what it writes is an ordinary checkpoint, the same each time."""

import json
from pathlib import Path
from typing import Any

import torch

from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.split import split
from converter.calibration.word_list import load_words
from tests.builders.invoke import Cli
from tests.builders.models import Checkpoints, load, planned

ARGS = ("--num-pairs", 60, "--depth", 2, "--rate", 0.01)


def test_it_writes_a_model_of_few_layers_and_what_it_was_trained_on(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = checkpoints("llama-tied", torch.bfloat16)
    result = cli("calibrate", source, tmp_path / "c", *ARGS, "--tokens", 3000, "--json", code=0)
    record: Any = json.loads((tmp_path / "c" / "gloss_calibration.json").read_text())
    assert json.loads(result.stdout) == {"destination": str(tmp_path / "c"), **record}
    words = load_words("builtin")
    part = split(load_pairs("builtin", words, 60, 0), load_prose("builtin"), 0).fit
    assert record["pairs"]["sha256"] == part.pairs.sha256
    assert 3000 <= record["tokens"] < 3200
    assert record["losses"][1] < record["losses"][0]
    found, of = load(tmp_path / "c"), load(source)
    assert found.config.num_hidden_layers == 2
    assert planned(tmp_path / "c")[1].dimensions.num_hidden_layers == 2
    same = {n for n, p in found.named_parameters() if torch.equal(p, of.get_parameter(n))}
    assert same == {"model.embed_tokens.weight"}


def test_equal_tokens_give_equal_bytes_and_time_ends_it(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = checkpoints("llama")
    for name in ("one", "two"):
        cli("calibrate", source, tmp_path / name, *ARGS, "--tokens", 1000, code=0)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    given = ("--tokens", 10_000_000, "--minutes", 0.005)
    said = cli("calibrate", source, tmp_path / "three", *ARGS, *given, code=0).stdout
    assert "of 10,000,000, ended by the time" in said


def test_what_cannot_be_trained_is_refused(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    says = "--depth: expected at most 6, as many layers as"
    cli("calibrate", checkpoints("llama"), tmp_path / "c", "--depth", 7, code=2, says=says)
    says = "has a language model as a part"
    cli("calibrate", checkpoints("gemma3"), tmp_path / "c", "--tokens", 9, code=4, says=says)
    assert not (tmp_path / "c").exists()
