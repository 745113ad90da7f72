"""Several methods, one after the other: ``gloss+profs``.

Each is fitted to the model as the former ones left it, and their edits become one. That is exact,
because no two of them change the same tensor. Biases that two of them create are added.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.calibration.instances import together as lessons_together
from converter.checkpoints.fusing import CODE
from converter.checkpoints.plan import Plan
from converter.edits.base import Footprint
from converter.errors import OptionError
from converter.methods.base import Aim, Method, Proposal, aim_of, footprint_of
from converter.methods.known import SEPARATOR


@dataclass(frozen=True, slots=True)
class Together:
    """A ``Method`` for planning; ``evaluation.fit`` fits its parts in turn.

    Attributes:
        parts: name -> method, in order.
    """

    parts: Mapping[str, Method]

    @property
    def title(self) -> str:
        """Their titles."""
        return "; then ".join(part.title for part in self.parts.values())

    @property
    def paper(self) -> str:
        """Their papers."""
        return " ".join(dict.fromkeys(part.paper for part in self.parts.values()))

    @property
    def strength(self) -> str:
        """The strength of the last method, whose choice measures the whole edit."""
        return strengths_of(self)[-1]

    @property
    def aim(self) -> Aim:
        """The common aim; methods of different aims have no footprint."""
        return aim_of(next(iter(self.parts.values())))

    def footprint(self, plan: Plan) -> Footprint:
        """The union of their footprints.

        Raises:
            OptionError: two of them change the same tensor, create the same tensor that is not a
                bias, or add the same file; or their aims differ, since the guard judges by one aim.
        """
        aims = {aim_of(part) for part in self.parts.values()}
        if len(aims) > 1:
            raise OptionError(
                f"--method {SEPARATOR.join(self.parts)}", expected="methods of one aim",
                found=" and ".join(sorted(aims)),
                hint="convert with one, and the result with the other",
            )  # fmt: skip
        owners: dict[str, str] = {}
        found = {name: footprint_of(part, plan) for name, part in self.parts.items()}
        if fused := [name for name, each in found.items() if CODE in each.files]:
            raise OptionError(
                f"--method {SEPARATOR.join(self.parts)}", expected="methods that edit one model",
                found=f"{fused[0]} with form=paper, which adds another to it",
                hint="give it alone, or choose form=folded",
            )  # fmt: skip
        for name, each in found.items():
            whole = (created for created, shape in each.created.items() if len(shape) > 1)
            for what in (*(weight.info.name for weight in each.weights), *each.files, *whole):
                if owners.setdefault(what, name) != name:
                    raise OptionError(
                        f"--method {SEPARATOR.join(self.parts)}",
                        expected="methods that change different tensors",
                        found=f"{what}, which both {owners[what]} and {name} change",
                        hint="give them different layers, such as -o "
                        f"{owners[what]}.layers=0-5 -o {name}.layers=6-11, where they have that",
                    )
        every = found.values()
        return Footprint(
            weights=tuple(weight for each in every for weight in each.weights),
            kinds=tuple(dict.fromkeys(kind for each in every for kind in each.kinds)),
            rank=max(each.rank for each in every),
            created={name: shape for each in every for name, shape in each.created.items()},
            patches=tuple(dict.fromkeys(patch for each in every for patch in each.patches)),
            files=tuple(path for each in every for path in each.files),
            chosen=None
            if all(each.chosen is None for each in every)
            else sum(each.most for each in every),
        )


def parts_of(name: str, method: Method | Together) -> Mapping[str, Method]:
    """Name -> method of each part, in order; a single method is its only part."""
    return method.parts if isinstance(method, Together) else {name: method}


def check_shared(name: str, method: Method | Together, plan: Plan) -> None:
    """Refuse impossible changes from the headers, each part by its own kinds of changes.

    Raises:
        CheckpointError: see ``Footprint.check_shared``.
        OptionError: see ``Method.footprint``.
    """
    for part in parts_of(name, method).values():
        footprint_of(part, plan).check_shared()


def strengths_of(method: Method | Together) -> list[str]:
    """The option, by its name in ``options_of``, that sets the strength of each part."""
    if isinstance(method, Together):
        return [f"{name}.{part.strength}" for name, part in method.parts.items()]
    return [method.strength]


def options_of(method: Method | Together) -> dict[str, Any]:
    """The options of a method, defaults resolved; for several methods, with the method's name in
    front.

    Options that are ``unsaid`` are included only if they are not empty.
    """
    if isinstance(method, Together):
        return {
            f"{name}.{key}": value
            for name, part in method.parts.items()
            for key, value in options_of(part).items()
        }
    options = dataclasses.asdict(method)  # type: ignore[call-overload]
    unsaid = {f.name for f in dataclasses.fields(method) if f.metadata.get("unsaid")}  # type: ignore[arg-type]
    return {k: v for k, v in options.items() if k not in unsaid or v}


def after(former: Proposal, strength: float, later: Proposal) -> Proposal:
    """The proposal of a method on top of a former one's edit of a given strength.

    Its controls join the controls of both with one seed, and its lesson joins both lessons.
    ``with_factors`` and ``with_layers`` apply to the later method.
    """
    edit, others, fewer = former.edit(strength), later.with_factors, later.with_layers

    def energy(own: float) -> float | None:
        known = (former.neutral_energy(strength), later.neutral_energy(own))
        return max((share for share in known if share is not None), default=None)

    return dataclasses.replace(
        later,
        edit=lambda own: edit.then(later.edit(own)),
        control=lambda own, seed: former.control(strength, seed).then(later.control(own, seed)),
        tensors={**former.tensors, **later.tensors},
        neutral_energy=energy,
        with_factors=others and (lambda factors: after(former, strength, others(factors))),
        with_layers=fewer and (lambda layers: after(former, strength, fewer(layers))),
        lesson=lessons_together([former.lesson, later.lesson]),
        control_kinds=max(later.control_kinds, former.control_kinds, key=len),
    )
