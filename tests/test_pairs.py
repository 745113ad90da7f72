"""Pairs, prose and word lists."""

import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from converter.calibration.pairs import describe_skipped, load_pairs, load_prose, normalise
from converter.calibration.split import split
from converter.calibration.word_list import WordList, items, load_words
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
    write_tsv(tmp_path / "P.TSV", ROWS, "Toxic\tNeutral")
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
        "without a listed word": [25],
        "whose only listed word is the first, which nothing predicts": [26],
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


def test_malformed_lines_are_skipped(tmp_path: Path) -> None:
    lines = [json.dumps({"toxic": t, "neutral": n}) for t, n in ROWS]
    lines += ["{broken", '{"toxic": 3, "neutral": "x"}', '{"toxic": "a"}', '"\ufffd"', "[]"]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    pairs = load_pairs(str(tmp_path / "p.jsonl"), WORDS, None, 0)
    assert len(pairs.skipped["unreadable"]) == 4
    assert len(pairs.skipped["without the fields toxic and neutral"]) == 1


PROSE = "\n".join(f"le café {i} est bon et le thé aussi" for i in range(40))
JSONL = "\n".join(
    json.dumps({"toxic": t, "neutral": f"{n} é"}, ensure_ascii=False) for t, n in ROWS
)


@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("utf-8-sig", None),
        ("utf-16", "UTF-16, as its first bytes say"),
        ("utf-16-be", "a zero byte in line 1, as in UTF-16"),
        ("utf-32", "UTF-32, as its first bytes say"),
        ("latin-1", "byte 0xe9 in line ..., which is not UTF-8"),
    ],
)
@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("p.jsonl", JSONL, lambda path: load_pairs(path, WORDS, None, 0)),
        ("p.tsv", "toxic\tneutral\n" + "\n".join(f"{t}\t{n} é" for t, n in ROWS),
         lambda path: load_pairs(path, WORDS, None, 0)),
        ("p.csv", "toxic;neutral\r\n" + "\r\n".join(f"{t};{n} é" for t, n in ROWS),
         lambda path: load_pairs(path, WORDS, None, 0)),
        ("words.txt", "damn\r\nmerdé\r\n", load_words),
        ("prose.txt", PROSE, load_prose),
    ],
    ids=["jsonl", "tsv", "csv", "words", "prose"],
)  # fmt: skip
def test_another_encoding_is_named(
    name: str, text: str, read: Callable[[str], object], encoding: str, found: str | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / name).write_text(text)
    expected = read(str(tmp_path / name))
    (tmp_path / name).write_bytes(text.encode(encoding))
    if found is None:
        assert getattr(read(str(tmp_path / name)), "sha256", 0) == getattr(expected, "sha256", 1)
    else:
        with refused(DataError, expected="text in UTF-8", found=found, hint="...iconv..."):
            read(str(tmp_path / name))


def test_the_line_of_the_first_bad_byte_is_named_wherever_it_is(tmp_path: Path) -> None:
    lines = [json.dumps({"toxic": t, "neutral": n}).encode() for t, n in ROWS * 100]
    lines[1234] += "é".encode("latin-1")
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    with refused(DataError, found="byte 0xe9 in line 1235, which is not UTF-8"):
        load_pairs(str(tmp_path / "p.jsonl"), WORDS, None, 0)


@pytest.mark.parametrize(
    ("toxic", "neutral", "hint"),
    [
        ("der blöde Hund {}", "der Hund {}", "give a --word-list in the language..."),
        ("a damn dog {}", "a damn cat {}", "give pairs whose neutral side does without..."),
        ("damn dog {}", "the dog {}", "give pairs in which other words come before..."),
        ("a damn dog", "a dog", "give more pairs..."),
    ],
)
def test_the_hint_is_about_what_most_pairs_lack(
    toxic: str, neutral: str, hint: str, tmp_path: Path
) -> None:
    rows = [(toxic.format(i), neutral.format(i)) for i in range(30)]
    path = write_tsv(tmp_path / "p.tsv", rows, "toxic\tneutral")
    with refused(DataError, expected="at least 16 usable pairs", hint=hint):
        load_pairs(str(path), WORDS, None, 0)


def test_rows_with_other_fields_are_said_to_have_them(tmp_path: Path) -> None:
    rows = [json.dumps({"rejected": t, "chosen": n}) for t, n in ROWS]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    with refused(DataError, hint="name the two fields of each row 'toxic' and 'neutral'"):
        load_pairs(str(tmp_path / "p.jsonl"), WORDS, None, 0)


def test_both_sides_are_composed_alike(tmp_path: Path) -> None:
    rows = [(unicodedata.normalize("NFD", f"das DAMN ä {i}"), f"das ä {i}") for i in range(16)]
    path = write_tsv(tmp_path / "p.tsv", rows, "toxic\tneutral")
    pair = load_pairs(str(path), WORDS, None, 0).pairs[0]
    assert (pair.toxic, pair.neutral, pair.spans) == ("das damn ä 0", "das ä 0", ((4, 8),))
    assert normalise("GERİZEKALI。") == "gerizekali"


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
    assert found("这部f*ck电影真垃*") == ["f*ck"]


@pytest.mark.parametrize(
    ("entry", "text", "found"),
    [
        ("垃圾", "第3部电影真是垃圾得要命", "垃圾"),
        ("傻b", "你个傻Ｂ真是", "傻Ｂ"),
        ("sb", "你个sb真是", "sb"),
        ("sb", "你个sbx真是", None),
        ("クソ", "本当にクソだった", "クソ"),
        ("ばか", "おまえばかー", "ばか"),
        ("เหี้ย", "หนังเหี้ยมากเลย", "เหี้ย"),
        ("blöd", "das war blo\u0308d.", "blo\u0308d"),
        ("blöd", "das war blod", None),
        ("straße", "die STRASSE hier", "STRASSE"),
        ("चूतिया", "यह फिल्म चूतिया जैसी", "चूतिया"),
        ("चूति", "यह फिल्म चूतिया जैसी", None),
        ("كلب", "هذا كَلْب حقير", "كَلْب"),
        ("كلب", "هذا كـــلب حقير", "كـــلب"),
        ("كلب", "هذا والكلب حقير", None),
        ("שלום", "אמר שָׁלוֹם לך", "שָׁלוֹם"),
        ("쓰레기", "영화는 쓰레기였다", "쓰레기"),
        ("쓰레기", "영화는 왕쓰레기", None),
        ("gerizekalı", "sen GERİZEKALI mısın", "GERİZEKALI"),
        ("idiot", "such ｉｄｉｏｔ here", "ｉｄｉｏｔ"),
        ("idiot", "such id\u200diot here", "id\u200diot"),
        ("idiot", "such \u200fid\u00adiot here", "id\u00adiot"),
        ("idiot", "such i\u0336d\u0336iot here", "i\u0336d\u0336iot"),
        ("idiot", "quel l’idiot”", "idiot"),
        ("idiot", "such idiot’s here", None),
        ("o'bitch", "a son o’bitch", "o’bitch"),
        ("ngu ngốc", "thật ngu ngốc quá", "ngu ngốc"),
        ("son of a bitch", "you Son of a Bitch!", "Son of a Bitch"),
        ("a$$", "what an A$$ he is", "A$$"),
        ("💩", "this is 💩 really", "💩"),
    ],
)
def test_words_are_found_in_any_script(
    entry: str, text: str, found: str | None, tmp_path: Path
) -> None:
    for form in ("NFC", "NFD"):
        (tmp_path / "w.txt").write_text(unicodedata.normalize(form, entry) + "\n")
        words = load_words(str(tmp_path / "w.txt"))
        assert [text[a:b] for a, b in words.spans(text)] == ([found] if found else [])
        assert not words.spans(text, f"x {text}")
        assert unicodedata.normalize(form, entry) in words


def test_the_longest_entry_is_found(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("son of a bitch\nbitch\n垃圾\n垃圾人\n")
    words, text = load_words(str(tmp_path / "w.txt")), "a son of a bitch, bitch 垃圾人垃圾"
    spans = [text[a:b] for a, b in words.spans(text)]
    assert spans == ["son of a bitch", "bitch", "垃圾人", "垃圾"]
    assert words.mask("垃圾 and 💩") == "垃* and 💩"


def test_letters_without_spaces_count_as_words(tmp_path: Path) -> None:
    text = "今日 hello, 世界 ok"
    assert [text[a:b] for a, b in items(text)] == ["今", "日", "hello,", "世", "界", "ok"]
    (tmp_path / "zh.txt").write_text("".join(chr(0x4E00 + i) for i in range(1200)))
    prose = load_prose(str(tmp_path / "zh.txt"))
    path = write_tsv(tmp_path / "p.tsv", ROWS, "toxic\tneutral")
    parts = split(load_pairs(str(path), WORDS, None, 0), prose, 0)
    pieces = [p for part in (parts.fit, parts.choose, parts.report) for p in part.prose.paragraphs]
    assert sorted("".join(pieces)) == sorted(prose.paragraphs[0])
    assert {len(piece) for piece in pieces} == {150}


def test_word_lists_are_read_from_a_package_or_a_file(tmp_path: Path) -> None:
    assert len(load_words("builtin").words) > 500
    assert load_words("builtin").origin.name == "better-profanity"
    (tmp_path / "w.txt").write_text("# comment\nDarn\ntwo words\n\nheck\n")
    assert load_words(str(tmp_path / "w.txt")).words == {"darn", "heck", "two words"}
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
