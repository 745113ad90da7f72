"""The card and the licences: what the Hub wants to read, what publishers have to do, in words."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import CardData, HfApi, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from msgspec import convert
from msgspec.structs import replace

from converter.checkpoints.front_matter import read_card, write_front_matter
from converter.checkpoints.layout import drawn_before
from converter.checkpoints.names import papers
from converter.checkpoints.resolve import resolve
from converter.checkpoints.source import Source
from converter.entrypoints.convert import prepare
from converter.entrypoints.verify import verify
from converter.hub import repos as hub
from converter.manifest import (
    Candidate,
    Estimate,
    Evaluation,
    Interval,
    Manifest,
    Measured,
    MethodRecord,
    Origin,
    PromptsRecord,
    RowRecord,
    to_json,
)
from converter.recipe import Recipe
from converter.release.card import front_matter, make_card, paper_link, pinned, title_of
from converter.release.card_results import pictures
from converter.release.licences import check_name, families, licence_name, terms_of
from converter.release.manifest import hash_line, read_manifest
from converter.runtime.progress import recording
from converter.text import code
from tests.builders.adversary import load_manifest
from tests.builders.invoke import Cli
from tests.builders.models import TINY_ARGS, Checkpoints
from tests.builders.planted import planted_args
from tests.fuzz import skeleton

DIGEST = "0" * 64


@pytest.fixture
def source(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A copy of the tiny Llama without licence or card."""
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "tiny")
    (folder / "LICENSE").unlink()
    return folder


def describe(folder: Path, front: str, *names: str) -> None:
    """Give a folder a card and licence files."""
    (folder / "README.md").write_text(f"---\n{front}\n---\nThe base's own words.\n")
    for name in names:
        (folder / name).write_text(f"{name} of the base.\n")


def fields(data: CardData) -> dict[str, Any]:
    """The front matter as the Hub reads it."""
    found: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    return found


def card_of(folder: Path) -> ModelCard:
    """The card of a folder, which is the same when the client writes it again."""
    text = (folder / "README.md").read_text("utf-8")
    card = ModelCard(text)
    assert str(card) == text
    assert fields(card.data) == metadata_load(folder / "README.md")
    assert ModelCardData(**fields(card.data)).to_yaml() == card.data.to_yaml()
    return card


LLAMA_2 = (
    "Llama 2 is licensed under the LLAMA 2 Community License, "
    "Copyright (c) Meta Platforms, Inc. All Rights Reserved.\n"
)
LLAMA_3_1 = (
    "Llama 3.1 is licensed under the Llama 3.1 Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
)


@pytest.mark.parametrize(
    ("front", "given", "notice", "says", "warns"),
    [
        ("license: llama2", ["LICENSE.txt", "USE_POLICY.md"], LLAMA_2,
         ["[Llama 2 Community License]", "[LICENSE.txt](LICENSE.txt)", "[Notice](Notice)"], []),
        ("license: llama2", [], LLAMA_2,
         ["**The licence itself was not in the source.**", "**The use policy was not in"],
         ["Llama 2 Community License and comes without the licence itself",
          "comes without the use policy"]),
        ("license: other\nlicense_name: llama3.1\nlicense_link: LICENSE",
         ["LICENSE", "USE_POLICY.md"], LLAMA_3_1,
         ["# Llama-tiny-gloss-paper\n\n**Built with Llama**\n", "begin with `Llama`"], []),
        ("license: llama3", ["LICENSE", "USE_POLICY.md", "NOTICE.txt"], None,
         ["**Built with Meta Llama 3**", "**NOTICE.txt lacks the line"],
         ["NOTICE.txt lacks the line that the Meta Llama 3 Community License asks for"]),
        ("license: gemma\nextra_gated_prompt: Please accept.", ["LICENSE"],
         "Gemma is provided under and subject to the Gemma Terms of Use found at "
         "ai.google.dev/gemma/terms\n",
         ["[Gemma Terms of Use]", "The base is gated"],
         ["is gated, and a repository made from this folder is not"]),
        ("license: apache-2.0", ["LICENSE", "NOTICE"], None,
         ["[Apache License 2.0]", "[NOTICE](NOTICE)", "The weights were modified"], []),
        ("license: mit", [], None, ["[MIT License]", "was not in the source"],
         ["MIT License and comes without the licence itself"]),
        ("license: bigscience-openrail-m", ["LICENSE"], None,
         ["`bigscience-openrail-m`, as the source's card says", "[LICENSE](LICENSE)"], []),
        ("language: en", ["LICENCE"], None, ["does not state a licence"],
         ["does not state a licence, so the card says 'other'"]),
    ],
    ids=["llama2", "bare", "llama3.1", "llama3", "gemma", "apache", "mit", "openrail", "none"],
)  # fmt: skip
def test_each_licence_goes_along_and_what_is_missing_is_said(
    front: str, given: list[str], notice: str | None, says: list[str], warns: list[str],
    source: Path, cli: Cli, tmp_path: Path,
) -> None:  # fmt: skip
    describe(source, front, *given)
    out = tmp_path / "out"
    result = cli("convert", source, out, *TINY_ARGS, "--base-model", "someone/tiny", "--quiet")
    assert result.exit_code == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(warns), warnings
    for warning, expected in zip(warnings, warns, strict=True):
        assert expected in warning
    for name in given:
        assert (out / name).read_text() == f"{name} of the base.\n"
    listed = json.loads((out / "gloss_manifest.json").read_text())["files"]
    assert ("Notice" in listed) == (notice is not None)
    if notice is not None:
        assert (out / "Notice").read_text("utf-8") == notice
    card = card_of(out)
    for text in says:
        assert text in card.text
    asked = fields(ModelCard(f"---\n{front}\n---\n").data)
    data = fields(card.data)
    if "license" in asked:
        licence = {key: value for key, value in data.items() if key.startswith("license")}
        assert licence == {k: v for k, v in asked.items() if k.startswith("license")}
    assert "The base's own words" not in card.text
    assert data["base_model"] == "someone/tiny"
    assert data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers"
    assert not any(key.startswith("extra_gated") for key in data)
    cli("verify", out, code=0)


def test_a_source_without_a_licence_is_never_given_one(
    source: Path, cli: Cli, tmp_path: Path
) -> None:
    describe(source, "tags: [x]", "LICENSE")
    (source / "README.md").unlink()
    result = cli("convert", source, tmp_path / "out", *TINY_ARGS)
    assert "tiny does not state a licence" in result.stderr
    assert "names no base model" in result.stderr
    data = fields(card_of(tmp_path / "out").data)
    found = data["license"], data["license_name"], data["license_link"]
    assert found == ("other", "unknown", "LICENSE")
    assert "base_model" not in data


def test_nothing_of_the_base_but_licence_language_and_task_is_taken(
    source: Path, manifest: Manifest
) -> None:
    describe(
        source,
        "license: mit\nlanguage: [en, de]\nbase_model: other/base\ntags: [theirs]\nwidget: [x]\n"
        "pipeline_tag: image-text-to-text\ndatasets: [their/data]\nmodel-index: []\n"
        "extra_gated_prompt: x",
    )
    found = resolve(str(source))
    data = fields(front_matter(found, None, manifest, terms_of(found, None)))
    assert data == {
        "license": "mit",
        "language": ["en", "de"],
        "pipeline_tag": "image-text-to-text",
        "library_name": "transformers",
        "tags": ["detoxification", "model-editing", "gloss-paper"],
    }


WRITTEN = [
    "no", "on", "yes", "y", "N", "off", "True", "1.10", "012", "089", "1:20", "1e3", "0x1F",
    "0o14", "1_000", ".5", "-.INF", ".nan", "2024-01-01", "=", "<<", "null", "~", "#x", "a: b",
    "- x", "&a", "naïve", "日本語 💩", "!!int 3", "'", '"', "a\nb", "\ufeffx", " x ", "%x",
    "@x", "`x", "[x", "{x",
]  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN)
def test_a_text_that_is_written_reads_back_as_the_same_text(text: str, tmp_path: Path) -> None:
    front = write_front_matter({"license": text, "language": [text, "en"]})
    assert yaml.safe_load(front) == {"license": text, "language": [text, "en"]}
    describe(tmp_path, front)
    card = read_card(tmp_path / "README.md")
    assert (card["license"], card["language"]) == (text, [text, "en"])
    # a plain scalar begins with a letter and is no word that another reader knows
    plain = front.splitlines()[0].removeprefix("license: ")
    assert plain[0] in "'\"" or (plain[0].isalpha() and len(plain) > 3)


PLAIN = ["no", "on", "Yes", "y", "1.10", "012", "1:20", "1e3", "2024-01-01", "0x1F", ".inf", "=",
         "!!int 3", "!!bool no"]  # fmt: skip


@pytest.mark.parametrize("scalar", PLAIN)
def test_every_scalar_of_a_strangers_card_is_text(scalar: str, tmp_path: Path) -> None:
    describe(tmp_path, f"license: {scalar}\nlanguage: [{scalar}, ~, '', null, 'null']")
    card, text = read_card(tmp_path / "README.md"), scalar.rpartition(" ")[2]
    assert (card["license"], card["language"]) == (text, [text, "null"])


@pytest.mark.parametrize("nothing", ["", "~", "null", "NULL", "''", "[]", "[~]"])
def test_a_key_without_a_value_is_not_there(nothing: str, tmp_path: Path) -> None:
    describe(tmp_path, f"license: {nothing}\npipeline_tag: {nothing if '[' not in nothing else ''}")
    with recording() as seen:
        card = read_card(tmp_path / "README.md")
    assert (card.get("license"), card.get("pipeline_tag")) == (None, None)
    assert seen.warnings == []


@pytest.mark.parametrize(
    ("front", "key"),
    [
        ("license: {name: mit}", "license"),
        ("license: [[mit]]", "license"),
        ("language: [en, {de: yes}]", "language"),
        ("pipeline_tag: [text-generation]", "pipeline_tag"),
        ("license: mit\nlicense_name: [a]", "license_name"),
    ],
)
def test_what_has_another_shape_is_left_out_with_a_warning(
    front: str, key: str, tmp_path: Path
) -> None:
    describe(tmp_path, front)
    with recording() as seen:
        card = read_card(tmp_path / "README.md")
    assert card.get(key) is None
    assert [line.partition(": expected")[0] for line in seen.warnings] == [
        f"README.md: {key} is left out"
    ]


def test_a_card_that_cannot_be_read_is_left_out_with_a_warning(tmp_path: Path) -> None:
    for data, said in (
        ("---\nlicense: mit\n---\nä".encode("latin-1"), "byte 0xe4 in line 4, which is not UTF-8"),
        ("---\nlicense: mit\n---\n".encode("utf-16"), "UTF-16, as its first bytes say"),
        (b"---\nlicense: [mit\n---\n", "malformed"),
    ):
        (tmp_path / "README.md").write_bytes(data)
        with recording() as seen:
            assert read_card(tmp_path / "README.md").get("license") is None
        assert len(seen.warnings) == 1
        assert said in seen.warnings[0]


def test_a_card_may_have_a_byte_order_mark_and_other_line_ends(tmp_path: Path) -> None:
    text = "---\r\nlicense: mit\r\nlanguage: no\r\n---\r\n# x\r\n"
    (tmp_path / "README.md").write_bytes(text.encode("utf-8-sig"))
    card = read_card(tmp_path / "README.md")
    assert (card["license"], card["language"]) == ("mit", "no")


def test_odd_scalars_come_out_of_a_card_as_they_went_in(source: Path, manifest: Manifest) -> None:
    describe(source, "license: other\nlicense_name: 1.10\nlanguage: [no, 1e3]\npipeline_tag: on")
    found = resolve(str(source))
    text, _ = make_card(found, None, manifest, terms_of(found, None), DIGEST)
    front = yaml.safe_load(text.split("---")[1])
    assert front["license_name"] == "1.10"
    assert front["language"] == ["no", "1e3"]
    assert front["pipeline_tag"] == "on"


@pytest.mark.parametrize(
    ("front", "given", "flags"),
    [
        ("language: no", {}, "--pairs, --word-list, --neutral, --prompts"),
        ("language: [de, zh-Hans]", {"word_list": "w.txt"}, "--pairs, --neutral, --prompts"),
        ("language: [de, en-GB]", {}, None),
        ("language: multilingual", {}, None),
        ("license: mit", {}, None),
        (
            "language: de",
            {"pairs": "p.tsv", "word_list": "w", "neutral": "n", "prompts": "p"},
            None,
        ),
    ],
)
def test_what_is_built_in_for_a_model_of_another_language_is_said(
    front: str, given: dict[str, str], flags: str | None, source: Path
) -> None:
    describe(source, front)
    with recording() as seen:
        prepare(Recipe(source=str(source), **given))  # type: ignore[arg-type]
    assert [line.partition("; give ")[2] for line in seen.warnings] == ([flags] if flags else [])


@pytest.fixture
def manifest(converted: tuple[Path, Path]) -> Manifest:
    """Of a conversion."""
    return read_manifest(converted[1])


CardWith = Callable[..., ModelCard]


@pytest.fixture
def card_with(converted: tuple[Path, Path], manifest: Manifest) -> CardWith:
    """The card that this conversion gives if its manifest has these values."""
    source = resolve(str(converted[0]))

    def made(base: str | None = "someone/tiny", **changes: Any) -> ModelCard:
        told = replace(manifest, **changes)
        return ModelCard(make_card(source, base, told, terms_of(source, base), DIGEST)[0])

    return made


def candidates_of(manifest: Manifest) -> tuple[Candidate, ...]:
    """The directions that its method has looked at."""
    assert manifest.subspace is not None
    return manifest.subspace.candidates


def method_with(manifest: Manifest, *candidates: Candidate, **changes: str) -> MethodRecord:
    """Its method, if that had looked at others."""
    assert manifest.subspace is not None
    evidence = to_json(replace(manifest.subspace, candidates=candidates))
    return replace(manifest.method, evidence=evidence, **changes)


def test_the_card_says_what_was_done(converted: tuple[Path, Path]) -> None:
    _, out = converted
    card = card_of(out)
    assert fields(card.data) == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["detoxification", "model-editing", "gloss-paper"],
    }
    for text in (
        "[arXiv 2505.17078](https://arxiv.org/abs/2505.17078)",
        "6 tensors: the down-projections and their biases of layers 2-4, counted from 0",
        "4 of 32 dimensions",
        "became `W - U Uᵀ W`, where `U` is an orthonormal basis of a subspace",
        "Of the directions that the subspace was made from, these are",
        "`gloss_edit.tensors` has the edit",
        "AutoModelForCausalLM.from_pretrained",
        "**not measured**",
        "gloss replay gloss_manifest.json OUT",
        "To undo it, use the source",
        "[LICENSE](LICENSE)",
    ):
        assert text in card.text, text
    assert "\n\n\n" not in card.text
    assert "{{" not in card.text
    assert "{%" not in card.text


def test_manifest_card_and_sums_state_one_another(converted: tuple[Path, Path]) -> None:
    _, out = converted
    digest = hashlib.sha256((out / "gloss_manifest.json").read_bytes()).hexdigest()
    assert (out / "README.md").read_text("utf-8").splitlines().count(hash_line(digest)) == 1
    assert "README.md" not in read_manifest(out).files
    listed = [line[66:] for line in (out / "SHA256SUMS").read_text().splitlines()]
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert listed == sorted(present - {"SHA256SUMS"})
    checked = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=out, check=False)
    assert checked.returncode == 0


def test_a_card_of_another_manifest_is_found_even_when_the_sums_fit(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    out = shutil.copytree(converted[1], tmp_path / "out")
    card, sums = out / "README.md", out / "SHA256SUMS"
    before = hashlib.sha256(card.read_bytes()).hexdigest()
    digest = hashlib.sha256((out / "gloss_manifest.json").read_bytes()).hexdigest()
    for after in (hash_line(DIGEST), f"{hash_line(digest)}\n{hash_line(DIGEST)}", ""):
        text = (converted[1] / "README.md").read_text("utf-8")
        card.write_text(text.replace(hash_line(digest), after), "utf-8")
        now = hashlib.sha256(card.read_bytes()).hexdigest()
        sums.write_text((converted[1] / "SHA256SUMS").read_text().replace(before, now))
        assert verify(out) == ["README.md does not state the sha256 of gloss_manifest.json"]
    card.unlink()
    assert verify(out) == ["README.md: No such file or directory"]


def evaluation() -> Evaluation:
    """Of three systems, and prompts of a dataset."""
    known = convert(skeleton.evaluation(), Evaluation)
    prompts = PromptsRecord(
        origin=Origin(repo_id="someone/prompts", commit="c0ffee", field="hard"),
        sha256=DIGEST,
        count=12,
    )
    settings = replace(known.settings, prompts=prompts, text_sha256="ab" * 32, toxic_words=34)
    rows = tuple(
        RowRecord(system=name, strength="4", seeds=1, metrics={
            "perplexity": Interval.of(value, 1.0, 30.0),
            "toxicity/bad-words/greedy": Interval.of(0.123456, 0.1, 0.2),
            "emt/bad-words": None,
            "distinct_1/greedy": Interval.of(0.9, 0.9, 0.9),
            "ability/mmlu/acc,none": Interval.of(0.25, 0.2, 0.3),
        })
        for name, value in (("unedited", 20.0), ("edited", 21.0), ("random", 22.0))
    )  # fmt: skip
    return replace(known, settings=settings, systems=(), rows=rows)


def test_an_evaluation_becomes_a_model_index_and_a_table(
    converted: tuple[Path, Path], card_with: CardWith
) -> None:
    assert "model-index" not in fields(card_with().data)
    results = evaluation()
    card = card_with(evaluation=results)
    name, index = model_index_to_eval_results(fields(card.data)["model-index"])
    assert name == f"{converted[0].name}-gloss-paper"
    found = {(r.metric_type, r.metric_value, r.dataset_type, r.dataset_revision) for r in index}
    assert found == {
        ("perplexity", 21.0, "text", None),
        ("toxicity", 0.1235, "someone/prompts", "c0ffee"),
        ("acc", 0.25, "mmlu", None),
    }
    here = PromptsRecord(origin=Origin(name="builtin"), sha256=DIGEST, count=12)
    results = replace(results, settings=replace(results.settings, prompts=here))
    (entry,) = fields(card_with(evaluation=results).data)["model-index"]
    named = {part["dataset"]["name"]: len(part["metrics"]) for part in entry["results"]}
    assert named == {f"text with sha256 {'ab' * 8}": 1, "builtin": 1, "mmlu": 1}
    for text in ("| random |", "12 prompts (someone/prompts)", "34 listed words"):
        assert text in card.text


def test_the_guards_numbers_stand_beside_the_control(card_with: CardWith) -> None:
    one, other = (
        Measured(
            perplexity_ratio=Estimate(value=ratio, error=0.004),
            toxic_change=Estimate(value=-1.0, error=0.1),
            teacher_forced=Estimate(value=words, error=0.01),
        )
        for ratio, words in ((1.01, 0.1), (1.002, 1.03))
    )
    known = Manifest.from_json(skeleton.manifest()).guard
    assert known is not None
    guard = replace(
        known, edit=one, controls=(other, other), perplexity=100.0, neutral_tokens=4304,
        toxic_words=310,
    )  # fmt: skip
    text = card_with(guard=guard).text
    assert "90 % less probable than before (95 % interval: 88 % less to 92 % less)" in text
    assert "(random edits) it is 3.0 % more probable" in text
    assert "4,304 neutral tokens | 100.00 | 101.00 (x 1.010 +- 0.004) | x 1.002 |" in text
    assert "310 of them | x 1 | x 0.100 +- 0.010 | x 1.030 |" in text
    assert "other words of toxic" not in text  # of a manifest of before
    beside = [
        replace(m, context_ratio=Estimate(value=v, error=0.01))
        for m, v in ((one, 1.07), (other, 1))
    ]
    guard = replace(guard, edit=beside[0], controls=(beside[1],), context_tokens=1234)
    row = "other words of toxic text, 1,234 tokens | x 1 | x 1.070 +- 0.010 | x 1.000 |"
    assert row in card_with(guard=guard).text
    text = card_with(guard=replace(guard, reasons=("it does nothing",))).text
    assert "**The guard refused this edit: it does nothing." in text
    assert "less probable than before" not in text


def test_a_card_of_an_adapter(manifest: Manifest, card_with: CardWith) -> None:
    card = card_with(run=dataclasses.replace(manifest.run, output="adapter"))
    data = fields(card.data)
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")
    assert 'PeftModel.from_pretrained(base, "THIS_FOLDER_OR_REPO")' in card.text
    assert 'from_pretrained("someone/tiny")' in card.text
    assert "use the base without the adapter" in card.text


def test_tokens_stay_in_their_cell_whatever_they_are(
    manifest: Manifest, card_with: CardWith
) -> None:
    assert code(" damn") == "`damn`"
    assert code("a|b") == "`a\\|b`"
    assert code("`") == "`` ` ``"
    assert code("a\nb\x1b") == "`a\\u000ab\\u001b`"
    assert code(" \n") == ""
    best = max(candidates_of(manifest), key=lambda c: (c.kept, c.score))
    best = replace(best, tokens=("</td>\n# Heading", "|", " f***"))
    text = card_with(method=method_with(manifest, best)).text
    assert "`</td>\\u000a# Heading`, `\\|`, `f***` |\n" in text


def test_offensive_words_are_starred_out(planted: Path, cli: Cli, tmp_path: Path) -> None:
    args = (*planted_args(planted), "--no-guard")
    for more, shown in (((), False), (("--no-mask",), True)):
        out = tmp_path / str(shown)
        cli("convert", planted, out, *args, *more, code=0)
        text = (out / "README.md").read_text("utf-8")
        assert ("`damn`" in text) is shown
        assert ("`d***`" in text) is not shown


def test_pictures_inside_the_destination_belong_to_it(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    source, out = checkpoints("llama"), tmp_path / "out"
    cli("convert", source, out, *TINY_ARGS, "--plots", out / "pictures", code=0)
    found = dict(pictures(read_manifest(out)))
    assert sorted(found) == sorted(f"pictures/{p.name}" for p in (out / "pictures").iterdir())
    for name, caption in found.items():
        assert f"![{caption}]({name})" in (out / "README.md").read_text("utf-8")
    cli("verify", out, code=0)
    cli("convert", source, tmp_path / "b", *TINY_ARGS, "--plots", tmp_path / "beside", code=0)
    assert "![" not in (tmp_path / "b/README.md").read_text("utf-8")
    assert {p.name for p in (tmp_path / "beside").iterdir()} == {Path(name).name for name in found}


def test_pictures_of_an_earlier_edit_are_left_behind(
    converted: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    first = shutil.copytree(converted[1], tmp_path / "first")
    manifest = load_manifest(first)
    names = [f"of it/{name}.png" for name in ("spectrum", "scores", "tradeoff")]
    manifest["files"] |= dict.fromkeys(names, manifest["files"]["LICENSE"])
    (first / "gloss_manifest.json").write_text(json.dumps(manifest))
    (first / "of it").mkdir()
    for name in (*names, "of it/theirs.png"):
        (first / name).write_text("drawn before")
    out = tmp_path / "out"
    cli("convert", first, out, *TINY_ARGS, "--no-guard", "--plots", out / "of it", code=0)
    present = {path.name for path in (out / "of it").iterdir()}
    assert present == {"spectrum.png", "scores.png", "cosines.png", "theirs.png"}
    assert (out / "of it/theirs.png").read_text() == "drawn before"
    assert (out / "of it/scores.png").read_bytes() != b"drawn before"
    assert "](of%20it/scores.png)" in (out / "README.md").read_text("utf-8")


def test_a_malformed_manifest_of_the_source_says_nothing_of_pictures(tmp_path: Path) -> None:
    assert drawn_before(tmp_path) == set()
    for text in ("", "[]", "{}", '{"files": 1, "source": {"files": {}}}',
                 '{"files": {"a.png": 1}, "source": []}', '{"files": {"a.png": 1}, "source": null}',
                 '{"files": ["a.png"], "source": {"files": {}}}'):  # fmt: skip
        (tmp_path / "gloss_manifest.json").write_text(text)
        assert drawn_before(tmp_path) == set()
    listed = {"files": {"a.png": 1, "b.png": 1, "Notice": 1}, "source": {"files": {"b.png": 1}}}
    (tmp_path / "gloss_manifest.json").write_text(json.dumps(listed))
    assert drawn_before(tmp_path) == {"a.png"}


def test_the_licence_of_a_subfolder_is_that_above_it(
    source: Path, cli: Cli, tmp_path: Path
) -> None:
    """As with ``original`` in the repos of Llama 3."""
    (source / "README.md").unlink()
    whole = tmp_path / "whole"
    shutil.move(source, whole / "inner")
    describe(whole, "license: llama2", "LICENSE.txt", "USE_POLICY.md")
    out = tmp_path / "out"
    cli("convert", whole, out, *TINY_ARGS, "--subfolder", "inner", code=0)
    assert fields(card_of(out).data)["license"] == "llama2"
    for name in ("LICENSE.txt", "USE_POLICY.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    args = ("--source", whole, "--subfolder", "inner")
    cli("verify", out, *args, code=0)
    (whole / "LICENSE.txt").write_text("another")
    assert "LICENSE.txt of the source is not the file" in cli("verify", out, *args).stderr
    (whole / "inner/LICENSE").write_text("its own")
    assert set(resolve(str(whole), "inner").small) >= {"LICENSE", "USE_POLICY.md"}
    assert "LICENSE.txt" not in resolve(str(whole), "inner").small


def test_a_notice_of_the_source_that_holds_the_line_is_enough(source: Path, tmp_path: Path) -> None:
    describe(source, "license: llama2", "LICENSE", "USE_POLICY.md")
    (source / "NOTICE").write_text("Ours.\n\n" + LLAMA_2.replace(", ", ",\n  "))
    terms = terms_of(resolve(str(source)), None)
    assert terms.notice == ""
    assert terms.warnings == ()


def test_a_link_to_the_licence_that_was_relative_to_the_base_still_leads_there(
    source: Path, tmp_path: Path
) -> None:
    describe(source, "license: other\nlicense_name: own\nlicense_link: TERMS-OF-USE.md")
    terms = terms_of(resolve(str(source)), "someone/tiny")
    link = "https://huggingface.co/someone/tiny/blob/main/TERMS-OF-USE.md"
    assert terms.fields["license_link"] == link
    (source / "TERMS-OF-USE.md").write_text("Terms.")
    terms = terms_of(resolve(str(source)), "someone/tiny")
    assert terms.fields["license_link"] == "TERMS-OF-USE.md"


@pytest.mark.parametrize(
    ("licence", "repo_id", "fits"),
    [
        ("llama3.1", "someone/Llama-3.1-8B-detox", True),
        ("llama3.1", "someone/Llama-mine", True),
        ("llama3.3", "someone/Meta-Llama-3.3", False),
        ("llama3.2", "Llama/detox", False),
        ("llama3", "someone/Llama-mine", False),
        ("llama3", "someone/Llama-3-8B-detox", True),
        ("llama3", "Llama3-detox", True),
        ("llama2", "someone/anything", True),
        ("apache-2.0", "someone/anything", True),
        ("unheard-of", "someone/anything", True),
        (None, "someone/anything", True),
    ],
)
def test_the_name_that_a_licence_asks_for(licence: str | None, repo_id: str, fits: bool) -> None:
    assert (check_name(licence, repo_id) == []) is fits
    if not fits:
        assert repo_id.partition("/")[2] in check_name(licence, repo_id)[0]


def test_the_title_begins_as_the_licence_asks(
    converted: tuple[Path, Path], manifest: Manifest
) -> None:
    source = resolve(str(converted[0]))
    for licence, name, title in (
        ("llama3.1", "meta-llama/Llama-3.1-8B", "Llama-3.1-8B-gloss-paper"),
        ("llama3", "meta-llama/Meta-Llama-3-8B", "Llama-3-8B-gloss-paper"),
        ("llama3", "someone/mine", "Llama-3-mine-gloss-paper"),
        ("mit", "someone/mine", "mine-gloss-paper"),
    ):
        asked = dataclasses.replace(source, name=name, card=ModelCardData(license=licence))
        assert title_of(asked, manifest) == title
        assert check_name(licence, title) == []


def test_a_licence_is_recognised_by_its_word_alone() -> None:
    for card, name in (
        (ModelCardData(license="llama2"), "llama2"),
        (ModelCardData(license="other", license_name="llama3.2"), "llama3.2"),
        (ModelCardData(license=["cc-by-4.0", "gemma"]), "gemma"),  # type: ignore[arg-type]
        (ModelCardData(license="other"), None),
        (ModelCardData(license="unknown"), None),
        (ModelCardData(), None),
        (ModelCardData(license="llama-2-ish"), "llama-2-ish"),
    ):
        assert licence_name(card) == name
    assert "llama-2-ish" not in families()
    for family in families().values():
        assert set(family.papers) <= {"agreement", "policy"}


def test_which_files_are_papers() -> None:
    names = ["LICENSE", "license.txt", "LICENCE-MODEL", "Notice", "NOTICE.md", "USE_POLICY.md",
             "use_policy.txt", "licenses.json", "license.py", "docs/LICENSE", "notices.safetensors",
             "unlicensed.txt"]  # fmt: skip
    assert papers(names) == {
        "agreement": ["LICENCE-MODEL", "LICENSE", "license.txt"],
        "notice": ["NOTICE.md", "Notice"],
        "policy": ["USE_POLICY.md", "use_policy.txt"],
    }


def test_a_gate_on_the_hub_is_seen(
    converted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for gated in ("manual", False, None):
        info = SimpleNamespace(id="someone/tiny", sha="c0ffee0000" * 4, siblings=[], gated=gated)
        monkeypatch.setattr(HfApi, "repo_info", lambda *_, info=info, **__: info)
        source: Source = resolve(str(converted[0]))
        source = dataclasses.replace(source, remote=hub.resolve("model", "someone/tiny"))
        warnings = terms_of(source, "someone/tiny").warnings
        assert any("someone/tiny is gated" in text for text in warnings) is bool(gated)


def test_a_signature_of_the_source_is_not_carried_over(source: Path, tmp_path: Path) -> None:
    (source / "model.sig").write_text("of other bytes")
    assert "model.sig" not in resolve(str(source)).small


def test_papers_become_links() -> None:
    link = "[arXiv 2405.13967](https://arxiv.org/abs/2405.13967)"
    assert paper_link("https://arxiv.org/abs/2405.13967") == link
    assert paper_link("Uppaal et al., arXiv:2405.13967v3") == link
    assert paper_link("https://example.org/a.pdf") == "[paper](https://example.org/a.pdf)"
    assert paper_link("A book.") == "A book."


def test_commit_and_subfolder_are_named_wherever_they_are_needed(
    converted: tuple[Path, Path], manifest: Manifest, card_with: CardWith
) -> None:
    origin = replace(manifest.source, repo_id="someone/tiny", commit="c0ffee")
    run = dataclasses.replace(manifest.run, subfolder="./in it/small")
    text = card_with(source=origin, run=run).text
    command = "gloss verify THIS_FOLDER --source someone/tiny@c0ffee --subfolder './in it/small'"
    assert f"    {command}\n" in text
    link = "[someone/tiny](https://huggingface.co/someone/tiny)"
    assert f"{link} at commit `c0ffee`, subfolder `./in it/small`.\n" in text
    assert "subfolder=" not in text  # what was made is in no subfolder
    told = {"source": origin, "run": dataclasses.replace(run, output="adapter")}
    where = 'revision="c0ffee", subfolder="in it/small")'
    text = card_with(**told).text
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        assert f'{name}.from_pretrained("someone/tiny", {where}\n' in text
    # where another repo is called the base, nothing is known of its folders
    assert "subfolder=" not in card_with("other/base", **told).text
    # of Meta's layout, transformers loads the translation, which is at the top of the repo
    source = resolve(str(converted[0]))
    source = dataclasses.replace(source, originals=(Path("consolidated.00.pth"),))
    assert pinned(source, replace(manifest, **told)) == ', revision="c0ffee"'


def test_a_random_subspace_is_called_a_control(manifest: Manifest, card_with: CardWith) -> None:
    drawn = [replace(candidate, kind="random") for candidate in candidates_of(manifest)]
    title = "random subspace, a control"
    text = card_with(method=method_with(manifest, *drawn, name="random", title=title)).text
    assert "with a random subspace taken out: **a control**" in text
    assert "write toxicity" not in text
    assert "less probable." not in text.partition("## How to use it")[0]
