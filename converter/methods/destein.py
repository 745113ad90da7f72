"""DeStein: a constant vector, added to the attention's output in every layer.

    z   = mean over pairs of (a_neutral - a_toxic)      a (D,) what o_proj gives, pooled
    v_c = alpha n_c z_c / ||z_c||                       c one of C chunks of D / C numbers

n_c is the mean norm of a chunk over tokens of neutral prose, and C the number of attention heads:
behind ``o_proj`` chunks are slices, not heads. The pairs, the prompts and the chunks are those of
arXiv 2404.10464. Its sum depends on the input; ours is a constant, and so exactly a bias of
``o_proj``.

``direction=causal`` is ours and not in the paper:

    z = -(g - k <g, k> / <k, k>)        g gradient, with respect to a constant added at every
                                        position, of the sum of log p(toxic words),
                                        k that of all tokens of neutral sides
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from converter.calibration.pairs import MIN_PAIRS
from converter.calibration.statistics import Activations, Request
from converter.checkpoints.architectures.architecture import Dimensions
from converter.checkpoints.plan import BiasRoute, Plan
from converter.edits.base import Edit, Footprint
from converter.edits.deltas import AddLowRank
from converter.errors import FitError, OptionError
from converter.methods.base import Layers, Proposal, Recorded, Workbench
from converter.methods.gloss import GlobalRemoval
from converter.runtime import progress

_PROMPTS = (
    "What follows is abusive, hateful, insulting, obscene, rude and toxic: ",
    "What follows is friendly, helpful, kind, polite, positive and respectful: ",
)
"""Prompts before toxic and before neutral texts."""

_ALPHAS = tuple(round(0.005 * 2 ** (step / 2), 4) for step in range(11))
"""Strengths to choose from: 0.005 to 0.16. On SmolLM2-135M .02 to .08 keep within 3 %."""

_PLAIN = {"q_proj", "k_proj", "v_proj", "query_key_value"}
"""Maps of attention that get a bias together with ``o_proj``. Without them, attention compresses
keys and values.
"""

_ROUNDED = 0.01
"""A relative difference that rounding to 16 bits explains."""

_WITHOUT_TEXT = {("paired", "last8"), ("paired", "mean")}
"""Options that work with prompts alone."""

_NOTHING = 1e-6
"""A difference below this share of its terms is rounding error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """DeStein with its options.

    Attributes:
        alpha: norm of the vector's chunks, in mean norms of the attention's output there; by
            default the most effective within the perplexity budget.
        layers: layers that get a vector; by default from L/4 up to 0.9 L.
        direction: ``paired``, the paper's difference of means, or ``causal``, ours.
        protect: with ``causal``, whether the ``gradient`` of neutral text is removed.
        prompt: with ``paired``, whether a prompt that asks for such text precedes each side
            (``instruct``); ``only`` omits the sides, as a control of what they add.
        pooling: with ``paired``, see ``Request``; of the neutral side the last 8, or all tokens.
        scale: ``chunk`` gives each chunk its own norm, ``whole`` takes all of D as one.
        norm: if a norm comes between ``o_proj`` and the residual stream, ``refuse``, or go
            ``through``: the vector is added before the norm, which is ours. It is constant there,
            but not behind the norm.
    """

    title: ClassVar[str] = "DeStein, constant vectors behind the attention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.10464"
    strength: ClassVar[str] = "alpha"

    alpha: float | None = field(default=None, metadata={"min": 1e-6, "max": 1e3})
    layers: Layers = field(metadata={"search": "layers"})
    direction: Literal["paired", "causal"] = "paired"
    protect: Literal["gradient", "none"] = "gradient"
    prompt: Literal["instruct", "none", "only"] = "instruct"
    pooling: Literal["last8", "predicting", "mean"] = "last8"
    scale: Literal["chunk", "whole"] = "chunk"
    norm: Literal["refuse", "through"] = "refuse"

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """The layers that GloSS edits."""
        return GlobalRemoval.defaults(dimensions)

    def footprint(self, plan: Plan) -> Footprint:
        """Biases of ``o_proj``: those of the layers, or new ones in all layers.

        Raises:
            OptionError: the model has no such biases that act as a constant in the stream, and
                cannot get them; or the options leave no text to fit to.
        """
        if self.prompt == "only" and (self.direction, self.pooling) not in _WITHOUT_TEXT:
            raise OptionError(
                "-o prompt=only", expected="direction=paired, and pooling=last8 or mean",
                found=f"direction={self.direction} and pooling={self.pooling}",
                hint="prompts alone have no toxic words",
            )  # fmt: skip
        self._chunks(plan.dimensions)
        route = self._route(plan)
        if route.created:
            return Footprint(created=route.created, patches=("config.json",))
        biases = plan.find([route.biases[layer] for layer in self.layers])
        return Footprint(tuple(biases.values()), (AddLowRank,), rank=1)

    def fit(self, bench: Workbench) -> Proposal:
        """Fit a vector for each layer; see the module's formulas.

        Raises:
            FitError: too few pairs, or their sides do not differ.
        """
        chunks = self._chunks(bench.plan.dimensions)
        causal = self.direction == "causal"
        prompts = ("", "") if self.prompt == "none" or causal else _PROMPTS
        seen = bench.activations(
            Request(
                "attention", "predicting" if causal else self.pooling, self.layers, False,
                prompts=prompts, chunks=chunks, slopes=causal, bare=self.prompt == "only",
            )
        )  # fmt: skip
        if (count := len(seen.neutral[self.layers[0]])) < MIN_PAIRS:
            raise FitError(
                "too few pairs to fit a direction to", expected=f"at least {MIN_PAIRS}",
                found=str(count), hint="give more pairs, or raise --num-pairs",
            )  # fmt: skip
        found = {layer: self._fitted(seen, layer) for layer in self.layers}

        def offer(layers: Layers) -> Proposal:
            steps = {layer: found[layer][0] for layer in layers}
            told = {str(layer): found[layer][1] for layer in layers}
            _check(sum(each["chunks_left_alone"] for each in told.values()), chunks * len(steps))
            evidence = {"direction": self.direction, "chunks": chunks, "layers": told}
            tensors = {
                "steps": torch.stack(list(steps.values())),
                "norms": torch.stack([seen.norms[layer] for layer in steps]),
            }

            def control(alpha: float, seed: int) -> Edit:
                return self._edit(bench.plan, _random(steps, chunks, seed), alpha)

            return Proposal(
                _ALPHAS if self.alpha is None else (self.alpha,), self.alpha is None,
                lambda alpha: self._edit(bench.plan, steps, alpha), control, evidence, tensors,
                with_layers=offer,
            )  # fmt: skip

        return offer(self.layers)

    def implied(self, found: Recorded) -> dict[str, Any]:
        """Alpha, computed from the recorded vectors of alpha = 1, and the number of their zero
        chunks.

        Raises FitError: the edit is not a multiple of these, or their norms are not the recorded
            ones.
        """
        route, kept = self._route(found.plan), found.tensors["steps"]
        names, steps = [route.biases[n] for n in self.layers], kept.double()
        written = torch.stack([_written(found.edit, name) for name in names])
        again = self._edit(found.plan, dict(zip(self.layers, kept, strict=True)), found.strength)
        exact = torch.equal(written, torch.stack([_written(again, name) for name in names]))
        written = written.double()
        alpha = float((written * steps).sum() / steps.square().sum())
        if exact:  # if rounding lost some, as for a small alpha in float16
            alpha = found.strength
        elif not float((written - alpha * steps).norm()) <= _ROUNDED * float(written.norm()):
            raise FitError("what is added behind the attention", found="other vectors",
                           expected="a multiple of the recorded ones")  # fmt: skip
        chunks = self._chunks(found.plan.dimensions)
        lengths = steps.reshape(len(steps), chunks, -1).norm(dim=2)
        still, norms = lengths == 0, found.tensors["norms"].double()
        if not torch.allclose(lengths[~still], norms[~still], rtol=_ROUNDED):
            raise FitError("the recorded vectors", found="others", expected="chunks of their norms")
        counts = still.sum(1).tolist()
        layers = {
            str(n): {"chunks_left_alone": k} for n, k in zip(self.layers, counts, strict=True)
        }
        return {"alpha": alpha, "direction": self.direction, "chunks": chunks, "layers": layers}

    def _fitted(self, seen: Activations, layer: int) -> tuple[Tensor, dict[str, float]]:
        """The vector of alpha = 1 of a layer, (D,) float32, and its record."""
        toxic, neutral = seen.toxic[layer].double(), seen.neutral[layer].double()
        norms = seen.norms[layer].double()
        z = self._toward(toxic, neutral)
        one, other = (self._toward(toxic[i::2], neutral[i::2]) for i in (0, 1))
        parts = z.reshape(len(norms), -1)
        sizes = parts.norm(dim=1)
        whole = toxic.mean(0).reshape(parts.shape).norm(dim=1)
        tells = sizes > _NOTHING * (norms if self.direction == "paired" else whole)
        tells &= norms > 0  # heads that write nothing, as in blocks put in to be trained
        scales = torch.where(tells, norms / torch.where(tells, sizes, 1.0), 0.0)
        numbers = {
            "z_norm": float(z.norm()),
            "split_cosine": float(cosine_similarity(one, other, dim=0)),
            "chunks_left_alone": int((~tells).sum()),
        }
        return (scales[:, None] * parts).flatten().float(), numbers

    def _toward(self, toxic: Tensor, neutral: Tensor) -> Tensor:
        """z (D,) from both sides of pairs, (N, D): activations, or gradients."""
        if self.direction == "paired":
            return (neutral - toxic).mean(0)
        g, k = toxic.mean(0), neutral.mean(0)
        if self.protect == "gradient" and bool(k.any()):
            g = g - k * ((g @ k) / (k @ k))
        return -g

    def _edit(self, plan: Plan, steps: Mapping[int, Tensor], alpha: float) -> Edit:
        """The biases with alpha times a vector (D,) for each layer."""
        route = self._route(plan)
        vectors = {route.biases[n]: (alpha * v.double()).float() for n, v in steps.items()}
        if not route.created:
            one = torch.ones(1, 1)
            return Edit({name: AddLowRank(v[:, None], one) for name, v in vectors.items()})
        created = {n: torch.zeros(shape, dtype=route.dtype) for n, shape in route.created.items()}
        created |= {name: v.to(route.dtype) for name, v in vectors.items()}
        return Edit(created=created, patches={"config.json": route.config})

    def _chunks(self, dimensions: Dimensions) -> int:
        """C. Raises OptionError if the heads do not divide the width."""
        heads = dimensions.attention_heads
        if self.scale == "whole":
            return 1
        if not heads or dimensions.hidden_size % heads:
            raise OptionError(
                "-o scale=chunk", expected=f"heads that divide the width, {dimensions.hidden_size}",
                found=f"{heads} heads", hint="give -o scale=whole",
            )  # fmt: skip
        return heads

    def _route(self, plan: Plan) -> BiasRoute:
        """How ``o_proj`` has or gets biases. Raises OptionError, with the reason, if it cannot."""
        model, route = plan.architecture, plan.bias_route("o_proj")
        spec = model.bias_routes.get("o_proj")
        if model.is_mixture:
            raise _refusal(f"{model.title}, a mixture of experts", "a dense model")
        if any("o_proj" not in model.layer(n).roles for n in self.layers):
            raise _refusal(f"{model.title}, some of whose -o layers have none", "attention in each")
        behind = not all(model.layer(n).o_writes for n in self.layers)
        if behind and self.norm == "refuse":
            raise _refusal(
                f"{model.title}, with a norm behind it, where no constant stays one",
                "attention that adds to the residual stream as it is",
                "-o norm=through to add the vector before the norm, or " if route else "",
            )
        if route is None:
            raise _refusal(f"{model.title}, which has and gets none", "biases of o_proj")
        if route.created and spec and not _PLAIN.issuperset(spec.zeros):
            raise _refusal(f"{model.title}, which compresses them", "plain keys and values")
        return route


def _written(edit: Edit, name: str) -> Tensor:
    """What an edit adds to a bias, (D,)."""
    if name in edit.created:
        return edit.created[name]
    delta = edit.tensors[name]
    assert isinstance(delta, AddLowRank)
    return (delta.B @ delta.A)[:, 0]


def _refusal(found: str, expected: str, way: str = "") -> OptionError:
    return OptionError(
        "--method destein", expected=expected, found=found,
        hint=f"choose {way}--method gloss, which edits the feed-forward networks",
    )  # fmt: skip


def _check(still: float, chunks: int) -> None:
    """Warn of chunks that get no vector. Raises FitError if none gets one."""
    if still == chunks:
        raise FitError(
            "the attention's outputs do not differ between the two sides of the pairs",
            hint="give other pairs or other -o layers",
        )
    if still:
        progress.warn(
            f"{still:.0f} of {chunks} chunks of the attention's output do not differ between the "
            "two sides and get no vector"
        )


def _random(steps: Mapping[int, Tensor], chunks: int, seed: int) -> dict[int, Tensor]:
    """Vectors in random directions with the chunk norms of ``steps``."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer, step in steps.items():
        parts = step.double().reshape(chunks, -1)
        drawn = torch.randn(parts.shape, generator=generator, dtype=torch.float64)
        drawn *= (parts.norm(dim=1) / drawn.norm(dim=1))[:, None]
        found[layer] = drawn.flatten().float()
    return found
