"""Assign typed options to methods: ``METHOD.KEY``, or ``KEY``."""

from collections.abc import Collection, Mapping, Sequence

from converter.errors import OptionError
from converter.methods.known import SEPARATOR


def share_out(
    known: Mapping[str, set[str]], options: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Assign each typed option to one of several methods.

    Args:
        known: method -> its options.
        options: ``METHOD.KEY`` or ``KEY`` -> value, as typed.

    Returns:
        method -> key -> value.

    Raises:
        OptionError: no method has an option; several do and the method is not named; or it has two
            values.
    """
    shared: dict[str, dict[str, str]] = {name: {} for name in known}
    for typed, text in options.items():
        owner, dot, key = typed.rpartition(".")
        owners = [
            name
            for name in known
            if key in known[name] and (not dot or _plain(owner) == _plain(name))
        ]
        if len(owners) != 1:
            every = (f"{name}.{each}" for name in known for each in sorted(known[name]))
            raise OptionError(
                f"-o {typed}: method {SEPARATOR.join(known)}",
                expected=" or ".join([f"{name}.{key}" for name in owners] or every), found=typed,
            )  # fmt: skip
        _set(shared[owners[0]], key, text, f"{owners[0]}.{key}")
    return shared


def _set(options: dict[str, str], key: str, text: str, name: str) -> None:
    """Add an option. Raises OptionError if it is already there in another spelling."""
    if key in options:
        raise OptionError(f"-o {name}", expected="one value", found=f"{options[key]} and {text}")
    options[key] = text


def typed_for(
    name: str, options: Mapping[str, str], method: str, others: Sequence[str] = ()
) -> dict[str, str]:
    """The typed options of one of several systems.

    Args:
        name: of its method, or methods.
        options: ``METHOD.KEY`` -> value, for every system with that method, or ``KEY`` -> value,
            for ``method``.
        others: further methods that options may name.

    Raises:
        OptionError: an option names another method, or has two values.
    """
    own, found = [_plain(part) for part in name.split(SEPARATOR)], dict[str, str]()
    known = {_plain(part) for each in (name, method, *others) for part in each.split(SEPARATOR)}
    for typed, text in options.items():
        owner, dot, key = typed.rpartition(".")
        if dot and _plain(owner) not in known:
            raise OptionError(
                f"-o {typed}", expected=f"an option of {' or '.join(sorted(known))}", found=typed
            )
        if _plain(owner) in own:
            _set(found, typed if len(own) > 1 else key, text, typed)
        elif not dot and name == method:
            _set(found, key, text, typed)
    return found


def check_plain(options: Collection[str], method: str, measured: Sequence[str]) -> None:
    """Refuse options without a method's name if their method is not measured.

    Args:
        options: as typed.
        method: that they belong to.
        measured: the methods of the fitted systems, at least one.

    Raises:
        OptionError: naming one of them.
    """
    plain = [typed for typed in options if "." not in typed]
    if plain and method not in measured:
        names = dict.fromkeys(part for each in measured for part in each.split(SEPARATOR))
        raise OptionError(
            f"-o {plain[0]}", found=f"an option of --method {method}, which is not measured",
            expected=" or ".join(f"-o {_plain(name)}.{plain[0]}" for name in names),
        )  # fmt: skip


def _plain(name: str) -> str:
    """A method's name as in options, with underscores for dashes."""
    return name.replace("-", "_")
