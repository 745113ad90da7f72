"""What the pictures show, and that two runs write the same bytes. Figures are read, not pixels."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import convert
from msgspec.structs import replace
from safetensors.numpy import save_file

from converter.edits.edit_file import EVIDENCE
from converter.errors import DestinationError, OptionError, VerificationError
from converter.evaluation.plots import (
    READABLE,
    bars_figure,
    cosines_figure,
    plot_evaluation,
    plot_fit,
    score_threshold,
    scores_figure,
    spectrum_figure,
    tradeoff_figure,
    tradeoff_points,
)
from converter.evaluation.results import summarise
from converter.manifest import (
    Candidate,
    Evaluation,
    Interval,
    Manifest,
    Metric,
    OptionValue,
    RowRecord,
    SubspaceEvidence,
    SystemRecord,
    to_json,
)
from tests.builders.errors import refused
from tests.fuzz import skeleton

pytest.importorskip("matplotlib")

LAYERS = range(10, 40)
RANKS = (1, 2, 4, 6, 8, 16)
PNG = b"\x89PNG\r\n\x1a\n"


def make_manifest(*, shared: bool = True) -> Manifest:
    """30 layers of 4 candidates, best in the middle; for per-layer bases all are kept."""
    rng = np.random.default_rng(0)
    candidates = []
    for layer in LAYERS:
        for index in range(4):
            best = 0.4 * np.exp(-(((layer - 25) / 8) ** 2)) + 0.05
            score = float(best * 0.45**index * rng.uniform(0.8, 1.2))
            candidates.append(
                Candidate(
                    layer=layer,
                    kind="causal" if index else "mean",
                    index=index,
                    score=score,
                    kept=not shared or score > 0.2,
                    tokens=("offensive",),
                )
            )
    count = sum(c.kept for c in candidates)
    names = ["U"] if shared else [f"U.{layer}" for layer in LAYERS]
    known = Manifest.from_json(skeleton.manifest())
    options: dict[str, OptionValue] = {"ranking": "causal"} if shared else {}
    evidence = SubspaceEvidence(
        hidden_size=64,
        singular_values={name: tuple((2.0 / np.arange(1, count + 1)).tolist()) for name in names},
        candidates=tuple(candidates),
    )
    method = replace(known.method, options=options)
    choice = replace(known.choice, strength=4)
    return keeping(replace(known, method=method, choice=choice), evidence)


def keeping(manifest: Manifest, evidence: SubspaceEvidence) -> Manifest:
    """A manifest of a method that keeps this."""
    return replace(manifest, method=replace(manifest.method, evidence=to_json(evidence)))


def evidence_of(manifest: Manifest) -> SubspaceEvidence:
    """What the method of a manifest keeps."""
    assert manifest.subspace is not None
    return manifest.subspace


@pytest.fixture
def edit_file(tmp_path: Path) -> Path:
    """The first candidate of each layer is that of the one before, turned by 60 degrees."""
    vectors = np.zeros((4 * len(LAYERS), 64), dtype=np.float32)
    for place in range(len(LAYERS)):
        angle = place * math.pi / 3
        vectors[4 * place, :2] = math.cos(angle), math.sin(angle)
        vectors[4 * place + 1 : 4 * place + 4, 2:5] = np.eye(3)
    path = tmp_path / "edit.safetensors"
    save_file({f"{EVIDENCE}candidates": vectors}, path)
    return path


def around(value: float, half: float) -> Metric:
    return Interval.of(value, value - half, value + half)


def system(name: str, seed: int | None, rank: int | None, **metrics: Metric) -> SystemRecord:
    return SystemRecord(
        system=name, group=rank, seed=seed, strength=rank, layers=(), options={}, metrics=metrics
    )


def make_results() -> Evaluation:
    """3 systems of 6 ranks and 3 seeds. Rank 16 of profs breaks in one seed: +80 % on average."""
    ratio = around(1, 0)
    systems = [system("unedited", None, None, perplexity=around(20, 0.2), perplexity_ratio=ratio)]
    for name, cost, effect in (("gloss", 0.3, 0.2), ("profs", 0.6, 0.1), ("random", 0.1, 0.0)):
        for seed in range(3):
            for rank in reversed(RANKS):
                increase = cost * rank + 0.05 * (seed - 1)
                if (name, rank, seed) == ("profs", 16, 0):
                    increase = 240 - 2 * cost * rank - 0.05
                ratio = around(1 + increase / 100, 0.002)
                words = around(math.exp(-effect * rank), 0.02)
                systems.append(
                    system(name, seed, rank, perplexity_ratio=ratio, teacher_forced=words)
                )
    rows = tuple(
        RowRecord(system=name, strength=rank, seeds=3, metrics={
            "toxicity/profanity/greedy": around(0.3 * factor, 0.03),
            "toxicity/profanity/sampled": around(0.4 * factor, 0.02),
        })
        for name, rank, factor in (("unedited", "", 1), ("gloss", "4, 6", 0.5))
    )  # fmt: skip
    known = convert(skeleton.evaluation(), Evaluation)
    return replace(known, systems=tuple(systems), rows=rows, scorers=("profanity", "bad-words"))


def there(figure: Any) -> Any:
    """A figure that is there: there was something to draw."""
    assert figure is not None
    return figure


def labelled(axes: Any) -> dict[str, Any]:
    """The artists of the legend, by label."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def test_two_runs_write_the_same_pictures(edit_file: Path, tmp_path: Path) -> None:
    first, second = (
        plot_fit(make_manifest(), edit_file, folder)
        + plot_evaluation(make_results(), folder)
        for folder in (tmp_path / "a/new", tmp_path / "b")
    )  # fmt: skip
    assert [path.name for path in first] == [
        "spectrum.png", "scores.png", "cosines.png", "tradeoff.png", "scores_before_after.png"
    ]  # fmt: skip
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert one.read_bytes().startswith(PNG)
        assert b"Software" not in one.read_bytes()


def test_spectrum_marks_rank_and_threshold() -> None:
    manifest = make_manifest()
    figure = there(spectrum_figure(manifest))
    left, right = figure.axes
    squares = np.square(evidence_of(manifest).singular_values["U"])
    shares = np.asarray(left.lines[0].get_ydata())
    assert shares == pytest.approx((100 * squares / squares.sum())[: len(shares)])
    rank = manifest.edit.rank
    assert left.lines[1].get_xdata() == [rank + 0.5, rank + 0.5]
    assert left.lines[1].get_label() == f"rank {rank}"
    (threshold,) = {float(x) for x in np.asarray(right.lines[0].get_xdata())}
    for candidate in evidence_of(manifest).candidates:
        assert (candidate.score > threshold) == candidate.kept
    kept, others = right.containers
    assert min(bar.get_x() for bar in kept) > threshold
    assert max(bar.get_x() + bar.get_width() for bar in others) < threshold
    assert sum(bar.get_height() for bar in [*kept, *others]) == 4 * len(LAYERS)


def test_per_layer_spectra_have_a_line_each_and_no_threshold() -> None:
    figure = there(spectrum_figure(make_manifest(shared=False)))
    left, right = figure.axes
    assert len(left.lines) == len(LAYERS) + 1
    assert not right.lines
    assert list(labelled(right)) == [f"{4 * len(LAYERS)} kept"]


def test_scores_stand_at_their_layers() -> None:
    manifest = make_manifest()
    figure = there(scores_figure(manifest))
    lines = labelled(figure.axes[0])
    candidates = evidence_of(manifest).candidates
    for kind in ("mean", "causal"):
        for kept, state in ((True, "kept"), (False, "not kept")):
            mine = [c for c in candidates if c.kind == kind and c.kept is kept]
            line = lines[f"{kind}, {state}"]
            assert [round(x) for x in line.get_xdata()] == [c.layer for c in mine]
            assert list(line.get_ydata()) == [c.score for c in mine]
            assert (line.get_markerfacecolor() == "white") is not kept
    assert lines["threshold"].get_ydata()[0] == score_threshold(candidates)


def test_cosines_are_those_of_the_best_candidates(edit_file: Path) -> None:
    figure = there(cosines_figure(make_manifest(), edit_file))
    cosines = np.asarray(figure.axes[0].images[0].get_array())
    places = np.arange(len(LAYERS))
    expected = np.abs(np.cos((places[:, None] - places) * math.pi / 3))
    assert cosines == pytest.approx(expected, abs=1e-5)
    assert figure.axes[0].get_xticklabels()[0].get_text() == str(LAYERS[0])


def test_what_has_no_data_is_not_drawn(tmp_path: Path) -> None:
    """An edit's file may have no candidates; a random subspace has no spectrum."""
    path = tmp_path / "edit.safetensors"
    save_file({"U": np.eye(2, dtype=np.float32)}, path)
    manifest = make_manifest()
    known = evidence_of(manifest)
    candidates = tuple(
        replace(candidate, score=0.0, kept=True, kind="random") for candidate in known.candidates
    )
    drawn = keeping(manifest, replace(known, singular_values={}, candidates=candidates))
    assert [p.name for p in plot_fit(drawn, path, tmp_path)] == ["scores.png"]
    results = make_results()
    results = replace(results, systems=results.systems[:1], rows=(), scorers=())
    assert plot_evaluation(results, tmp_path) == []


def test_of_a_method_without_a_subspace_nothing_is_drawn(edit_file: Path, tmp_path: Path) -> None:
    manifest = make_manifest()
    other = replace(manifest, method=replace(manifest.method, evidence={"layer": 2}))
    assert plot_fit(other, edit_file, tmp_path / "pictures") == []


def test_tradeoff_lines_go_by_rank_and_average_seeds() -> None:
    results = make_results()
    points = tradeoff_points(results.systems)
    assert list(points) == ["gloss", "profs", "random"]
    assert all(tuple(ranks) == RANKS for ranks in points.values())
    cost, effect = points["gloss"][4]
    assert cost[0] == pytest.approx(1.2)
    assert effect == pytest.approx([math.exp(-0.8), 0.02, 0.02])
    # the seeds differ in cost, which widens its interval as it does in the table
    rows = summarise(results.systems)
    (row,) = (r for r in rows if (r.system, r.strength) == ("gloss", "4"))
    ratio = row.metrics["perplexity_ratio"]
    assert ratio is not None
    assert cost[0] + cost[2] == pytest.approx(100 * (ratio.high - 1))
    assert cost[2] > 0.2
    figure = there(tradeoff_figure(results))
    drawn = labelled(figure.axes[0])
    (unedited,) = drawn["unedited"].get_xydata().tolist()
    assert unedited == [0, 1]
    x, y = drawn["gloss"].lines[0].get_data()
    assert x == pytest.approx([0.3 * rank for rank in RANKS])
    assert y == pytest.approx([math.exp(-0.2 * rank) for rank in RANKS])


def test_a_point_far_out_is_left_out_and_counted() -> None:
    results = make_results()
    figure = there(tradeoff_figure(results))
    x, _ = labelled(figure.axes[0])["profs"].lines[0].get_data()
    assert x == pytest.approx([0.6 * rank for rank in RANKS[:-1]])
    assert "Left out: 1 beyond +10 %, up to +80 %." in figure.get_supxlabel()
    assert figure.axes[0].get_xlim()[1] < READABLE
    systems = tuple(s for s in results.systems if (s.strength, s.system) != (16, "profs"))
    complete = there(tradeoff_figure(replace(results, systems=systems)))
    assert "Left out" not in complete.get_supxlabel()


def test_ranks_and_names_are_written_without_overlap() -> None:
    figure = there(tradeoff_figure(make_results()))
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    written = [text.get_text() for text in texts]
    names = ["unedited", "gloss 16", "profs 8", "random 16"]
    assert sorted(written) == sorted([*names, *map(str, [*RANKS[:-1] * 2, *RANKS[:-2]])])
    axes = figure.axes[0].get_window_extent()
    assert all(axes.x0 <= b.x0 and b.x1 <= axes.x1 for b in (t.get_window_extent() for t in texts))
    boxes = [text.get_window_extent().padded(-1) for text in texts]
    for place, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:place]) == 0


def test_missing_metrics_are_skipped() -> None:
    results = make_results()
    results.systems[1].metrics["teacher_forced"] = None
    del results.systems[2].metrics["perplexity_ratio"]
    results = replace(results, systems=(*results.systems, system("model", None, None)))
    assert "model" not in tradeoff_points(results.systems)
    assert tradeoff_figure(results) is not None
    results.rows[1].metrics["toxicity/profanity/sampled"] = None
    figure = there(bars_figure(results))
    (axes,) = figure.axes  # bad-words was not run
    assert axes.get_title() == "profanity"
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["unedited", "gloss\nstrength 4, 6"]
    widths = {label: [bar.get_width() for bar in bars] for label, bars in labelled(axes).items()}
    assert widths["greedy"] == pytest.approx([0.3, 0.15])
    assert widths["sampled"] == pytest.approx([0.4, math.nan], nan_ok=True)


def test_no_token_is_drawn(edit_file: Path) -> None:
    from matplotlib.text import Text

    manifest = make_manifest()
    for figure in (
        spectrum_figure(manifest), scores_figure(manifest), cosines_figure(manifest, edit_file)
    ):  # fmt: skip
        assert figure is not None
        texts = [artist.get_text() for artist in figure.findobj(Text) if isinstance(artist, Text)]
        assert any(texts)
        assert not any("offensive" in text for text in texts)


def test_errors_are_ours(edit_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    with refused(DestinationError, what=f"{tmp_path / 'file'} cannot be written"):
        plot_evaluation(make_results(), tmp_path / "file")
    with refused(VerificationError, what="file cannot be read"):
        plot_fit(make_manifest(), tmp_path / "file", tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refused(OptionError, hint="pip install 'gloss-convert[plot]'"):
        plot_fit(make_manifest(), edit_file, tmp_path)
