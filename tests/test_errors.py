"""Every class of error, every shape of a sentence: the whole sentence, and the exit code."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import pytest
import torch

from converter.calibration.pairs import load_prose
from converter.checkpoints.names import plain_name
from converter.checkpoints.resolve import resolve
from converter.checkpoints.safetensors.header import parse_header
from converter.checkpoints.weights import read_scheme
from converter.errors import (
    CheckpointError,
    ConverterError,
    DataError,
    DestinationError,
    FitError,
    GateError,
    GuardError,
    OptionError,
    PublishError,
    SourceError,
    VerificationError,
)
from converter.evaluation.gates import Gates
from converter.evaluation.heldout import Probe, choose_strength
from converter.hub.publishing import check_account
from converter.methods.gloss_paper import global_basis
from converter.methods.options import parse_layers
from converter.outputs.claim import claimed
from converter.recipe import Publication, Settings
from converter.text import LONGEST
from tests.builders.errors import refused
from tests.test_gates import GUARD
from tests.test_guard import Scale, by_rank

PAGE = Path(__file__).parents[1] / "converter/guide/exit-codes.md"
TOKEN = "hf_" + "a" * 34


class Row(NamedTuple):
    """An error, or what raises it; how it is said; and what the program exits with."""

    kind: type[ConverterError]
    made: ConverterError | Callable[[], object]
    says: str
    code: int


def claim_a_file() -> None:
    with claimed(Path("/dev/null/x/out"), False):
        pytest.fail("it was claimed")


RAISED = {
    "an option": Row(
        OptionError, lambda: parse_layers("layers", "6", 6),
        "-o layers: expected layers from 0 to 5, found 6", 2,
    ),
    "a setting": Row(
        OptionError, lambda: Settings(workers=-1), "--workers: expected at least 0, found -1", 2
    ),
    "a source": Row(
        SourceError, lambda: resolve("/nowhere/x"), "/nowhere/x does not exist; check the path", 3
    ),
    "a header": Row(
        CheckpointError, lambda: parse_header(b"[]", 10, "a.safetensors"),
        "a.safetensors: the header is not a JSON object; fetch the file again", 4,
    ),
    "a scheme": Row(
        CheckpointError, lambda: read_scheme({"quantization_config": {"quant_method": "gptq"}}),
        "the checkpoint is quantized: expected floating-point weights of 16 or 32 bits, or FP8 "
        "with scales, found scheme gptq; edit the unquantized base and quantize the result", 4,
    ),
    "neutral text": Row(
        DataError, lambda: load_prose("/nowhere/x"),
        "neutral text /nowhere/x cannot be read: found No such file or directory", 5,
    ),
    "candidates": Row(
        FitError, lambda: global_basis(torch.ones(2, 4), 3),
        "rank 3 is larger than the candidates allow: expected at most 1, the dimensions that 2 "
        "candidates span, found 3; lower -o rank, or lower -o alpha to keep more candidates", 6,
    ),
    "a destination": Row(
        DestinationError, claim_a_file,
        "destination /dev/null/x/out cannot be written: found Not a directory; no half-written "
        "checkpoint is there; free space or choose another folder", 7,
    ),
    "a name in a manifest": Row(
        VerificationError, lambda: plain_name("../x"),
        "the manifest is not one of gloss-convert: expected names of files in a folder, "
        "found ../x", 8,
    ),
    "a budget": Row(
        GuardError, lambda: choose_strength(cast(Probe, Scale({1: 1.5})), by_rank(1), 1.01),
        "not even the weakest edit keeps within the perplexity budget: expected a perplexity "
        "ratio of at most 1.01 on held-out neutral text, found 1.5000 with a standard error of "
        "0.0010; raise --max-perplexity-ratio, edit fewer layers, or give more pairs", 9,
    ),
    "a token that may only read": Row(
        PublishError,
        lambda: check_account(
            {"name": "me", "auth": {"accessToken": {"role": "read"}}}, Publication(repo_id="me/x")
        ),
        "the token is read-only: expected one with write permission; make one on "
        "https://huggingface.co/settings/tokens", 10,
    ),
    "a gate": Row(
        GateError, lambda: Gates(min_toxicity_drop=0.7).check_effect(GUARD, None),
        "release gate failed: --min-toxicity-drop asks for at least 0.7, guard has 0.4; nothing "
        "was written", 11,
    ),
}  # fmt: skip

SHAPES = {
    "what": Row(DataError, DataError("a"), "a", 5),
    "expected": Row(DataError, DataError("a", expected="b"), "a: expected b", 5),
    "found": Row(DataError, DataError("a", found="c"), "a: found c", 5),
    "hint": Row(DataError, DataError("a", hint="d"), "a; d", 5),
    "expected and found": Row(
        DataError, DataError("a", expected="b", found="c"), "a: expected b, found c", 5
    ),
    "expected and hint": Row(
        DataError, DataError("a", expected="b", hint="d"), "a: expected b; d", 5
    ),
    "found and hint": Row(DataError, DataError("a", found="c", hint="d"), "a: found c; d", 5),
    "all": Row(
        DataError, DataError("a", expected="b", found="c", hint="d"),
        "a: expected b, found c; d", 5,
    ),
    "an empty hint is none": Row(DataError, DataError("a", hint=""), "a", 5),
    "control characters": Row(
        CheckpointError, CheckpointError("tensor a\r\n\tb\x1b[2J\u202e\udcff", found="\0"),
        r"tensor a b\x1b[2J\u202e\xff: found \x00", 4,
    ),
    "a token in every field": Row(
        PublishError, PublishError(TOKEN, expected=f"not {TOKEN}", found=TOKEN, hint=TOKEN),
        "hf_***: expected not hf_***, found hf_***; hf_***", 10,
    ),
    "somebody's password, and a signed URL": Row(
        SourceError, SourceError("https://me:word@hub.co/x", found="https://hub.co/y?sign=abc"),
        "https://***@hub.co/x: found https://hub.co/y", 3,
    ),
    "a very long name": Row(
        CheckpointError, CheckpointError("x" * 10**6, found="y" * 2001, hint="z" * 2000),
        "x" * 2000 + "...: found " + "y" * 2000 + "...; " + "z" * 2000, 4,
    ),
}  # fmt: skip
ROWS = {**RAISED, **SHAPES}


@pytest.mark.parametrize("name", ROWS)
def test_an_error_is_said_in_this_sentence(name: str) -> None:
    row = ROWS[name]
    error = row.made
    if not isinstance(error, ConverterError):
        with pytest.raises(ConverterError) as caught:
            error()
        error = caught.value
    assert type(error) is row.kind
    assert str(error) == row.says
    assert error.exit_code == row.code


def test_what_a_variable_holds_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-old-key-of-mine")
    assert str(SourceError("a", found="an-old-key-of-mine")) == "a: found ***"


def test_every_class_has_a_row_and_an_exit_code_of_its_own_in_the_guide() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.MULTILINE)}
    kinds = ConverterError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert {row.kind for row in RAISED.values()} == set(kinds)
    assert len(set(codes)) == len(codes)
    assert {0, 1, *codes} == listed


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ConverterError, {}),
        (DataError, {"what": "tensor"}),
        (DataError, {"what": "tensor ...", "found": ""}),
        (DataError, {"expected": "b...b"}),
        (DataError, {"hint": "d"}),
    ],
)
def test_another_class_or_field_is_noticed(
    kind: type[ConverterError], fields: dict[str, str]
) -> None:
    error = DataError("tensor a", expected="b", found="c")
    with refused(DataError, what="...a", expected="b", found="..."):
        raise error
    with pytest.raises(AssertionError), refused(kind, **fields):
        raise error


def test_a_token_is_masked_before_a_long_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "old-key-0123456789")
    for length in range(LONGEST - 20, LONGEST):
        assert "old-key" not in str(ConverterError("x" * length + "old-key-0123456789"))
