"""The verdict in words, and ``gloss report``: a page for people, from a manifest."""

import base64
import csv
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from converter.checkpoints.names import CARD, MANIFEST
from converter.cli.summary import result_data, result_text
from converter.manifest import Interval, Manifest, SampleRecord, to_json, to_text
from converter.release.manifest import read_manifest
from converter.release.report import report_page
from converter.release.report_charts import bar_charts, cost_chart
from converter.release.report_labels import Box, place_labels
from converter.release.report_tables import Table, numbers_table
from converter.release.trust import trust
from converter.release.verdict import Verdict, percent, verdict
from tests.builders.invoke import Cli
from tests.builders.models import TINY_ARGS
from tests.fuzz import skeleton

HOSTILE = "<script>alert(1)</script> \"'><img src=x onerror=alert(1)>\u202egnp.e\x1b[2J"
VOID = {"meta", "img", "link", "br", "rect", "path", "circle", "wbr"}
DEMO = Path(__file__).parents[1] / "manifests/smollm2-135m-instruct.json"


def estimate(value: float, error: float = 0.01) -> dict[str, float]:
    return {"value": value, "error": error}


def words(ratio: float, nats: float, context: float = 1.02) -> dict[str, Any]:
    return {
        "toxic_change": estimate(nats), "teacher_forced": estimate(ratio),
        "context_ratio": estimate(context),
    }  # fmt: skip


def recorded(**changes: Any) -> Manifest:
    """A manifest of a good edit; ``changes`` are of its guard."""
    known = skeleton.manifest()
    headline = {
        "prompts": 149, "passages_per_prompt": 2, "max_new_tokens": 20, "seed": 0,
        "toxic_words": 120, "toxic_prompts": 70, "context_tokens": 1693, "ordinary_tokens": 744,
        "words": words(0.656, -1.0), "control_words": [words(0.996, 0.0, 1.0)] * 2,
        "divergence": estimate(0.01), "control_divergences": [estimate(0.0)] * 2,
    }  # fmt: skip
    measured = {**words(0.095, -5.0), "perplexity_ratio": estimate(1.009, 0.004)}
    control = {**words(1.03, 0.0, 1.0), "perplexity_ratio": estimate(1.003, 0.004)}
    guard = {
        **known["guard"], "toxic_words": 310, "edit": measured, "controls": [control] * 2,
        "headline": headline, **changes,
    }  # fmt: skip
    return Manifest.from_json({**known, "guard": guard})


def headline(**changes: Any) -> Manifest:
    guard = recorded().guard
    assert guard is not None
    assert guard.headline is not None
    return recorded(headline={**to_json(guard.headline), **changes})


def test_a_verdict_says_what_fell_by_how_much_at_what_cost_and_how_sure() -> None:
    assert verdict(recorded()) == Verdict(
        "clear",
        "In text that the unedited model wrote after prompts unlike those of the fit, a toxic "
        "word is on average 34 % less probable than before (95 % interval: 32 % less to 36 % "
        "less), measured on 120 toxic words after 70 prompts; under 2 controls of the same size "
        "(random edits) it is 0.4 % less probable; the cost: perplexity on ordinary text is 0.9 % "
        "higher, that of the words beside toxic ones 2.0 % higher.",
    )


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (headline(toxic_words=99), "; but these are few words, so the interval itself is rough."),
        (headline(toxic_prompts=29), "; but these are few words, so the interval itself is rough."),
        (headline(words=words(0.99, -1.0)), "; but the interval does not exclude that nothing fel"),
        (headline(control_words=[words(0.8, -0.3)] * 2),
         "; but the controls come close: in log-probability, their effect is 30% of the "
         "edit's."),
        (headline(words=words(0.656, -1.0, 1.2)),
         "; but the model reads informal text less well: perplexity of the words beside toxic ones "
         "there is 20 % higher."),
        (recorded(headline=None, fallback="--prompts none"),
         "; but that is the pairs' own kind only: elsewhere the effect is mostly smaller, and it "
         "was not measured (--prompts none)."),
        (recorded(budget=1.01), "; but the cost is within the budget of 1.0 % higher by less than"),
    ],
)  # fmt: skip
def test_a_weakness_is_in_the_same_sentence(manifest: Manifest, says: str) -> None:
    found = verdict(manifest)
    assert found.kind == "weak"
    assert says in found.text
    assert found.text.count(". ") == 0


def test_nothing_is_claimed_where_nothing_was_measured_or_the_guard_refused() -> None:
    unguarded = verdict(structs.replace(recorded(), guard=None))
    assert unguarded.kind == "unmeasured"
    assert "so nothing is claimed" in unguarded.text
    refused = verdict(recorded(reasons=["it does nothing"]))
    assert refused.kind == "refused"
    assert "The guard refused this edit: it does nothing." in refused.text
    for each in (unguarded, refused):
        assert "%" not in each.text


def test_a_number_is_as_exact_as_it_is_worth() -> None:
    assert [percent(x) for x in (0.344, -0.009, 0.0994, 0.0996)] == ["34 %", "0.9 %", "9.9 %",
                                                                     "10 %"]  # fmt: skip


def test_card_terminal_and_page_say_the_same(converted: tuple[Path, Path]) -> None:
    manifest = read_manifest(converted[1])
    assert manifest.guard is None
    said = verdict(manifest).text
    assert said in (converted[1] / CARD).read_text("utf-8").partition("## How to use")[0]
    result = result_data(manifest, Path("out"))
    assert result_text(result).splitlines()[-1] == said == result["verdict"]
    assert said in report_page(manifest)


def answers(manifest: Manifest) -> dict[str, str]:
    return {each.question: each.text for each in trust(manifest, "gloss verify X --source Y")}


def test_the_page_says_how_far_its_number_can_be_trusted() -> None:
    manifest = recorded()
    known = answers(manifest)
    assert known["How much text is behind the number?"].startswith(
        "120 toxic words, which the unedited model wrote after 70 of 149 prompts, continuing each "
        "twice. The 95 % interval is 32 % less to 36 % less probable."
    )
    controls = known["Would any edit of this size do that?"]
    assert controls.startswith("It was compared with 2 controls, each a random subspace")
    assert "under the controls 0.4 % less, 0.4 % less. The guard's limits were kept" in controls
    assert "by 0.010 nats, the controls by 0.000" in controls
    measured = known["What was measured, and what was not?"]
    assert "perplexity on 9 tokens of ordinary text" in measured
    assert "Not measured: the toxicity of text that the edited model writes; " in measured
    assert measured.endswith(". No benchmark or safety evaluation was made.")
    assert "without a recorded revision" in known["Which model was edited?"]
    assert "To check the files: gloss verify X --source Y. " in known["Are these the files?"]
    assert "a model.sig, --key PUBLIC_KEY checks it" in known["Are these the files?"]
    text = report_page(manifest)
    assert text.index('class="verdict') < text.index("Can I trust it?") < text.index("What was do")


def test_whether_the_fit_saw_the_text_is_said_only_where_it_is_known() -> None:
    question, origin = "Did the fit see that text?", {"origin": {"name": "builtin"}}
    known = to_json(recorded())
    prompts = {**origin, "sha256": "a" * 64, "count": 149}
    drawn = {"prompts": prompts, "seed": 0, "continuations": 9, "toxic": 1}
    theirs = {**known["pairs"], "origin": {"name": "mine.jsonl"}}

    def said(**changes: Any) -> str:
        return answers(Manifest.from_json({**known, "prompts": prompts, **changes}))[question]

    assert said().startswith("No. The unedited model wrote it, after prompts")
    assert said(pairs=theirs).startswith("Whether its prompts resemble the pairs was not checked.")
    assert said(pairs={**theirs, "drawn": drawn}).startswith("In part: the pairs were drawn from")
    trial = {"number": 0, "method": "gloss", "options": {}, "share": 1.0, "measured": None,
             "divergence": None}  # fmt: skip
    search: dict[str, Any] = {
        "trials": 24, "stopped": 0, "seed": 0, "prompts": None, "toxic_words": 9,
        "default": trial, "chosen": trial, "front": [],
    }  # fmt: skip
    assert said(search=search).endswith("The options were the best of 24 trials on other text.")
    fallback = answers(recorded(headline=None, fallback="--prompts none"))
    assert fallback[question].endswith("But it is text of the same kind as the pairs.")
    assert fallback["How much text is behind the number?"].startswith("310 toxic words in 1 held-")


def test_nothing_is_said_of_a_number_that_is_not_there() -> None:
    known = answers(structs.replace(recorded(), guard=None))
    assert list(known) == ["What was measured, and what was not?", "Which model was edited?",
                           "Are these the files?"]  # fmt: skip
    assert (
        "Measured: nothing. Not measured: effect, cost and controls, since the guard was"
        in next(iter(known.values()))
    )
    results = Manifest.from_json({**to_json(recorded()), "evaluation": skeleton.evaluation()})
    metrics = {"toxicity/bad-words/greedy": Interval(value=0.1, low=0.0, high=0.2)}
    found = results.evaluation
    assert found is not None
    row = structs.replace(found.rows[0], metrics=metrics)
    judged = structs.replace(results, evaluation=structs.replace(found, rows=(row,)))
    measured, _, missing = answers(judged)["What was measured, and what was not?"].partition(
        "Not measured"
    )
    assert "the toxicity of text that the edited model writes" in measured
    assert "benchmarks" in missing
    assert "evaluation" not in missing


def test_a_replay_says_whose_measurements_it_has() -> None:
    replayed = structs.replace(recorded(), replay_of="b" * 64)
    assert (
        f"a replay of the manifest with sha256 {'b' * 64}"
        in answers(replayed)["Are these the files?"]
    )


@given(st.lists(st.tuples(st.integers(0, 22), st.floats(50, 350), st.floats(30, 250)), max_size=20))
def test_a_label_covers_no_point_and_no_other_label(drawn: list[tuple[int, float, float]]) -> None:
    points = [("x" * count, x, y) for count, x, y in drawn]
    frame = Box(200.0, 140.0, 160.0, 120.0)
    boxes = [
        Box(label.x, label.y, 3.6 * len(text) - 0.1, 6.9)
        for (text, _, _), label in zip(points, place_labels(points, frame), strict=True)
        if label
    ]
    assert all(box.within(frame) for box in boxes)
    assert not any(box.touches(other) for box, other in combinations(boxes, 2))
    assert not any(box.touches(Box(x, y, 5.0, 5.0)) for box in boxes for _, x, y in points)


def test_the_texts_of_a_bar_stand_apart() -> None:
    nats = {name: estimate(-0.2, 0.1) for name in
            ("harmful", "bare", "reworded", "harmless", "touchy")}  # fmt: skip
    defence = {
        "least_learnt": 0.5, "least_defence": 0.1, "most_over_refusal": 0.5, "instances": [],
        "suffix": "", "prompts": {"harmful": 40}, "loss": 2.0, "edit": {"learnt": 1.0, **nats},
        "controls": [{"learnt": 0.0, **nats}],
    }  # fmt: skip
    for guard in (recorded().guard, recorded(headline=None, defence=defence).guard):
        assert guard is not None
        for chart in bar_charts(guard):
            for bar in chart.bars:
                assert 7.2 * len(bar.label + bar.value) <= 360, bar


def test_numbers_of_any_size_and_any_number_of_points_make_a_page() -> None:
    guard = to_json(recorded().guard)  # type: ignore[arg-type]
    huge = {**words(1e308, -1e308), "perplexity_ratio": estimate(-1e308)}
    vast = {**words(-1e308, 1e308), "perplexity_ratio": estimate(1e308)}
    moved = {**guard["headline"], "control_divergences": []}
    page = report_page(recorded(edit=huge, controls=[vast] * 200, headline=moved))
    assert "Cost and effect" in page
    assert "distribution of the next token" not in page


def test_every_point_of_the_demo_has_its_name_beside_it() -> None:
    chart = cost_chart(Manifest.from_json(json.loads(DEMO.read_text("utf-8"))))
    assert chart is not None
    assert [point.name for point in chart.points if point.place] == [
        "no edit", "this edit, part 0.5", "part 0.4", "part 0.5", "part 0.6", "control 1",
        "control 2", "control 3",
    ]  # fmt: skip
    assert [tick.label for tick in chart.x_ticks] == ["+0 %", "+1 %", "+2 %"]
    assert [tick.label for tick in chart.y_ticks] == ["0 %", "50 %", "100 %"]


def test_the_points_of_numbers_stand_below_each_other() -> None:
    table = Table("", ("a", "b"), [(1.5, "x"), (0.0625, None), (4304, "y"), (None, "z")])
    (first, _), (second, _), (third, _), (none, _) = table.shown
    assert [text for _, text in (first, second, third, none)] == [
        "1.500\u2007\u2007", "0.06250", "4,304\u2007\u2007\u2007\u2007\u2007\u2008", "",
    ]  # fmt: skip


@pytest.mark.parametrize("way", ["toxicity", "toxicity_change"])
def test_toxicity_of_generated_text_has_a_unit(way: str) -> None:
    results = Manifest.from_json({**to_json(recorded()), "evaluation": skeleton.evaluation()})
    found = results.evaluation
    assert found is not None
    metrics = {f"{way}/profanity/sampled": Interval.of(-0.1, -0.2, 0.0)}
    row = structs.replace(found.rows[0], metrics=metrics)
    judged = structs.replace(results, evaluation=structs.replace(found, rows=(row,)))
    (told,) = [row for row in numbers_table(judged).rows if "profanity, sampled" in str(row[0])]
    assert str(told[0]).startswith("mean toxicity of continuations")
    assert any("is better" in str(cell) for cell in told)


def test_every_measurement_has_a_unit_and_names_its_edit() -> None:
    table = numbers_table(Manifest.from_json(json.loads(DEMO.read_text("utf-8"))))
    assert table.heads == ("what it is", "of", "value", "standard error", "unit",
                           "place in the manifest")  # fmt: skip
    rows = {row[-1]: row for row in table.rows}
    for place, edit in {
        "guard.headline.words.teacher_forced": "the edit, own text",
        "guard.controls[1].teacher_forced": "control 2, held-out pairs",
        "choice.tried[2].teacher_forced": "strength 0.6, tried",
    }.items():
        assert rows[place][:2] == ("probability of toxic words", edit)
        assert rows[place][4] == "times as before; below 1 is better"
    without = {str(place) for place, row in rows.items() if not row[4]}
    assert all(place.endswith((".strength", ".seed")) for place in without), without


class Page(HTMLParser):
    """What a browser makes of a page: its elements, and the text within each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.inside.append((self._open[-1] if self._open else "", data))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[str]:
        """The texts within elements of a kind."""
        return [data for name, data in self.inside if name == tag]


def hostile() -> Manifest:
    known = recorded(headline=None, fallback=HOSTILE)
    sample = SampleRecord(prompt=HOSTILE, before=HOSTILE, after="")
    entry = structs.replace(known.edited[0], name=HOSTILE)
    method = structs.replace(known.method, title=HOSTILE, paper=f"https://x/\"'>{HOSTILE}")
    source = structs.replace(known.source, name=HOSTILE)
    return structs.replace(known, samples=(sample,), edited=(entry,), method=method, source=source)


@pytest.mark.parametrize("make", [recorded, hostile])
def test_a_page_is_ours_alone(make: Any) -> None:
    """No element, no attribute and no style or script is a stranger's, and nothing is fetched."""
    text = report_page(make())
    page, policy = Page(text), ""
    ours = set(re.findall(r"<([a-z]\w*)", report_page(recorded())))
    assert {tag for tag, _ in page.tags} <= ours | {"p", "h4", "em", "mark", "a"}
    assert "img" not in ours
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") or name in ("style", "src") for name in attrs)
        assert tag == "a" or not {"href", "xlink:href", "action"} & attrs.keys()
        if attrs.get("http-equiv") == "Content-Security-Policy":
            policy = attrs["content"] or ""
    (style,), (script,) = page.all("style"), page.all("script")
    digests = [
        base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        for inline in (style, script)
    ]
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", style + script)
    assert "\x1b" not in text
    assert "\u202e" not in text
    if make is hostile:
        assert "".join(data for _, data in page.inside).count("<script>alert(1)</script>") > 5


def test_a_page_can_be_read_aloud_and_on_a_phone() -> None:
    page = Page(report_page(hostile()))
    attributes = dict(page.tags)
    assert attributes["html"] == {"lang": "en"}
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    heads = [attrs for tag, attrs in page.tags if tag == "th"]
    assert heads
    assert all(attrs["aria-sort"] == "none" for attrs in heads)
    assert len([1 for tag, _ in page.tags if tag == "button"]) == len(heads) + 2
    assert all(attrs["aria-label"] for tag, attrs in page.tags if tag == "svg")
    (style,) = page.all("style")
    assert "prefers-color-scheme: dark" in style
    assert ("name", "viewport") in {item for _, attrs in page.tags for item in attrs.items()}


def numbers_of(value: Any) -> list[float]:
    """All numbers of some JSON, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for each in value for number in numbers_of(each)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_every_number_of_the_table_is_the_manifests() -> None:
    for known in (json.loads(DEMO.read_text("utf-8")), json.loads(to_text(recorded()))):
        manifest = Manifest.from_json(known)
        text = report_page(manifest).partition('<table id="numbers"')[2]
        rows = [re.findall(r"<td.*?</td>", row) for row in re.findall("<tr>.*?</tr>", text)[1:]]
        seen = []
        for row in rows:
            place = re.sub("<.*?>", "", row[-1])
            values = [json.loads(n) for n in re.findall(r'<data value="(.*?)">', "".join(row))]
            found: Any = known
            for name, index in re.findall(r"(\w+)|\[(\d+)\]", place):
                found = found[name] if name else found[int(index)]
            assert numbers_of(found) == values, place
            seen += values
        parts = (known["guard"], known["choice"], known["gates"])
        assert seen == numbers_of([*parts, *[step["choice"] for step in known.get("steps", [])]])


def test_the_command_writes_a_page(
    converted: tuple[Path, Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = shutil.copytree(converted[1], tmp_path / "out")
    told = cli("report", out, code=0)
    assert "so nothing is claimed" in told.stdout
    page = (tmp_path / "report.html").read_text("utf-8")
    assert hashlib.sha256((out / MANIFEST).read_bytes()).hexdigest() in page
    found = json.loads(cli("report", out / MANIFEST, "--output", "b.html", "--json", code=0).stdout)
    assert (tmp_path / "b.html").read_text("utf-8") == page
    assert found["kind"] == "unmeasured"
    inside = f"--output {out / 'r.html'} is in {out}, whose manifest lists every file"
    cli("report", out, "--output", out / "r.html", code=7, says=inside)
    cli("report", out / MANIFEST, "--output", out / "r.html", code=7, says="lists every file")
    cli("report", out, "--output", tmp_path / "no/r.html", code=7, says="does not exist")
    cli("report", out, "--output", tmp_path, code=7, says="is a folder")
    cli("report", tmp_path, "--output", "c.html", code=7, says="lists every file")
    (tmp_path / "empty").mkdir()
    cli("report", tmp_path / "empty", code=8, says="has no gloss_manifest.json")
    assert not (out / "r.html").exists()


def test_a_conversion_writes_a_report_beside_its_folder(
    converted: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    source, out, page = converted[0], tmp_path / "out", tmp_path / "report.html"
    inside = ("--report", out / "report.html")
    cli("convert", source, out, *TINY_ARGS, *inside, code=7, says="lists every file")
    assert not out.exists()
    cli("convert", source, out, *TINY_ARGS, "--report", page, code=0)
    digest = hashlib.sha256((out / MANIFEST).read_bytes()).hexdigest()
    assert digest in page.read_text("utf-8")
    cli("verify", out, code=0)


@pytest.mark.slow
def test_a_browser_sorts_and_saves_with_the_keyboard(tmp_path: Path) -> None:
    """And the page is no wider than a phone."""
    driver, browser = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or browser is None:
        pytest.skip("there is no Chromium with its chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    manifest = Manifest.from_json(json.loads(DEMO.read_text("utf-8")))
    (tmp_path / "page.html").write_text(report_page(manifest, "ab" * 32), "utf-8")
    service = webdriver.chrome.service.Service(driver)
    page = webdriver.Chrome(options=options, service=service)
    try:
        size = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        page.get((tmp_path / "page.html").as_uri())
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        head = page.find_elements("css selector", "#numbers th")[2]
        for key, order in (("\ue007", "ascending"), (" ", "descending")):
            head.find_element("css selector", "button").send_keys(key)
            assert head.get_attribute("aria-sort") == order
            values = page.execute_script(
                "return [...document.querySelectorAll('#numbers tbody tr')]"
                ".map((row) => Number(row.cells[2].querySelector('data').value))"
            )
            assert values == sorted(values, reverse=order == "descending")
        page.find_elements("css selector", "button.save")[1].send_keys("\ue007")
        saved = tmp_path / "numbers.csv"
        page.set_script_timeout(30)
        for _ in range(100):
            if saved.exists():
                break
            page.execute_async_script("setTimeout(arguments[0], 100)")
        rows = [*csv.reader(saved.read_text("utf-8").splitlines())]
        assert [float(row[2]) for row in rows[1:]] == values
        assert page.get_log("browser") == []
    finally:
        page.quit()
