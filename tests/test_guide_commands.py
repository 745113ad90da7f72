"""Every command of README and the guide: run here on a tiny model, elsewhere, or why not."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from converter.calibration.pairs import load_prose
from tests.builders.invoke import Cli
from tests.builders.planted import planted_args
from tests.guide import ROOT
from tests.test_guide import FOR_PEOPLE, lines_of

TEXTS = "--prompts prompts.txt --scorer bad-words --max-new-tokens 4 --samples 0 --passages 4"
FEW = f"{TEXTS} --num-prompts 4 --num-pairs 100"
EVALUATED = f"{FEW} --text-tokens 2048"
SEARCHED = "--num-pairs 200 --search-prompts prompts.txt -o directions=4"

HERE = {
    "gloss-convert MODEL ./out --pairs s-nlp/paradetox --num-pairs 1000 --evaluate "
    "--text wikitext.txt --min-toxicity-drop 0.3 --max-informal-perplexity-ratio 1.10 "
    "--sign key.pem": f"{EVALUATED} --num-pairs 200",
    "gloss-convert MODEL ./out --memory-limit 4GB --forward streamed "
    "--no-keep-source": "--keep-source",
    "gloss-convert MODEL ./out --output adapter": "",
    "gloss-convert MODEL ./out --json --quiet --min-toxicity-drop 0.3": "--min-toxicity-drop 0.01",
    "gloss-convert --recipe run.toml DESTINATION": "--num-pairs 200",
    "gloss-convert SOURCE ./out --sign key.pem": "",
    "gloss-convert SOURCE DESTINATION --search 60": f"--search 2 {SEARCHED}",
    "gloss calibrate SOURCE DESTINATION": "--tokens 500 --depth 2",
    "gloss compare BASE EDITED": "--num-prompts 2 --max-new-tokens 4",
    "gloss compare BASE EDITED --output page.html": "--num-prompts 2 --max-new-tokens 4",
    "gloss compare demo ./out --output page.html": "--num-prompts 2 --max-new-tokens 4",
    "gloss completion bash": "",
    "gloss completion bash --install": "",
    "gloss diff A B --subspace FILE": "",
    "gloss diff demo out": "",
    "gloss evaluate ./out --base demo --system random --system profs --text wikitext.txt "
    "--plots ./pictures": EVALUATED,
    "gloss evaluate MODEL": FEW,
    "gloss evaluate MODEL --base BASE --system random --system profs "
    "--continuations lines.jsonl": FEW,
    "gloss evaluate demo --system gloss --system profs --system random "
    "--system random@perplexity --seeds 3 --pairs paradetox.tsv --num-pairs 1000 "
    "--prompts prompts.jsonl --num-prompts 150 --passages 5 --text wikitext2_test.txt "
    "--text-tokens 8192 --results results.json": f"{EVALUATED} --seeds 1",
    "gloss evaluate demo --system gloss --system gloss+destein --system random --system profs "
    "--pairs paradetox.tsv --num-pairs 1000 --prompts prompts300.jsonl --num-prompts 300 "
    "--samples 25 --no-greedy --passages 8 --generation-batch-size 128 --text wikitext2_test.txt "
    "--text-tokens 8192 --results generated.json": EVALUATED,
    "gloss-convert MODEL ./out --method gloss+destein": "--num-pairs 100 -o gloss.layers=2-4",
    "gloss guide": "",
    "gloss methods": "",
    "gloss options": "",
    "gloss recipe": "",
    "gloss recipe SOURCE --num-pairs 1000 -o rank=4": "",
    "gloss plan SOURCE": "",
    "gloss replay MANIFEST DESTINATION": "--source SOURCE",
    "gloss replay MANIFEST DESTINATION --refit": "--source SOURCE --pairs pairs.jsonl",
    "gloss report DESTINATION": "",
    "gloss report DESTINATION --output report.html": "",
    "gloss search SOURCE --trials 60": f"--trials 2 {SEARCHED}",
    "gloss search SOURCE --trials 60 --results search.json "
    "--plots ./pictures": f"--trials 2 {SEARCHED}",
    "gloss schema verify": "",
    "gloss verify ./out": "",
    "gloss verify ./out --key public.pem": "",
    "gloss verify ./out --source '$BASE'": "",
    "gloss verify ./out --source HuggingFaceTB/SmolLM2-360M": "",
    "gloss verify ./out --source HuggingFaceTB/SmolLM2-360M --key public.pem": "",
    "gloss verify DESTINATION": "",
    "gloss verify DESTINATION --source SOURCE --key PUBLIC.pem": "",
}
"""Line of a page -> options that make it small; they count more than those of the line."""

README_TEST = "test_guide.py::test_the_commands_of_the_readme_run_on_a_tiny_model"
ELSEWHERE = {
    "gloss-convert MODEL ./out": README_TEST,
    "gloss-convert ./my-model ./edited": README_TEST,
    "gloss-convert SOURCE DESTINATION": README_TEST,
    "gloss-convert HuggingFaceTB/SmolLM2-360M ./out": README_TEST,
    "gloss-convert '$BASE' ./out --json": README_TEST,
    "gloss verify ./out --source MODEL": README_TEST,
    "gloss plan MODEL": README_TEST,
    "gloss recipe SOURCE": README_TEST,
    "gloss diff A B": README_TEST,
    "gloss methods NAME": README_TEST,
    "gloss schema": "test_every_command.py::",
    "gloss schema NAME": "test_every_command.py::",
    "gloss guide TOPIC": README_TEST,
    "gloss replay ./out ./again --json": README_TEST,
    "gloss-convert demo ./out": "test_demo.py::test_the_demo_model_is_edited_and_still_speaks",
    "make demo": "test_demo.py::test_the_demo_model_is_edited_and_still_speaks",
    "gloss replay manifests/smollm2-135m-instruct.json ./out --source demo":
        "test_demo.py::test_the_recorded_demo_comes_out_byte_for_byte",
    "gloss compare demo ./out --interactive":
        "test_compare.py::test_prompts_can_be_typed",
    "gloss architectures --infer SOURCE": "test_architectures.py::",
    "gloss push ./out someone/SmolLM2-detox": "test_push.py::",
    "gloss push ./out '$REPO'": "test_push.py::",
    "gloss push DESTINATION REPO": "test_push.py::",
    "gloss push ./out s3://bucket/prefix": "test_store_uploads.py::",
    "gloss-convert SOURCE s3://bucket/prefix": "test_store_uploads.py::",
    "gloss-convert s3://bucket/models/tiny ./out": "test_stores.py::",
    "gloss plan s3://bucket/models/tiny": "test_stores.py::",
    "gloss verify ./out --source s3://bucket/models/tiny": "test_stores.py::",
    "gloss-convert meta-llama/Llama-2-7b ./out --push-to-hub someone/Llama-2-7b-detox":
        "test_push.py::",
    "gloss search SOURCE": "test_search.py::",
    "make release": "test_release.py::",
    "python -m pytest tests/test_faults.py": "test_faults.py::",
}  # fmt: skip
"""Line -> the test that runs it, or one like it; a file alone has several."""

NOT_RUN = {
    "gloss-convert /data/Llama-3.1-405B /data/out --engine ray": "needs machines; test_cluster.py "
    "runs one",
    "gloss architectures": "takes five minutes; single classes run in test_architectures.py",
    "gloss architectures --only qwen3_next": "takes half a minute; other classes run in "
    "test_architectures.py",
    "GLOSS_EVERY_ARCHITECTURE=1 pytest tests/test_architectures.py -k MODEL_TYPE": "is a test",
    "gloss evaluate demo --pairs paradetox.tsv": "takes hours; its systems run in "
    "test_comparison.py and in the tests of the methods",
    "make faults": "takes hours; test_faults.py has a sample",
    "python -m tests.faults": "takes minutes to hours; test_faults.py has a sample",
    "make fuzz": "needs atheris; test_fuzz.py replays its corpus",
    "python -m tests.fuzz": "needs atheris; test_fuzz.py replays its corpus",
    "make consumers": "installs other programs",
    "python -m tests.consumers": "installs other programs",
    "make lock": "asks the package index",
    "make audit": "asks the advisory database",
}
"""Beginning of a line -> why no test runs it."""


def written() -> list[str]:
    """Every command line of the pages, once."""
    return [*dict.fromkeys(shlex.join(words) for page in FOR_PEOPLE for words in lines_of(page))]


def test_every_command_is_run_or_named() -> None:
    lines = written()
    known = (*HERE, *ELSEWHERE)
    lacking = [line for line in lines if line not in known and not line.startswith((*NOT_RUN,))]
    assert not lacking
    gone = [line for line in known if line not in lines]
    assert not gone
    assert all(any(line.startswith(begin) for line in lines) for begin in NOT_RUN)


@pytest.mark.parametrize("place", sorted(set(ELSEWHERE.values())))
def test_the_tests_that_run_the_others_are_there(place: str) -> None:
    name, _, test = place.partition("::")
    assert re.search(rf"^def {test or 'test_'}", (ROOT / "tests" / name).read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def finished(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the lines name: a signed conversion, keys, texts and a recipe."""
    from tests.builders.invoke import invoke

    folder = tmp_path_factory.mktemp("guide")
    page = (ROOT / "converter/guide/publishing.md").read_text("utf-8")
    made = [line.strip() for line in page.splitlines() if line.startswith("    openssl ")]
    assert len(made) == 2
    for line in made:
        subprocess.run(shlex.split(line, comments=True), cwd=folder, check=True)
    (folder / "prompts.txt").write_text("w1 damn\nw2 w3 fucking\nthe river is\nw4 damn\n")
    prose = "\n".join(load_prose("builtin").paragraphs[:40]).lower()
    (folder / "wikitext.txt").write_text(prose, "utf-8")
    pairs = (planted.parent / "pairs.jsonl").read_bytes()
    (folder / "pairs.jsonl").write_bytes(pairs)
    signed = ("--sign", folder / "key.pem")
    invoke("convert", planted, folder / "done", *planted_args(planted), *signed, code=0)
    given = ("--pairs", folder / "pairs.jsonl", *planted_args(planted)[2:])
    recipe = invoke("recipe", planted, *given, code=0).stdout
    (folder / "run.toml").write_text(recipe, "utf-8")
    return folder


def typed(line: str, more: str, finished: Path, planted: Path) -> list[str]:
    """A line as arguments of ``gloss``: tiny files in the place of what it names."""
    words = [*shlex.split(line.replace("gloss-convert", "gloss convert", 1))[1:]]
    words += shlex.split(more)
    places = dict.fromkeys(("MODEL", "SOURCE", "BASE", "$BASE", "A", "demo"), planted)
    places |= {"HuggingFaceTB/SmolLM2-360M": planted}
    done = finished / "done"
    places |= dict.fromkeys(("./out", "out", "EDITED", "B", "MANIFEST", "DESTINATION"), done)
    if words[0] in ("convert", "calibrate", "replay"):
        places |= dict.fromkeys(("./out", "DESTINATION"), Path("new"))
    files = {"s-nlp/paradetox": "pairs.jsonl", "paradetox.tsv": "pairs.jsonl"}
    files |= {"prompts.jsonl": "prompts.txt", "prompts300.jsonl": "prompts.txt"}
    files |= {"wikitext2_test.txt": "wikitext.txt"}
    files |= {"PUBLIC.pem": "public.pem", "FILE": "done/gloss_edit.tensors"}
    names = ("key.pem", "public.pem", "prompts.txt", "wikitext.txt", "run.toml", "pairs.jsonl")
    places |= {word: finished / file for word, file in files.items()}
    places |= {name: finished / name for name in names}
    return [str(places.get(word, word)) for word in words]


@pytest.mark.slow
@pytest.mark.parametrize("line", HERE)
def test_it_runs_on_a_tiny_model(
    line: str, finished: Path, planted: Path, cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    args = typed(line, HERE[line], finished, planted)
    options = list(map(str, planted_args(planted)[2:]))
    fits = args[0] in ("convert", "search", "calibrate") or "--system" in args
    if fits and not {"--recipe", "--pairs"} & {*args}:
        args += ["--pairs", str(finished / "pairs.jsonl")]
    if fits and args[0] != "calibrate" and "--recipe" not in args:
        searched = args[0] == "search" or "--search" in args
        args += options[2:] if searched else options
    cli(*args, code=0)
