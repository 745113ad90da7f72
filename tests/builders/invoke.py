"""The program as a test runs it."""

from collections.abc import Callable

from click.testing import CliRunner, Result

from converter.cli.main import gloss

Cli = Callable[..., Result]
"""``invoke`` with the cache that a test is to use: the fixture ``cli``."""


def invoke(*args: object, code: int | None = None, says: str = "") -> Result:
    """Run ``gloss`` with arguments; standard output and error are kept apart.

    Args:
        args: of the program.
        code: what it must exit with, without a traceback; None is not looked at.
        says: what must be on standard error.
    """
    result = CliRunner().invoke(gloss, [str(arg) for arg in args])
    if code is not None:
        assert result.exit_code == code, result.stderr or result.exception
        assert "Traceback" not in result.output
    assert says in result.stderr, result.stderr
    return result
