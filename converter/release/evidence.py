"""Check which evidence in a manifest follows from the edit, and which is only recorded.

A method may compute, by ``implied``, strength and evidence from its recorded edit, without running
a model. All other evidence cannot be checked, and is listed as such.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isclose
from typing import Any

import msgspec
from torch import Tensor

from converter.checkpoints.names import EDIT_FILE, MANIFEST
from converter.checkpoints.plan import Plan
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit
from converter.edits.edit_file import EVIDENCE
from converter.errors import FitError
from converter.manifest import Choice, Manifest, MethodRecord
from converter.methods.base import Method, Recorded, footprint_of

_CLOSE = 0.01
"""Share by which a recorded number may differ from the computed one if weights are known only up to
the rounding of their dtype.
"""

_MALFORMED = (
    LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError,
    RuntimeError, msgspec.ValidationError,
)  # fmt: skip
"""Errors of reading evidence that the method did not write."""

_ASKED = (
    "activations", "base_model", "batch_size", "calibration", "device", "force", "forward",
    "forward_dtype", "guard_draws", "instances", "mask", "max_perplexity_ratio", "neutral",
    "num_pairs", "pairs", "prompts", "rounding", "seed", "self_prompts", "self_scorer", "source",
    "subfolder", "trust_remote_code", "word_list",
)  # fmt: skip

UNCHECKED: Mapping[str, str] = {
    **{f"run.{name}": "what was asked for besides the method and the output" for name in _ASKED},
    **{
        f"source.{name}": "the name, repo and commit of the source"
        for name in ("commit", "name", "repo_id", "revision")
    },
    "pairs": "the pairs", "prompts": "the prompts", "neutral": "the neutral text",
    "word_list": "the word list",
    "instances": "the instances", "split": "how the texts were split",
    "choice.tried": "what was measured to choose the strength",
    "guard": "what the guard measured", "evaluation": "what the evaluation measured",
    "samples": "what the model said before and after",
    "search": "what the search tried and measured",
    "environment": "the machine", "forward": "how the model was run",
    "measurements": "seconds and memory",
    "tool.version": "the versions of the program and of transformers",
    "architecture.transformers": "the versions of the program and of transformers",
}  # fmt: skip
"""Place in a manifest -> description, for records that neither the folder nor the source proves.
They are compared only where the manifest has them twice.
"""


def unchecked_parts(manifest: Manifest) -> dict[str, str]:
    """The places of ``UNCHECKED`` that a manifest has."""

    def has(place: str) -> bool:
        value: Any = manifest
        for name in place.split("."):
            value = getattr(value, name)
        return value not in (None, ())

    return {place: words for place, words in UNCHECKED.items() if has(place)}


class _Kept(dict[str, Tensor]):
    """Tensors that a method has kept; notes which of them were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.seen.add(name)
        return super().__getitem__(name)


class EvidenceCheck:
    """Compares the evidence of the methods of a manifest with its edit.

    Attributes:
        unchecked: place in the manifest, such as ``method.evidence.nll`` -> description, for
            evidence that nothing proves.
        done: whether ``problems`` has ended, so that ``unchecked`` is complete.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        edit: Edit,
        stored: Mapping[str, Tensor],
        weight: Callable[[Weight], Tensor] | None,
    ) -> None:
        self.unchecked: dict[str, str] = {}
        self.done = False
        self._manifest, self._plan, self._edit, self._weight = manifest, plan, edit, weight
        begin = len(EVIDENCE)
        self._kept = {n[begin:]: tensor for n, tensor in stored.items() if n.startswith(EVIDENCE)}

    def problems(self, parts: Mapping[str, Method]) -> Iterator[str]:
        """The contradictions between each method's evidence and the edit; ``parts`` are name ->
        method.
        """
        footprints = {name: footprint_of(part, self._plan) for name, part in parts.items()}
        owners = tuple(f"{name}." for name in parts) if self._manifest.steps else ("",)
        for name in sorted(name for name in self._kept if not name.startswith(owners)):
            yield f"{EDIT_FILE}: holds a tensor {EVIDENCE}{name} that no method keeps"
        for number, (told, choice) in enumerate(self._manifest.methods):
            if told.name not in parts:
                return  # another check reports that run and method disagree
            mine = footprints[told.name]
            theirs = {n for name, each in footprints.items() if name != told.name
                      for n in each.created}  # fmt: skip
            own = f"{told.name}." if self._manifest.steps else ""
            place = f"steps.{number}.method" if self._manifest.steps else "method"
            kept = {n[len(own) :]: t for n, t in self._kept.items() if n.startswith(own)}
            recorded = Recorded(
                plan=self._plan,
                edit=replace(
                    self._edit,
                    tensors={w.info.name: self._edit.tensors[w.info.name]
                             for w in mine.weights if w.info.name in self._edit.tensors},
                    created={n: t for n, t in self._edit.created.items() if n in mine.created},
                ),
                strength=choice.strength,
                evidence=told.evidence,
                tensors=_Kept(kept),
                weight=self._weight,
            )  # fmt: skip
            shared = bool(theirs & mine.created.keys())  # sums, of which no part is known
            yield from self._of_one(told, choice, place, None if shared else recorded, parts)
        self.done = True

    def _of_one(
        self, told: MethodRecord, choice: Choice, place: str, recorded: Recorded | None,
        parts: Mapping[str, Method],
    ) -> Iterator[str]:  # fmt: skip
        implied: dict[str, Any] = {}
        if recorded is not None:
            if told.subspace is not None and told.strength == "rank":
                implied |= {told.strength: recorded.edit.rank}
            try:
                implied |= getattr(parts[told.name], "implied", lambda found: {})(recorded)
            except FitError as error:
                yield f"{MANIFEST}: {told.name}: {error}"
                return
            except _MALFORMED:
                yield f"{MANIFEST}: the evidence of {told.name} is not what that method keeps"
                return
            yield from _useless(told, parts[told.name], recorded.tensors)
        strength = implied.get(told.strength, choice.strength)
        if not _same(strength, choice.strength):
            yield (
                f"{MANIFEST}: the {told.strength} of {told.name} is recorded as "
                f"{choice.strength:g}, and its edit has {strength:g}"
            )
        if told.strength not in told.evidence:
            known = implied.pop(told.strength, None) is not None
            if not known:
                key = f"{place.removesuffix('method')}choice.strength"
                self.unchecked[key] = f"the {told.strength} of {told.name}"
        for name in dict.fromkeys(differing(implied, told.evidence)):
            yield f"{MANIFEST}: evidence of {told.name}: {name} is not what the edit makes it"
        self.unchecked[f"{place}.options"] = f"options of {told.name} that its edit does not show"
        for name in unproved(implied, told.evidence):
            name = name.removesuffix(".#")
            words = name.rpartition(".")[2] if "#" in name else name.partition(".")[0]
            self.unchecked[f"{place}.evidence.{name}"] = f"{words} of {told.name}"


def _useless(told: MethodRecord, method: Method, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """The kept tensors that a method does not read in its check; see ``check_kept``."""
    if isinstance(tensors, _Kept) and told.subspace is None and hasattr(method, "implied"):
        for name in sorted(tensors.keys() - tensors.seen):
            yield f"{EDIT_FILE}: holds a tensor {EVIDENCE}{name} that {told.name} does not keep"


def differing(implied: Any, told: Any, path: str = "") -> Iterator[str]:
    """The places where a recorded value differs from the implied one; other values are skipped.

    Numbers must agree within a hundredth; in a list, of its largest number.
    """
    if isinstance(implied, Mapping):
        if not isinstance(told, Mapping):
            yield path
            return
        numbered = bool(implied) and all(str(key).isdigit() for key in implied)
        wrong = implied.keys() - told.keys() if not numbered else implied.keys() ^ told.keys()
        for key in sorted(implied.keys() | wrong):
            if key in wrong:
                yield _below(path, key)
            else:
                yield from differing(implied[key], told[key], _below(path, key))
    elif isinstance(implied, Sequence) and not isinstance(implied, str):
        if not isinstance(told, Sequence) or isinstance(told, str) or len(told) != len(implied):
            yield path
        elif implied and all(type(each) is float for each in implied):
            most = max(map(abs, implied))
            if not all(_same(one, other, most) for one, other in zip(implied, told, strict=True)):
                yield path
        else:
            for one, other in zip(implied, told, strict=True):
                yield from differing(one, other, _below(path, "#"))
    elif not _same(implied, told):
        yield path


def unproved(implied: Any, told: Any, path: str = "") -> Iterator[str]:
    """The places of recorded values that are not implied; layer numbers and list places become
    ``#``.
    """
    if isinstance(told, Mapping):
        known = implied if isinstance(implied, Mapping) else {}
        for key, value in told.items():
            yield from unproved(known.get(key), value, _below(path, key))
    elif isinstance(told, Sequence) and not isinstance(told, str):
        some = implied if isinstance(implied, Sequence) else [None] * len(told)
        for one, value in zip(some, told, strict=False):
            yield from unproved(one, value, _below(path, "#"))
    elif implied is None:
        yield path


def _below(path: str, key: str) -> str:
    return ".".join(filter(None, [path, "#" if key.isdigit() else key]))


def _same(implied: Any, told: Any, most: float = 0.0) -> bool:
    """Whether two values agree: numbers to rounding, whole numbers and all else exactly."""
    if isinstance(implied, float) and isinstance(told, int | float) and type(told) is not bool:
        return isclose(implied, told, rel_tol=_CLOSE, abs_tol=_CLOSE**2 * most)
    return type(implied) is type(told) and bool(implied == told)
