"""Pairs, prose and word lists."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from converter.calibration.pairs import describe_skipped, load_pairs, load_prose, normalise
from converter.calibration.word_list import WordList, load_words
from converter.errors import DataError
from converter.manifest import Origin
from tests.builders.errors import refused

WORDS = WordList(frozenset({"damn", "fool"}), Origin(name="test"), "0" * 64)
ROWS = [(f"the damn clock number {i}", f"the clock number {i}") for i in range(20)]


def write_tsv(
    path: Path, rows: Sequence[tuple[str, ...]], head: str = "toxic\tneutral1\tneutral2"
) -> Path:
    path.write_text("\n".join([head, *("\t".join(row) for row in rows)]) + "\n")
    return path


def test_the_builtin_pairs_are_what_they_were() -> None:
    pairs = load_pairs("builtin", WORDS, None, 0)
    assert len(pairs.pairs) == 480
    # Results depend on these. If they change on purpose, raise the version in data/pairs.toml.
    assert pairs.origin == Origin(name="builtin", version=1)
    assert pairs.sha256 == "6777ab763fed85d8c9357b045fd6c769e0b76bc6fcbf44d600d55bb278779b76"
    assert load_prose("builtin").sha256.startswith("ba8276c9e319a208")


def test_the_builtin_spans_are_the_toxic_words() -> None:
    for pair in load_pairs("builtin", WORDS, None, 0).pairs:
        assert pair.spans
        last = 0
        for start, end in pair.spans:
            assert last < start < end <= len(pair.toxic)
            last = end
            word = pair.toxic[start:end]
            assert word.isalpha()
            assert word not in pair.neutral.split()


def write_all(folder: Path, rows: Sequence[tuple[str, str]], more: str = "") -> None:
    """The same pairs in each format; ``more`` follows each toxic side in the one with quotes."""
    write_tsv(folder / "p.tsv", rows, "toxic\tneutral")
    cells = "\n".join(f'"{neutral}","{toxic}{more}"' for toxic, neutral in rows)
    (folder / "p.csv").write_text(f"neutral,toxic\n{cells}\n")
    lines = (json.dumps({"toxic": t, "neutral": n}, ensure_ascii=False) for t, n in rows)
    (folder / "p.jsonl").write_text("\n".join(lines))


def test_formats_agree(tmp_path: Path) -> None:
    write_all(tmp_path, ROWS)
    read = {load_pairs(str(p), WORDS, None, 0).sha256 for p in tmp_path.iterdir()}
    assert len(read) == 1


def test_the_first_paraphrase_that_is_there_is_taken(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "p.tsv", [(t, "", n) for t, n in ROWS])
    assert load_pairs(str(path), WORDS, None, 0).pairs[3].neutral == ROWS[3][1]


def test_unusable_rows_are_named_and_counted(tmp_path: Path) -> None:
    bad = [
        ("", "empty"),
        ("damn same", "damn same"),
        ROWS[0],
        ("polite", "also polite"),
        ("damn it all", "the only listed word is the first"),
        ("one cell only",),
        ("a damn", "row", "of too", "many"),
    ]
    path = write_tsv(tmp_path / "p.tsv", [*ROWS, *bad])
    pairs = load_pairs(str(path), WORDS, None, 0)
    assert len(pairs.pairs) == len(ROWS)
    assert pairs.skipped == {
        "empty": [22],
        "identical on both sides": [23],
        "duplicated": [24],
        "without a toxic word after the first that the neutral side lacks": [25, 26],
        "of another number of cells than 3": [27, 28],
    }
    assert "1 empty (row 22)" in describe_skipped(pairs.skipped)


def test_line_breaks_within_a_row_do_not_cut_it(tmp_path: Path) -> None:
    rows = [(f"the\u2028damn clock\x85number {i}", f"the clock {i}") for i in range(16)]
    write_all(tmp_path, rows, "\nmore")
    for path in tmp_path.iterdir():
        pairs = load_pairs(str(path), WORDS, None, 0)
        assert not pairs.skipped
        more = " more" if path.suffix == ".csv" else ""
        assert pairs.pairs[3].toxic == f"the damn clock number 3{more}"


def test_undecodable_and_malformed_lines_are_skipped(tmp_path: Path) -> None:
    lines = [json.dumps({"toxic": t, "neutral": n}).encode() for t, n in ROWS]
    lines += [b"{broken", b'{"toxic": 3, "neutral": "x"}', b'{"toxic": "a"}', b'"\xff"', b"[]"]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    pairs = load_pairs(str(tmp_path / "p.jsonl"), WORDS, None, 0)
    assert len(pairs.skipped["unreadable"]) == 5


@pytest.mark.parametrize(
    ("content", "expected", "found"),
    [
        ("a\tb\n1\t2\n", "a first line with the columns toxic and neutral", "a, b"),
        ("", "a first line with the columns toxic and neutral", "an empty file"),
        ("toxic\tneutral\nthe damn x\tthe x\n", "at least 16 usable pairs", "1"),
    ],
)
def test_files_that_cannot_serve_are_refused(
    content: str, expected: str, found: str, tmp_path: Path
) -> None:
    (tmp_path / "p.tsv").write_text(content)
    with refused(DataError, expected=expected, found=found):
        load_pairs(str(tmp_path / "p.tsv"), WORDS, None, 0)


def test_more_pairs_than_there_are_is_an_error(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "p.tsv", ROWS)
    with refused(DataError, expected="at least 21 usable pairs", found="20"):
        load_pairs(str(path), WORDS, 21, 0)


def test_files_that_do_not_exist_or_have_no_known_format(tmp_path: Path) -> None:
    for name in ("missing.tsv", "./missing"):
        with refused(DataError, what=f"pairs file {tmp_path / name} does not exist"):
            load_pairs(str(tmp_path / name), WORDS, None, 0)
    (tmp_path / "pairs.xlsx").write_text("x")
    with refused(DataError, expected=".jsonl, .tsv, .csv", found=".xlsx"):
        load_pairs(str(tmp_path / "pairs.xlsx"), WORDS, None, 0)


def test_a_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = str(write_tsv(tmp_path / "p.tsv", ROWS))
    draws = [load_pairs(path, WORDS, 16, seed).sha256 for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_what_tells_the_sides_of_a_corpus_apart_is_removed() -> None:
    tokenised = "I do n't  know , it 's `` odd '' ! ! Really ..."
    assert normalise(tokenised).startswith("i don't know, it's")
    assert normalise("He said “hi” .") == normalise('he said "hi"')
    assert normalise("Wait!!! What??") == "wait! what"
    assert normalise("f*** ( you )") == "f*** (you)"
    for text in (tokenised, "A , b ; c", "x…"):
        assert normalise(normalise(text)) == normalise(text)


def test_spans_are_listed_or_starred_words_that_the_other_side_lacks() -> None:
    def found(text: str, other: str = "") -> list[str]:
        return [text[a:b] for a, b in WORDS.spans(text, other)]

    assert found("that Damn fool") == ["Damn", "fool"]
    assert found("that damn fool", "a fool") == ["damn"]
    assert found("foolish damnation") == []
    assert found("mail bob@x now, you f*ck", "mail bob@x now") == ["f*ck"]
    assert found("you f*ck and sh**, 5 * 3 and a#b") == ["f*ck", "sh**", "a#b"]


def test_word_lists_are_read_from_a_package_or_a_file(tmp_path: Path) -> None:
    assert len(load_words("builtin").words) > 500
    assert load_words("builtin").origin.name == "better-profanity"
    (tmp_path / "w.txt").write_text("# comment\nDarn\ntwo words\n\nheck\n")
    assert load_words(str(tmp_path / "w.txt")).words == {"darn", "heck"}
    (tmp_path / "w.txt").write_text("# nothing\n")
    with refused(DataError, what="word list w.txt holds no words"):
        load_words(str(tmp_path / "w.txt"))
    missing = tmp_path / "missing.txt"
    with refused(DataError, what=f"word list {missing} cannot be read"):
        load_words(str(missing))


def test_offensive_words_are_starred_out_and_others_are_not() -> None:
    words = WordList(frozenset({"darn", "heck"}), Origin(name="test"), "")
    assert (
        words.mask(" Darn it, what the heck is darning?") == " D*** it, what the h*** is darning?"
    )
