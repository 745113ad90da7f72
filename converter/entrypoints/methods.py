"""The list of methods: what each needs and changes, and which outputs can hold its edit.

Methods do not declare this. Each is asked for its footprint on a small Llama that consists of
headers only, and its fit runs until it first asks for something.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import msgspec

from converter.calibration.calibration_models import Training
from converter.calibration.statistics import Request
from converter.checkpoints.architectures.find import find_architecture
from converter.checkpoints.plan import Plan, make_plan
from converter.checkpoints.safetensors.header import Header, TensorInfo
from converter.edits.base import Footprint
from converter.errors import OptionError
from converter.methods.base import Factors, Layers, Method, aim_of, footprint_of
from converter.methods.known import METHODS, KnownMethod, MethodOption
from converter.methods.options import configure
from converter.outputs.base import output_of
from converter.outputs.known import OUTPUTS
from converter.runtime import progress
from converter.runtime.registry import telling_packages

_LLAMA = {
    "model_type": "llama", "num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "vocab_size": 256,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A method with its default options, on a Llama.

    Attributes:
        name: for ``--method``.
        title, paper, strength: see ``Method``.
        edit: kinds of its changes, and other files and tensors that it changes or adds.
        outputs: that can hold its edit.
        needs: the first thing that its fit asks for: ``pairs``, also with ``gradients``, or with
            ``training`` of small models on them; or another part of the workbench.
        package: its package, with the version; None for our own.
        fault: why it could not be examined; else empty.
    """

    name: str
    title: str = ""
    paper: str = ""
    strength: str = ""
    edit: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    package: str | None = None
    fault: str = ""

    @property
    def row(self) -> str:
        """The row of a Markdown table."""
        if self.fault:
            return f"| `{self.name}` | {self.fault.replace('|', '/')} | | | | |"
        cells = (", ".join(each) for each in (self.edit, self.outputs, self.needs))
        title = f"[{self.title}]({self.paper})"
        return f"| `{self.name}` | {title} | `{self.strength}` | {' | '.join(cells)} |"


def table(methods: list[Described]) -> str:
    """A Markdown table of methods."""
    head = "| `--method` | title and paper | strength | edit | `--output` | needs |"
    return "\n".join([head, "|---|---|---|---|---|---|", *(each.row for each in methods)])


def describe_methods() -> list[Described]:
    """All methods, in alphabetical order; a broken package is a method with a fault."""
    plan, found = _headers(), []
    for name in METHODS.names():
        try:
            with telling_packages():
                found.append(_described(name, plan))
        except OptionError as error:
            found.append(Described(name=name, fault=str(error)))
    return found


def _described(name: str, plan: Plan) -> Described:
    method = configure(name, {}, plan.dimensions)
    footprint = footprint_of(method, plan)
    return Described(
        name=name,
        title=method.title,
        paper=method.paper,
        strength=method.strength,
        edit=tuple(_changes(footprint)),
        outputs=tuple(each for each in OUTPUTS.names() if _holds(each, name, plan)),
        needs=_needs(method, plan),
        package=METHODS.package(name),
    )


def _changes(footprint: Footprint) -> Iterator[str]:
    yield from (kind.kind for kind in footprint.kinds)
    if footprint.created:
        yield "new tensors"
    yield from (f"a patch of {name}" for name in footprint.patches)
    if footprint.files:
        yield "new files"


def _holds(output: str, name: str, plan: Plan) -> bool:
    """Whether an output can hold the edit of a method, whose defaults may depend on it."""
    made = output_of(output)
    method = configure(name, {}, plan.dimensions, made.implied)
    try:
        made.check(plan, footprint_of(method, plan))
    except OptionError:
        return False
    return True


class _HasAsked(Exception):  # noqa: N818 - it is not an error
    """A fit has asked for something, in words; what it does with it is not wanted.

    Attributes:
        request: where that is activations.
    """

    def __init__(self, *words: str, request: Request | None = None) -> None:
        super().__init__(*words)
        self.request = request


@dataclass
class _Listener:
    """Replaces a ``Workbench``, and ends the fit at the first request for more than headers."""

    plan: Plan

    def activations(self, request: Request) -> NoReturn:
        raise _HasAsked("pairs", *["gradients"] * request.gradient, request=request)

    def contrast(self, training: Training) -> NoReturn:
        raise _HasAsked("pairs", "training")

    def __getattr__(self, name: str) -> NoReturn:
        raise _HasAsked(name.replace("_", " "))


def _first_asked(method: Method, plan: Plan) -> _HasAsked | None:
    listener: Any = _Listener(plan)
    try:
        method.fit(listener)
    except _HasAsked as asked:
        return asked
    return None


def _needs(method: Method, plan: Plan) -> tuple[str, ...]:
    asked = _first_asked(method, plan)
    return asked.args if asked else ()


def request_of(method: Method, plan: Plan) -> Request | None:
    """What a method asks of the model before all else; None if that is no ``Request``."""
    try:
        asked = _first_asked(method, plan)
    except Exception as error:  # of a package, whose method looks at what it was given first
        progress.trace(error)
        return None
    return asked.request if asked else None


def _headers() -> Plan:
    """The plan of a small Llama without weights."""
    found = find_architecture(_LLAMA)
    assert found.head is not None
    shapes = {
        found.embedding: found.embedding_shape,
        found.head.weight: found.head.shape,
        found.final_norm: (found.sizes.hidden_size,),
    }
    for layer in range(found.sizes.num_hidden_layers):
        named = found.layer(layer).shapes.items()
        shapes |= {name.format(layer=layer): shape for name, shape in named}
    infos = {name: TensorInfo(name, "BF16", shape, 0, 0) for name, shape in shapes.items()}
    return make_plan(_LLAMA, None, {"model.safetensors": Header(0, 0, infos)})


def known_methods() -> dict[str, KnownMethod]:
    """The contents of ``data/methods.json``: the built-in methods, from their classes."""
    kinds = {name: METHODS.load(name) for name in METHODS.own}
    return {
        name: KnownMethod(
            title=kind.title, paper=kind.paper, strength=kind.strength, aim=aim_of(kind),
            options=_options(kind, kinds),
        )
        for name, kind in sorted(kinds.items())
    }  # fmt: skip


def _options(kind: Any, kinds: dict[str, Any]) -> dict[str, MethodOption]:
    hints, found = get_type_hints(kind), {}
    for option in fields(kind):
        parts = get_args(hints[option.name])
        named = {Layers: "layers", Factors: "factors"}.get(hints[option.name])
        is_union = get_origin(hints[option.name]) in (Union, UnionType)
        values = [part for part in parts if part is not NoneType] if is_union else []
        hint = values[0] if values else hints[option.name]
        is_choice = get_origin(hint) is Literal
        names = option.metadata.get("names")
        found[option.name] = MethodOption(
            kind=named or ("choice" if is_choice else hint.__name__),
            meaning=_meaning(option.name, kind.__mro__, kinds),
            default=_typed(option.default),
            choices=tuple(map(str, get_args(hint) if is_choice else names() if names else ())),
            automatic=NoneType in parts,
            least=option.metadata.get("min"),
        )
    return found


def _typed(default: Any) -> str | None:
    """A default as it would be typed."""
    if default is MISSING:
        return None
    if default is None:
        return "auto"
    if default == ():
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)


def _meaning(name: str, owners: Sequence[Any], kinds: dict[str, Any]) -> str:
    """The description of an attribute in the docstrings of classes; the first that has one."""
    for owner in owners:
        listed = (getattr(owner, "__doc__", None) or "").partition("Attributes:")[2]
        for entry in re.split(r"\n {8}(?=\w)", listed):
            names, _, text = " ".join(entry.split()).partition(": ")
            if name not in names.split(", "):
                continue
            if other := re.fullmatch(r"see ``([\w-]+)``\.", text):
                if other[1] in kinds:
                    return _meaning(name, kinds[other[1]].__mro__, kinds)
                break
            return text.replace("``", "")
    return ""


if __name__ == "__main__":
    told = msgspec.json.encode(known_methods())
    sys.stdout.write(msgspec.json.format(told, indent=1).decode() + "\n")
