"""Options are declared once, as a field, from which everything else follows."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.cli.command import Command
from converter.cli.main import gloss
from converter.cli.recipe import RecipePart, read_recipe, recipe_text
from converter.errors import OptionError
from converter.option import Declared, declared_options
from converter.recipe import Recipe, Settings
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import TINY_ARGS, Checkpoints

OTHER: dict[str, Any] = {
    "source": "someone/a model",
    "method": "profs",
    "options": {"rank": "4", "layers": "10-24", "cost": "1.5", "alpha": "1.50", "bias": "keep"},
    "pairs": 'a "quoted" \\ path.tsv',
    "self_prompts": "someone/prompts#challenging",
    "self_scorer": "detoxify:unbiased",
    "instances": "someone/instances@v1",
    "num_pairs": 7,
    "seed": (1 << 63) - 1,
    "neutral": "ordentliche Prosa \N{GRINNING FACE}.txt",
    "word_list": "words\nof\ttwo\x7flines\u202e",
    "prompts": "someone/prompts#field",
    "output": "adapter",
    "calibration": Path("some/calibration"),
    "activations": Path("some/activations.safetensors"),
    "device": "cuda:1",
    "forward_dtype": "float16",
    "forward": "streamed",
    "batch_size": 3,
    "rounding": "nearest",
    "max_perplexity_ratio": 1.0000001,
    "guard": False,
    "guard_draws": 9,
    "force": True,
    "mask": False,
    "base_model": "someone/base",
    "subfolder": "original",
    "trust_remote_code": True,
}
"""Of every option of a recipe, a value that is not its default."""


def read_back(text: str, folder: Path) -> Recipe:
    path = folder / "run.toml"
    path.write_text(text, "utf-8")
    return Recipe(**read_recipe(path))


def test_a_printed_recipe_is_read_back_as_it_was(tmp_path: Path) -> None:
    defaults, other = Recipe(source="demo"), Recipe(**OTHER)
    for name in declared_options(Recipe):
        assert getattr(defaults, name) != getattr(other, name), f"{name} is not changed"
    assert read_back(recipe_text({"source": "demo"}), tmp_path) == defaults
    assert read_back(recipe_text(OTHER), tmp_path) == other


@given(st.dictionaries(st.text(min_size=1).map(str.strip).filter(bool), st.text().map(str.strip)))
def test_no_text_of_an_option_breaks_the_file(texts: dict[str, str]) -> None:
    encodable = Recipe(source="x", options={k.replace("-", "_"): v for k, v in texts.items()})
    table = tomllib.loads(recipe_text({"source": "x", "options": encodable.options}))
    assert Recipe(**table) == encodable


def test_a_printed_recipe_explains_every_option(tmp_path: Path) -> None:
    text = recipe_text({})
    _, *paragraphs = text.split("\n\n")
    known = sorted(declared_options(Recipe).values(), key=lambda option: option.name == "options")
    for declared, paragraph in zip(known, paragraphs, strict=True):
        comment = paragraph.replace("\n# ", " ")
        assert comment.startswith(f"# {declared.option.help}")
        assert re.search(rf"^(# )?{declared.name} = |^\[options\]$", paragraph, re.MULTILINE)
        if declared.default_text is not None:
            assert f"Default: {declared.default_text}." in comment
    with pytest.raises(TypeError, match="source"):
        read_back(text, tmp_path)  # the one thing that has no default


def unknown(key: str, hint: str) -> dict[str, str]:
    return {"what": f"run.toml has an unknown key {key}", "hint": hint}


def wrong(key: str, expected: str, found: str) -> dict[str, str]:
    return {"what": f"run.toml: {key}", "expected": expected, "found": found}


UNREADABLE = "the recipe run.toml cannot be read"


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("num_pair = 3", unknown("num_pair", "did you mean num_pairs?")),
        ("batch-size = 3", unknown("batch-size", "did you mean batch_size?")),
        ("workers = 3", unknown("workers", "...give --workers instead")),
        ("zzz = 3", unknown("zzz", "see gloss recipe for those there are")),
        ('num_pairs = "3"', wrong("num_pairs", "a whole number", "'3'")),
        ("num_pairs = 3.0", wrong("num_pairs", "a whole number", "3.0")),
        ("num_pairs = true", wrong("num_pairs", "a whole number", "True")),
        ("batch_size = 0", wrong("batch_size", "at least 1", "0")),
        ("max_perplexity_ratio = 1", wrong("max_perplexity_ratio", "more than 1", "1.0")),
        ("max_perplexity_ratio = nan", wrong("max_perplexity_ratio", "a finite number", "nan")),
        (
            f"max_perplexity_ratio = {10**400}",
            wrong("max_perplexity_ratio", "a number", "1000..."),
        ),
        (
            f"seed = {10**400}",
            wrong("seed", "at least 0 and at most 9223372036854775807", "1000..."),
        ),
        ("guard = 1", wrong("guard", "true or false", "1")),
        ("pairs = 3", wrong("pairs", "text", "3")),
        ("activations = 3", wrong("activations", "text", "3")),
        ('forward = "both"', wrong("forward", "auto or resident or streamed", "'both'")),
        ("output = 3", wrong("output", "text", "3")),
        ("[options]\nrank = true", wrong("options rank", "text or a number", "True")),
        ("options = 3", wrong("options", "a list of texts", "3")),
        (
            '[options]\n"top-tokens" = 1\ntop_tokens = 2',
            {"what": "run.toml: options top_tokens is given twice"},
        ),
        ("seed = 1\nseed = 2", {"what": UNREADABLE, "found": "Cannot overwrite a value..."}),
        ("seed", {"what": UNREADABLE, "found": "Expected '='..."}),
        (
            "a = " + "[" * 10_000,
            {"what": UNREADABLE, "found": "maximum recursion depth exceeded..."},
        ),
    ],
)
def test_a_line_that_is_wrong_is_refused(line: str, fields: dict[str, str], tmp_path: Path) -> None:
    with refused(OptionError, **fields):
        read_back(f'source = "demo"\n{line}\n', tmp_path)


def test_a_file_that_is_no_text_or_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with refused(OptionError, what=UNREADABLE, found="No such file or directory"):
        read_recipe(path)
    path.write_bytes(b"\xff")
    with refused(OptionError, what=UNREADABLE, found="byte 0xff in line 1, which is not UTF-8"):
        read_recipe(path)


def test_values_are_checked_whichever_way_they_come() -> None:
    assert Recipe(source="x", max_perplexity_ratio=2) == Recipe(
        source="x", max_perplexity_ratio=2.0
    )
    assert Settings(memory_limit="1.5GiB").memory_limit == 3 << 29  # type: ignore[arg-type]
    with refused(OptionError, what="--workers", expected="at least 0", found="-1"):
        Settings(workers=-1)
    with refused(OptionError, what="-o", expected="KEY=VALUE", found="rank"):
        Recipe(source="x", options=["rank"])  # type: ignore[arg-type]


def options() -> list[Declared]:
    return [*declared_options(Recipe).values(), *declared_options(Settings).values()]


@pytest.mark.parametrize("declared", options(), ids=lambda declared: declared.name)
def test_every_option_is_explained(declared: Declared) -> None:
    """One sentence or two, and an example of the value where no list of choices has it."""
    option = declared.option
    assert option.help[0].isupper()
    assert option.help.endswith(".")
    if not declared.choices and declared.kind is not bool:
        example = [declared.example] if declared.kind is dict else declared.example
        assert declared.read(example) != declared.default


def commands() -> list[Command]:
    return [each for each in gloss.commands.values() if isinstance(each, Command) and each.parts]


def test_every_option_of_every_command_is_a_field() -> None:
    assert {each.name for each in commands()} >= {"convert", "plan", "recipe", "verify", "diff"}
    for each in commands():
        known = {option.name for part in each.parts for option in part.options}
        assert {str(parameter.name) for parameter in each.params} - {"version"} == known, each.name
        for parameter in each.params:
            assert parameter.name == "version" or not parameter.to_info_dict()["default"]


def test_the_command_prints_every_option_with_its_default(cli: Cli) -> None:
    tables = cli("options").stdout
    assert "| `--num-pairs 1000` | all usable, at most 2000; 400 of self | Number of" in tables


def test_options_are_known_without_loading_a_model_library() -> None:
    """``--help`` and ``gloss recipe`` answer at once."""
    program = (
        "import sys; from converter.cli.main import gloss\n"
        "gloss(['recipe'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_command_prints_the_recipe_that_another_reads(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source, path = checkpoints("llama"), tmp_path / "run.toml"
    typed = (*TINY_ARGS, "--num-pairs", 32, "--batch-size", 4, "--no-mask")
    path.write_text(cli("recipe", source, *typed).stdout)
    plans = [
        json.loads(cli("plan", *args, "--json", code=0).stdout)
        for args in ((source, *typed), ("--recipe", path))
    ]
    for each in plans:
        del each["expected_peak_bytes"]  # of which a part is what Python has taken by then
    assert plans[0] == plans[1]
    first, second = tmp_path / "first", tmp_path / "second"
    for args in ((source, first, *typed), (second, "--recipe", path)):
        result = cli("convert", *args, code=0)
        assert "overruled" not in result.stderr
    runs = [json.loads((out / "gloss_manifest.json").read_text())["run"] for out in (first, second)]
    assert runs[0] == runs[1]
    assert (runs[0]["batch_size"], runs[0]["mask"]) == (4, False)


def test_what_is_typed_counts_more_than_the_file_and_that_is_said_once(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = tmp_path / "run.toml", {"rank": "4", "cost": "2"}
    path.write_text(recipe_text({"source": "demo", "seed": 3, "options": options}))
    monkeypatch.setenv("GLOSS_BATCH_SIZE", "7")
    typed = ("--seed", 5, "-o", "rank=2", "--method", "gloss")
    args = ("recipe", "elsewhere", "--recipe", path, *typed)
    result = cli(*args, "--json", code=0)
    found = json.loads(result.stdout)
    assert (found["source"], found["seed"], found["batch_size"]) == ("elsewhere", 5, 7)
    assert found["options"] == {"rank": "2", "cost": "2"}
    said = "run.toml is overruled by what was typed: source, options, seed, batch_size\n"
    assert result.stderr == said
    assert cli(*args, "--quiet").stderr == ""
    assert tomllib.loads(cli(*args).stdout)["options"] == {"rank": 2, "cost": 2}


def test_the_source_is_typed_or_in_the_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(recipe_text({}))
    for args in (("plan",), ("convert", tmp_path / "out"), ("plan", "--recipe", path)):
        cli(
            *args,
            code=2,
            says="Missing argument 'SOURCE', which no --recipe or --like names",
        )
    cli("convert", "a", "b", "c", code=2, says="Got unexpected extra argument (b)")


def test_an_option_that_a_command_does_not_have_does_not_bear_on_it(tmp_path: Path) -> None:
    path, part = tmp_path / "run.toml", RecipePart(without=("output",))
    path.write_text('source = "x"\noutput = "adapter"\nseed = 3')
    command = click.Command("evaluate", params=part.parameters())
    with command.make_context("evaluate", ["--recipe", str(path)]) as context:
        assert part.make(context.params) == Recipe(source="x", seed=3)


def test_errors_of_a_recipe_end_a_command_as_all_others_do(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("num_pair = 3")
    result = cli("plan", "demo", "--recipe", path, "--json", code=2)
    assert json.loads(result.stdout)["error"] == "OptionError"
    assert "error: run.toml has an unknown key num_pair; did you mean num_pairs?" in result.stderr
