"""The statistics of a model for a fit, and their file; ``collect`` makes them.

For every layer: the pooled activations of both sides of each pair, (N, D) in float32. One (D, D)
second moment of neutral tokens, averaged over the layers. Causal moments where a method wants them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from converter.calibration.pairs import Pairs, Prose
from converter.checkpoints.safetensors.header import to_bytes
from converter.errors import DataError
from converter.manifest import Origin
from converter.models.batching import Pooling
from converter.runtime import progress, strict_json
from converter.runtime.cache import replacing, sha256_of

Site = Literal["ffn", "residual"]
"""The site of a layer's activations."""

TEXTS = ("pairs", "prose")
"""The kinds of neutral text, whose moments are separate so that each kind counts the same."""


@dataclass(frozen=True, slots=True)
class Request:
    """A method's request for statistics.

    Attributes:
        site: ``ffn``, the FFN's contribution to the residual stream; ``residual``, the stream after
            the layer; ``attention``, the output of ``o_proj``; or ``final``, the head's input after
            the last norm, under the number of layers as its layer, and without gradients.
        pooling: of the toxic side: ``predicting``, the mean over the positions that predict a
            token of a toxic span; ``mean`` over all tokens; ``last``; ``last8``, the mean over the
            last 8. The neutral side is the mean over its tokens, or over as many at its end.
        layers: from 0.
        second_moment: whether neutral tokens' second moment is wanted.
        gradient: whether the causal moments of the toxic side are wanted; needs a backward pass.
        directions: K, number of leading causal directions in which the moments of single words and
            of neutral text are wanted; 0 for none. They are orthogonal to the ``protect_shared``
            leading eigenvectors of the second moment.
        per_layer: with ``directions``, number of leading causal directions of each layer that are
            kept, instead of its causal moment, which is (D, D).
        prompts: put before each toxic and each neutral text, which then lose the spaces and stops
            around them; empty for none.
        chunks: C, number of equal chunks of an activation, for the mean norm of each chunk over the
            tokens of neutral prose; 0 if these are not wanted.
        slopes: whether gradients are wanted instead of pooled activations (see ``collect.slopes``):
            of the toxic words (pooling ``predicting``), and of all tokens of the neutral side.
            There is then no second moment.
        bare: whether the texts are the prompts alone, the same for all pairs.
    """

    site: Site | Literal["attention", "final"]
    pooling: Pooling
    layers: tuple[int, ...]
    second_moment: bool
    gradient: bool = False
    directions: int = 0
    protect_shared: int = 0
    per_layer: int = 0
    prompts: tuple[str, str] = ("", "")
    chunks: int = 0
    slopes: bool = False
    bare: bool = False

    @property
    def causal(self) -> bool:
        """Whether the causal moment of each layer is kept."""
        return self.gradient and not self.directions


@dataclass(frozen=True, slots=True)
class Moments:
    """The causal moments of single words and pieces of text, summed over layers, in a few
    directions.

    See ``collect.moments_within``; K directions, all float32.

    Attributes:
        directions: V (D, K), orthonormal columns.
        words: (n, K, K), of the toxic words of each pair.
        weights: (n,), positive; every distinct word counts the same, however often it occurs.
        texts: ``pairs`` and ``prose`` -> (m, K, K), of pieces of neutral sides and of prose.
        tokens: their number of tokens.
    """

    directions: Tensor
    words: Tensor
    weights: Tensor
    texts: Mapping[str, Tensor]
    tokens: Mapping[str, int]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in a file."""
        named = {"directions": self.directions, "words": self.words, "weights": self.weights}
        named |= self.texts
        named["tokens"] = torch.tensor([float(self.tokens[text]) for text in TEXTS])
        return {f"moments.{name}": tensor for name, tensor in named.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Moments":
        """The inverse of ``tensors``."""
        directions, words, weights = (tensors[f"moments.{n}"].float() for n in _MOMENTS[:3])
        texts = {text: tensors[f"moments.{text}"].float() for text in TEXTS}
        counts = zip(TEXTS, tensors["moments.tokens"].tolist(), strict=True)
        return cls(directions, words, weights, texts, {text: int(n) for text, n in counts})


_MOMENTS = ("directions", "words", "weights", *TEXTS, "tokens")
"""The tensors of ``Moments``."""


@dataclass(frozen=True, slots=True)
class Activations:
    """The pooled activations of a model.

    Attributes:
        toxic, neutral: layer -> (N, D) float32; row i of both is pair i.
        second_moment: (D, D) float32, the mean over layers of E[f f^T] / tr E[f f^T] over neutral
            tokens, half of the weight on the pairs' neutral sides and half on prose; or None.
        inputs: everything that they depend on; see ``collect.activation_inputs``. Empty if a file
            does not say.
        causal: layer -> A_l (D, D) float32 of the toxic words; see ``collect.causal_moments``.
            Empty if not wanted.
        leading: layer -> its leading causal directions and their eigenvalues, (K, D) and (K,)
            float32: the first eigenvectors of A_l outside of the directions protected in all
            layers. Empty if not wanted.
        moments: of single words and pieces of neutral text. None if not wanted.
        norms: layer -> (C,) float32, the mean norm of each chunk over tokens of neutral prose.
            Empty if not wanted.
    """

    toxic: Mapping[int, Tensor]
    neutral: Mapping[int, Tensor]
    second_moment: Tensor | None
    inputs: Mapping[str, Any]
    causal: Mapping[int, Tensor] = field(default_factory=dict)
    leading: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    moments: Moments | None = None
    norms: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """D."""
        return next(iter(self.neutral.values())).shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in a file: ``toxic.L`` and the like."""
        sides = {
            "toxic": self.toxic, "neutral": self.neutral, "causal": self.causal,
            "norms": self.norms,
        }  # fmt: skip
        named = {f"{side}.{n}": x for side, layers in sides.items() for n, x in layers.items()}
        for layer, (rows, values) in self.leading.items():
            named |= {f"leading.{layer}": rows, f"worth.{layer}": values}
        if self.second_moment is not None:
            named["second_moment"] = self.second_moment
        return named | (self.moments.tensors() if self.moments else {})


def cache_key(inputs: Mapping[str, Any]) -> str:
    """The sha256 of the canonical JSON of ``inputs``."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def save_activations(activations: Activations, path: Path) -> None:
    """Write all tensors, with their hashes and inputs."""
    tensors = activations.tensors()
    with replacing(path) as part:
        digests = {name: _digest(tensor) for name, tensor in tensors.items()}
        metadata = {"inputs": activations.inputs, "sha256": digests}
        save_file(tensors, part, {key: json.dumps(value) for key, value in metadata.items()})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file of ``save_activations``. Also raises DataError for reads within the context."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"activations {path.name} cannot be read", found=str(error)) from error


def load_activations(path: Path, request: Request, hidden_size: int) -> Activations:
    """Read a file of ``save_activations``, or another that serves ``request``.

    Raises:
        DataError: it cannot be read, lacks a layer, has other shapes, holds NaN or Inf, or was
            taken at another site or with another pooling.
    """
    what = f"activations {path.name}"
    inputs = read_inputs(path)
    sides = ["toxic", "neutral"] + ["causal"] * request.causal + ["norms"] * (request.chunks > 0)
    sides += ["leading", "worth"] * (request.directions > 0)
    wanted = [f"{side}.{n}" for side in sides for n in request.layers]
    wanted += ["second_moment"] * request.second_moment
    wanted += [f"moments.{name}" for name in _MOMENTS if request.directions]
    with _opened(path) as file:
        names = set(file.keys())
        if missing := [name for name in wanted if name not in names]:
            raise DataError(what, expected=f"a tensor {missing[0]}", found="none of that name")
        tensors = {name: file.get_tensor(name) for name in wanted}
        digests = strict_json.parse((file.metadata() or {}).get("sha256", "{}"))
    only = ("directions", "protect_shared", "per_layer") if request.directions else ()
    for key in ("slopes", "site", "pooling", "prompts", "bare", *only):
        asked = getattr(request, key)
        found = inputs.get(key, asked)
        if (tuple(found) if isinstance(found, list) else found) != asked:
            fixed = key in ("slopes", "prompts", "bare") or request.site in ("attention", "final")
            option = "" if fixed else f"-o {key}={found} or "
            raise DataError(
                f"{what} were taken with another {key}",
                expected=str(asked),
                found=str(found),
                hint=f"give {option}other activations",
            )
    for name, tensor in tensors.items():
        if digests and (not isinstance(digests, dict) or digests.get(name) != _digest(tensor)):
            raise DataError(f"{what}: {name} is damaged", hint="take them again")
    for name, tensor in tensors.items():
        shape = _shape(name, tensors, _length(tensors[wanted[0]]), hidden_size)
        if name.startswith("norms."):
            shape = [request.chunks]
        if list(tensor.shape) != shape:
            raise DataError(
                f"{what}: {name}", expected=f"shape {shape}", found=f"{list(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise DataError(f"{what}: {name} holds NaN or Inf", hint="take them again")

    def of(side: str) -> dict[int, Tensor]:
        return {n: tensors[f"{side}.{n}"].float() for n in request.layers if side in sides}

    worth = of("worth")
    return Activations(
        of("toxic"),
        of("neutral"),
        tensors.get("second_moment"),
        inputs,
        of("causal"),
        {n: (rows, worth[n]) for n, rows in of("leading").items()},
        Moments.of(tensors) if request.directions else None,
        of("norms"),
    )


def _length(tensor: Tensor) -> int:
    return len(tensor) if tensor.ndim else 0


def _shape(name: str, tensors: Mapping[str, Tensor], rows: int, hidden_size: int) -> list[int]:
    """The shape that a tensor must have; the number of words and pieces of text is free."""
    match name.split("."):
        case ["toxic" | "neutral", _]:
            return [rows, hidden_size]
        case ["leading", _]:
            return [_length(tensors[name]), hidden_size]
        case ["worth", layer]:
            return [_length(tensors[f"leading.{layer}"])]
        case ["moments", "weights"]:
            return [_length(tensors["moments.words"])]
        case ["moments", "tokens"]:
            return [len(TEXTS)]
        case ["moments", part]:
            K = (tensors["moments.directions"].shape or (0,))[-1]
            return [hidden_size, K] if part == "directions" else [_length(tensors[name]), K, K]
    return [hidden_size, hidden_size]


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(to_bytes(tensor)).hexdigest()


def read_inputs(path: Path) -> dict[str, Any]:
    """The inputs that a file of ``save_activations`` states; empty if it states none.

    Raises:
        DataError: it cannot be read, or its metadata are not those of ``save_activations``.
    """
    what = f"activations {path.name}"
    with _opened(path) as file:
        inputs = strict_json.parse((file.metadata() or {}).get("inputs", "{}"))
    texts = ("pairs", "prose", "site", "pooling")
    if (
        not isinstance(inputs, dict)
        or not isinstance(inputs.get("files", {}), dict)
        or not all(isinstance(inputs.get(key, ""), str) for key in texts)
        or not all(isinstance(digest, str) for digest in inputs.get("files", {}).values())
    ):
        raise DataError(f"{what} have metadata that are not those of gloss-convert")
    return inputs


def texts_of_file(path: Path, pairs: Pairs, prose: Prose) -> tuple[Pairs, Prose]:
    """Check the pairs and the prose that an activations file was made from.

    Raises:
        DataError: the file says that they are not those of this run.
    """
    inputs = read_inputs(path)
    for what, found in (("pairs", pairs.sha256), ("prose", prose.sha256)):
        if inputs.get(what, found) != found:
            raise DataError(
                f"activations {path.name} were taken from other {what}",
                expected=f"those with sha256 {inputs[what][:16]}...",
                found=f"{found[:16]}...",
                hint="give the same --pairs, --num-pairs, --seed, --neutral and --word-list",
            )
    if "pairs" in inputs and "prose" in inputs:
        return pairs, prose
    progress.warn(f"{path.name} does not say which pairs and prose it was made from")
    unknown = Origin(name=f"unknown, in {path.name}")
    digest = sha256_of(path)
    return Pairs((), unknown, digest), Prose((), unknown, digest)
