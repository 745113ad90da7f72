"""The bounds of numeric options for one model, so that other numbers are refused at once."""

from collections.abc import Iterable
from dataclasses import Field, dataclass
from types import NoneType
from typing import Any, get_args

from converter.checkpoints.architectures.architecture import Dimensions
from converter.errors import OptionError

_SIZES = {"hidden_size": "the hidden size", "num_hidden_layers": "the layers of the model"}
"""The sizes of a model that ``max`` may name, in words."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of an option.

    Attributes:
        least, above, most: see ``min``, ``above`` and ``max`` of ``Method``; None for no bound.
        why: of ``most``, in words; empty without a reason.
        auto: whether the program may choose it.
    """

    least: float | None
    above: float | None
    most: float | None
    why: str
    auto: bool

    @property
    def words(self) -> str:
        """The bounds for people: ``1 to 576, the hidden size, or auto``."""
        if self.least is not None and self.most is not None:
            words = [f"{_said(self.least)} to {_said(self.most)}"]
        else:
            bounds = {"at least": self.least, "more than": self.above, "at most": self.most}
            words = [f"{word} {_said(n)}" for word, n in bounds.items() if n is not None]
        return ", ".join([*words, *[self.why] * bool(self.why)]) + ", or auto" * self.auto

    def hold(self, value: float | None) -> bool:
        """Whether a value is within the bounds; None always is."""
        return value is None or (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )


def bounds_of(option: Field[Any], hint: Any, dimensions: Dimensions) -> Bounds | None:
    """The bounds of an option of the type ``hint``, for a model; None if it has none."""
    least, above, most = (option.metadata.get(name) for name in ("min", "above", "max"))
    if least is above is most is None:
        return None
    auto = NoneType in get_args(hint)
    if most in _SIZES:
        return Bounds(least, above, getattr(dimensions, most), _SIZES[most], auto)
    return Bounds(least, above, most, "", auto)


def defaults_cut_down(options: Iterable[Field[Any]], dimensions: Dimensions) -> dict[str, Any]:
    """Defaults, cut down to the sizes of the model."""
    named = {each: each.metadata["max"] for each in options if each.metadata.get("max") in _SIZES}
    sizes = {each: getattr(dimensions, size) for each, size in named.items()}
    return {
        each.name: size
        for each, size in sizes.items()
        if type(each.default) is int and each.default > size
    }


def check_orthogonal(dimensions: Dimensions, left: int = 0, **counts: int) -> None:
    """Refuse more orthogonal directions than the model has dimensions.

    Args:
        dimensions: of the model.
        left: number of dimensions that must remain.
        counts: option -> its number of directions.

    Raises:
        OptionError: naming these options.
    """
    width = dimensions.hidden_size
    if sum(counts.values()) > width - left:
        raise OptionError(
            " and ".join(f"-o {key}" for key in counts),
            expected=f"at most {width - left:,} together, of a hidden size of {width:,}",
            found=" and ".join(map(str, counts.values())),
        )


def check_protection(
    dimensions: Dimensions, rank: int, per_layer: int, shared: int, own: int
) -> None:
    """Refuse more directions than GloSS can find beside the protected ones. Raises OptionError."""
    check_orthogonal(dimensions, rank=rank, protect_shared=shared)
    check_orthogonal(dimensions, per_layer=per_layer, protect_shared=shared)
    check_orthogonal(dimensions, left=1, per_layer=per_layer, protect_own=own)


def _said(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"
