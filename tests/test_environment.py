"""Every option of every command can be given in the environment."""

import json
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import get_token

from converter.cli.convert import convert_command
from converter.cli.main import gloss
from converter.errors import SourceError
from converter.hub.repos import plain_errors
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import METHOD, TINY, Checkpoints

OWN: dict[tuple[str | None, str], str] = {
    ("compare", "--output"): "GLOSS_COMPARE_OUTPUT",
    ("report", "--output"): "GLOSS_REPORT_OUTPUT",
}
"""Variables of options whose name means something else to another command."""


def test_a_variable_has_one_kind_of_value() -> None:
    kinds: dict[str, set[str]] = {}
    for command in gloss.commands.values():
        for option in command.params:
            if option.envvar:
                choices = option.type.choices if isinstance(option.type, click.Choice) else ()
                kind = f"{option.type.name} {' '.join(map(str, choices))}"
                kinds.setdefault(str(option.envvar), set()).add(kind)
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


def test_every_option_has_a_variable_named_like_it() -> None:
    for command in gloss.commands.values():
        for option in command.params:
            if isinstance(option, click.Option) and option.name != "version":
                flags = [text for text in option.opts if text.startswith("--")]
                flag = flags[0] if flags else "--options"
                named = "GLOSS_" + flag[2:].replace("-", "_").upper()
                assert option.envvar == OWN.get((command.name, flag), named)
    assert {option.envvar for option in convert_command.params} >= {
        "GLOSS_BATCH_SIZE", "GLOSS_JSON", "GLOSS_OPTIONS", "GLOSS_GUARD", "GLOSS_SYSTEM",
        "GLOSS_MAX_PERPLEXITY_RATIO", "GLOSS_CACHE_DIR",
    }  # fmt: skip


def test_a_run_can_be_set_up_in_the_environment_alone(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(checkpoints("llama", torch.bfloat16))
    for name, value in {
        "BATCH_SIZE": "7", "JSON": "1", "GUARD": "0", "NUM_PAIRS": "32", "SEED": "3",
        "METHOD": METHOD, "OPTIONS": " ".join(f"{key}={value}" for key, value in TINY.items()),
        "CONTROL": "profs",  # of gloss evaluate: no reason to refuse a conversion without one
    }.items():  # fmt: skip
        monkeypatch.setenv(f"GLOSS_{name}", value)
    result = cli("convert", source, tmp_path / "out", "--seed", 4, code=0)
    assert json.loads(result.stdout)["rank"] == 4
    run = json.loads((tmp_path / "out/gloss_manifest.json").read_text())["run"]
    assert (run["batch_size"], run["guard"], run["options"]) == (7, False, TINY)
    assert run["seed"] == 4  # what is typed counts
    alone = CliRunner().invoke(convert_command, [source, str(tmp_path / "b"), "--dry-run"])
    assert json.loads(alone.stdout)["method"]["options"]["rank"] == 4


def test_a_wrong_value_and_a_misspelt_variable_are_named(
    checkpoints: Checkpoints, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOSS_BATCH_SIZE", "many")
    result = cli("plan", checkpoints("llama"), code=2)
    assert "the environment variable GLOSS_BATCH_SIZE" in result.stderr
    monkeypatch.setenv("GLOSS_BATCH_SIZE", "0")
    result = cli("plan", checkpoints("llama"), code=2)
    says = "the environment variable GLOSS_BATCH_SIZE: expected at least 1, found 0"
    assert result.stderr == f"error: {says}\n"
    monkeypatch.setenv("GLOSS_BATCH_SIZE", "")  # as unset
    monkeypatch.setenv("GLOSS_MAX_LEAKAG", "0.1")
    monkeypatch.setenv("GLOSS_SIGN_PASSWORD", "secret")  # not an option, and not a mistake
    monkeypatch.setenv("GLOSS_MAX_LEAKAGE", "0.1")  # of another command
    result = cli("plan", checkpoints("llama"), code=0)
    assert "warning: GLOSS_MAX_LEAKAG is not the variable of any option" in result.stderr
    assert "GLOSS_MAX_LEAKAGE " not in result.stderr
    assert "PASSWORD" not in result.stderr


def test_trusted_publishing_outside_a_job_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_OIDC_RESOURCE", "someone/tiny")
    monkeypatch.delenv("HF_OIDC_ID_TOKEN", raising=False)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    what = "model x/y: no token from the identity of this job"
    with (
        refused(SourceError, what=what, found="HF_OIDC_RESOURCE is set but ..."),
        plain_errors("model", "x/y"),
    ):
        get_token()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_URL", raising=False)
    with (
        refused(SourceError, what=what, found="...id-token: write..."),
        plain_errors("model", "x/y"),
    ):
        get_token()
