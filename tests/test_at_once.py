"""Mistakes are found at once, together, with the right words, before a model library is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from converter.cli.command import Console
from converter.cli.help import GROUPS
from converter.cli.main import gloss
from converter.cli.recipe import recorded_recipe
from converter.errors import ConverterError, DataError, Faults, OptionError
from converter.evaluation.gates import Gates
from converter.evaluation.options import EvaluationOptions
from converter.methods.known import described
from converter.option import declared_options
from converter.recipe import PublicationOptions, Recipe, Settings
from tests.builders.invoke import invoke
from tests.builders.mistakes import MISTAKES, Mistake, make_places


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    make_places(folder)
    return folder


def check(name: str, mistake: Mistake, code: int, stderr: str) -> None:
    assert code == mistake.code, (name, stderr)
    assert not [part for part in mistake.says if part not in stderr], (name, stderr)
    assert "Traceback" not in stderr, name
    told = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == mistake.lines, (name, stderr)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_its_words(
    name: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake = MISTAKES[name]
    for module in mistake.without:
        monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(gloss, mistake.typed(places), env=mistake.variables)
    check(name, mistake, result.exit_code, result.stderr)
    assert not (places / "out").exists()


_ALL = """
import sys
from click.testing import CliRunner
from converter.cli.main import gloss
from tests.builders.mistakes import MISTAKES
for name, mistake in MISTAKES.items():
    before = {module: sys.modules.get(module) for module in mistake.without}
    sys.modules.update(dict.fromkeys(mistake.without))
    result = CliRunner().invoke(gloss, mistake.typed(sys.argv[1]), env=mistake.variables)
    for module in mistake.without:
        del sys.modules[module]
    assert result.exit_code == mistake.code, (name, result.stderr)
    loaded = {"torch", "transformers"} & {*sys.modules}
    assert not loaded, (name, loaded)
"""


def test_no_model_library_is_loaded_to_find_them(places: Path) -> None:
    root = Path(__file__).parents[1]
    made = subprocess.run(
        [sys.executable, "-c", _ALL, places], cwd=root, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-2000:]


def test_the_program_by_itself_says_all_and_exits_with_the_first(places: Path) -> None:
    mistake = MISTAKES["all together"]
    made = subprocess.run(
        [sys.executable, "-m", "converter", *mistake.typed(places)], capture_output=True, text=True
    )
    check("all together", mistake, made.returncode, made.stderr)


def test_several_errors_are_one_object_of_json(places: Path) -> None:
    typed = [*MISTAKES["all together"].typed(places), "--json"]
    data = json.loads(CliRunner().invoke(gloss, typed).stdout)
    assert data["exit_code"] == 2
    assert len(data["others"]) == 9
    assert {each["exit_code"] for each in data["others"]} == {2, 4, 5, 7}


def test_a_misspelt_variable_that_is_no_gate_is_a_warning(places: Path) -> None:
    typed = MISTAKES["a device"].typed(places)
    result = CliRunner().invoke(gloss, typed, env={"GLOSS_BATCH_SIZ": "3", "GLOSS_XYZ": "1"})
    said = "warning: GLOSS_BATCH_SIZ is not the variable of any option; did you mean "
    assert f"{said}GLOSS_BATCH_SIZE?\n" in result.stderr
    assert "warning: GLOSS_XYZ is not the variable of any option\n" in result.stderr
    assert result.exit_code == 2


def test_faults_are_told_together_each_once_and_others_are_raised() -> None:
    faults = Faults()
    faults.settle()
    with faults:
        raise DataError("a")
    with pytest.raises(DataError, match="a"):
        faults.settle()
    for error in (OptionError("b"), DataError("a"), ExceptionGroup("", [DataError("c")])):
        with faults:
            raise error
    with pytest.raises(ExceptionGroup) as caught:
        faults.settle()
    assert [str(error) for error in caught.value.exceptions] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="d"), faults:
        raise ValueError("d")
    with pytest.raises(ExceptionGroup), faults:
        raise ExceptionGroup("", [ConverterError("e"), ValueError("f")])


def test_what_is_known_of_methods_is_what_their_classes_say() -> None:
    from converter.entrypoints.methods import known_methods

    said = "python -m converter.entrypoints.methods > converter/data/methods.json"
    assert described() == known_methods(), said
    unexplained = [
        (name, key)
        for name, method in described().items()
        for key, option in method.options.items()
        if not option.meaning or option.values == ""
    ]
    assert unexplained == []


def test_the_options_of_a_method_are_printed() -> None:
    text = invoke("methods", "destein", code=0).stdout
    assert "destein: DeStein, constant vectors behind the attention" in text
    assert "| `direction` | paired, causal | paired | paired, the paper's difference" in text
    assert "| `layers` | layers, such as 10-24 or 3,5,8 | by the model |" in text
    assert "| `alpha` | a number from 1e-06, or auto | auto |" in text
    data = json.loads(invoke("methods", "gloss", "--json", code=0).stdout)
    assert data["options"]["bias"]["choices"] == ["project", "keep"]


def test_help_shows_examples_first_and_every_option_in_a_group() -> None:
    text = invoke("convert", "-h", code=0).stdout
    assert text == invoke("convert", "--help", code=0).stdout
    places = [text.index(f"\n{title}:\n") for title in ("Examples", *GROUPS, "Others")]
    assert places == sorted(places)
    named = {name for names in GROUPS.values() for name in names}
    classes = (Recipe, Settings, Gates, EvaluationOptions, PublicationOptions, Console)
    known = {name for cls in classes for name in declared_options(cls)}
    assert known - named == {"source", "json", "quiet", "verbose", "log_file"}


def test_the_recipe_of_an_earlier_manifest_is_taken(tmp_path: Path) -> None:
    recorded = Path(__file__).parents[1] / "manifests/smollm2-135m-instruct.json"
    data = json.loads(recorded.read_text())
    data["run"] |= {"seed": 4, "guard_draws": 7, "options": {"rank": "2", "bias": "keep"}}
    made, recipe = tmp_path / "made", tmp_path / "run.toml"
    made.mkdir()
    (made / "gloss_manifest.json").write_text(json.dumps(data))
    recipe.write_text("seed = 5\n[options]\nrank = 3\n")
    expected = {"source": "demo", "seed": 4, "guard_draws": 7, "options": data["run"]["options"]}
    assert recorded_recipe(made) == recorded_recipe(made / "gloss_manifest.json") == expected
    typed = ("--like", made, "--recipe", recipe, "--num-pairs", 50, "-o", "layers=2-3", "--json")
    result = invoke("recipe", "other", *typed, code=0)
    assert json.loads(result.stdout) == {
        "source": "other", "seed": 5, "guard_draws": 7, "num_pairs": 50,
        "options": {"rank": "3", "bias": "keep", "layers": "2-3"},
    }  # fmt: skip
    said = "gloss_manifest.json and run.toml are overruled by what was typed: source, options\n"
    assert said.replace("gloss_manifest.json", "made") in result.stderr


def test_what_is_told_is_kept_in_a_file(places: Path, tmp_path: Path) -> None:
    path, typed = tmp_path / "run.log", MISTAKES["no tokenizer"].typed(places)
    result = CliRunner().invoke(gloss, [*typed, "--quiet", "--log-file", str(path)])
    assert result.stderr == "error: mute has no tokenizer: expected tokenizer.json or the like " \
        "beside the weights\n"  # fmt: skip
    first = path.read_text().splitlines()
    assert first[0].endswith(" CheckpointError")
    assert "first_look.py" in path.read_text()
    result = CliRunner().invoke(gloss, [*typed, "--verbose", "--log-file", str(path)])
    assert "first_look.py" in result.stderr
    assert len(path.read_text().splitlines()) == 2 * len(first)  # it is added to
    result = CliRunner().invoke(gloss, [*typed, "--log-file", str(tmp_path / "none/x.log")])
    assert result.exit_code == 7
    assert "error: --log-file " in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_by_one_command(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "ZDOTDIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    printed = invoke("completion", shell, code=0).stdout
    assert "_GLOSS_COMPLETE" in printed
    assert "_GLOSS_CONVERT_COMPLETE" in printed
    for _ in range(2):  # the second time nothing is added
        written = json.loads(invoke("completion", shell, "--install", "--json", code=0).stdout)
        texts = [Path(place).read_text("utf-8") for place in written["written"]]
        assert sum(text.count("_GLOSS_CONVERT_COMPLETE") for text in texts) == printed.count(
            "_GLOSS_CONVERT_COMPLETE"
        )


def test_a_shell_is_told_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"_GLOSS_COMPLETE": "bash_complete", "COMP_WORDS": "gloss meth", "COMP_CWORD": "1"}
    result = CliRunner().invoke(gloss, [], env=asked, prog_name="gloss")
    assert "methods" in result.stdout
