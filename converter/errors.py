"""One error tree. Every error a user can cause is a ``ConverterError`` and ends as one sentence.

Errors of libraries and of the operating system are converted where they are first understood
(``raise SourceError(...) from error``), never swallowed. The command line prints the sentence and
leaves with the error's ``exit_code``; nothing else in the program ends the process.
"""

from typing import Self

from converter.text import one_line, redacted


class ConverterError(Exception):
    """An error that the user can mend, in one sentence.

    Args:
        what: the thing that is wrong, by name: a tensor, a file, a repo, an option.
        expected: a right value, if ``what`` does not make it plain.
        found: the value that was there instead.
        hint: what to do next.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        details = [
            f"{label} {one_line(redacted(text))}"
            for label, text in (("expected", self.expected), ("found", self.found))
            if text is not None
        ]
        sentence = one_line(redacted(self.what)) + (": " + ", ".join(details) if details else "")
        return sentence + (f"; {one_line(redacted(self.hint))}" if self.hint else "")


class OptionError(ConverterError):
    """An option that does not exist, or a value it cannot take."""

    exit_code = 2


class SourceError(ConverterError):
    """The source cannot be reached: missing, gated, offline, or too large for this machine."""

    exit_code = 3


class CheckpointError(ConverterError):
    """The source was reached and is not a checkpoint that can be edited safely."""

    exit_code = 4


class DataError(ConverterError):
    """Pairs, neutral text, word list or activations that cannot be used."""

    exit_code = 5


class FitError(ConverterError):
    """The data are readable, but the method cannot fit an edit to them as asked."""

    exit_code = 6


class DestinationError(ConverterError):
    """The output cannot be written where it was asked for."""

    exit_code = 7


class VerificationError(ConverterError):
    """A folder does not agree with its manifest, a replay gave other bytes, or gloss diff
    --exit-code found a difference.
    """

    exit_code = 8


class GuardError(ConverterError):
    """The guard refuses the edit, which breaks the model or does no more than a random one; or no
    strength is within the budget.
    """

    exit_code = 9


class PublishError(ConverterError):
    """The Hub or an object store refuses the upload or cannot be reached."""

    exit_code = 10


class GateError(ConverterError):
    """A release gate failed: the edit does not meet a limit that this run set beyond the guard."""

    exit_code = 11


class Faults:
    """Collects errors, to report them together.

    with faults:
        look_at_this()      # its ConverterError is kept, and the work goes on below
    with faults:
        look_at_that()
    faults.settle()
    """

    def __init__(self) -> None:
        self.found: list[ConverterError] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        if not isinstance(error, ConverterError | ExceptionGroup):
            return False
        for each in errors_in(error):
            if str(each) not in map(str, self.found):
                self.found.append(each)
        return True

    def settle(self) -> None:
        """Raise the collected errors.

        Raises:
            ConverterError: the only one.
            ExceptionGroup: of several ConverterErrors, in the order in which they were found.
        """
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise ExceptionGroup("several things are wrong", self.found)


def errors_in(error: Exception) -> list[ConverterError]:
    """The ``ConverterError``s in a raised error. Raises it again if it is not one of ours."""
    every = error.exceptions if isinstance(error, ExceptionGroup) else [error]
    ours = [each for each in every if isinstance(each, ConverterError)]
    if len(ours) < len(every):
        raise error
    return ours


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out.

    PyTorch says so with a RuntimeError on a CPU, and Python if there is none for another thread.
    """
    said = str(error)
    signs = ("allocate memory", "out of memory", "can't start new thread")
    return isinstance(error, MemoryError) or any(sign in said for sign in signs)
