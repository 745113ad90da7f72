"""Which of several methods a typed option is for: ``METHOD.KEY``, or ``KEY``."""

from collections.abc import Collection, Mapping, Sequence

from converter.errors import OptionError
from converter.methods.known import SEPARATOR


def share_out(
    known: Mapping[str, set[str]], options: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Which of several methods each typed option is for.

    Args:
        known: method -> the options that it has.
        options: ``METHOD.KEY`` or ``KEY`` -> value, as typed.

    Returns:
        method -> key -> value.

    Raises:
        OptionError: no method has an option, or several do and it does not say whose it is; or it
            has two values.
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
    """Add an option. Raises OptionError if it is there already, typed in another way."""
    if key in options:
        raise OptionError(f"-o {name}", expected="one value", found=f"{options[key]} and {text}")
    options[key] = text


def typed_for(
    name: str, options: Mapping[str, str], method: str, others: Sequence[str] = ()
) -> dict[str, str]:
    """Which typed options are those of one of several systems.

    Args:
        name: of its method, or methods.
        options: ``METHOD.KEY`` -> value, for whatever system has that method, or ``KEY`` -> value,
            for ``method``.
        others: methods that options may be of beside these.

    Raises:
        OptionError: an option is of a method that is not among them, or has two values.
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
    """Refuse options without a method's name that would be those of a method nobody measures.

    Args:
        options: as typed.
        method: whose they are.
        measured: the methods of the systems that are fitted, one at least.

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
    """A method's name as it stands in options, whose dashes are underscores."""
    return name.replace("-", "_")
