"""Output-layer fusion: calibration models folded into the head, or beside the model as in the
paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from converter.calibration.calibration_models import Contrast, Training
from converter.calibration.linear_algebra import random_basis, ridge
from converter.checkpoints.architectures.architecture import Dimensions
from converter.checkpoints.plan import HeadRoute, Plan
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit, Footprint
from converter.edits.deltas import AddLowRank
from converter.errors import FitError, OptionError
from converter.methods import fusion_paper
from converter.methods.base import Proposal, Recorded, Workbench

_SCALES = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Scales to choose from."""

_PENALTY = 30.0
"""Tokens of mean energy that the ridge regression adds to each direction."""

_RATE, _WIDTH = 5e-3, 576
"""The rate that worked, and the hidden size at which it did."""

_ROUNDING, _NOISY = 2.0**-9, 0.1
"""The relative change by rounding to 16 bits; and the largest share of a length that it may be for
the length to be known to a hundredth, since its square counts.
"""

_ROWS = 4096
"""Rows of the head in one computation."""

_SINGULAR = 1e-9
"""A squared singular value below this share of the largest counts as zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """The difference of a neutral and a toxic calibration model, added to the head's input.

        h' = h + c (t_n - t_t)          of the output layer, with two more models at hand
        B  = argmin |H B - (T_n - T_t)|^2 + p |B|^2       over the tokens of the pairs
        W' = W + c W V (S U^T)          B = U S V^T, cut off after R singular values

    h (D,) is the input of the head W (V, D); t_n and t_t are the inputs of the heads of two
    calibration models: the first layers of the model, trained on neutral and on toxic text. B and
    the head are linear, so ``W' h = W (h + c B^T h)``, and the result is an ordinary checkpoint. If
    the head is the embedding, the head becomes a weight of its own and the embedding stays the
    same.

    This is our construction. That of arXiv 2506.01266 keeps one calibration model of neutral text,
    and blends its layer-normalised output with h while the model runs. It is ``form=paper``, which
    needs code of its own; see ``methods.fusion_paper``.

    The control replaces V by a random orthonormal basis: the same B, its output turned.

    Attributes:
        form: ``folded``, or ``paper``.
        scale: c; by default chosen. With form=paper it is a, .1 by default.
        rank: R, with form=folded; nothing is cut off if it is the width of the head.
        depth: layers of the calibration models.
        tokens: number of tokens that each calibration model is trained to predict.
        rate: learning rate at the first step.
    """

    title: ClassVar[str] = "Output-layer fusion"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.01266"
    strength: ClassVar[str] = "scale"
    trains: ClassVar[bool] = True

    form: Literal["folded", "paper"] = "folded"
    scale: float | None = field(default=None, metadata={"min": 1e-6, "max": 1e3})
    rank: int = field(default=32, metadata={"min": 1, "max": "hidden_size"})
    depth: int = field(default=3, metadata={"min": 1, "max": "num_hidden_layers"})
    tokens: int = field(default=7_000, metadata={"min": 1, "max": 10**9})
    rate: float = field(metadata={"above": 0, "max": 1})

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """The rate falls with the width: a step changes a map's output by width times rate."""
        return {"rate": min(_RATE, _RATE * _WIDTH / dimensions.hidden_size)}

    def footprint(self, plan: Plan) -> Footprint:
        """The head; or a new head and the config's key for it. For the paper's form, see
        ``fusion_paper.footprint``.

        Raises:
            OptionError: the head cannot be edited.
        """
        if self.form == "paper":
            return fusion_paper.footprint(plan, self.depth, self.scale)
        weight, route = _head(plan)
        if route is None:
            rank = min(self.rank, weight.info.shape[1 - weight.axis])
            return Footprint((weight,), (AddLowRank,), rank)
        return Footprint(created={route.name: weight.info.shape}, patches=("config.json",))

    def fit(self, bench: Workbench) -> Proposal:
        """Train the calibration models and fold their difference into the head.

        Raises:
            FitError: they do not differ.
        """
        training = Training(self.depth, self.tokens, self.rate)
        if self.form == "paper":
            return fusion_paper.fit(bench, training, self.scale)
        found = bench.contrast(training)
        B = ridge(found.gram, found.cross, _PENALTY * float(found.gram.trace()) / _elements(found))
        U, S, Vh = torch.linalg.svd(B)
        if not S[0] > 0:
            raise FitError(
                "the neutral and the toxic calibration model are the same",
                hint="raise -o tokens or -o rate",
            )
        A = (S[: self.rank, None] * U.T[: self.rank]).float().contiguous()
        basis = Vh[: self.rank].T.contiguous()

        def control(scale: float, seed: int) -> Edit:
            turned = random_basis(len(basis), basis.shape[1], seed, basis[:, :0])
            return _edit(bench, scale, turned, A)

        return Proposal(
            _SCALES if self.scale is None else (self.scale,),
            self.scale is None,
            lambda scale: _edit(bench, scale, basis, A),
            control,
            _evidence(found, B, S, self.rank),
        )

    def implied(self, found: Recorded) -> dict[str, Any]:
        """Singular values and scale, as far as the factors of the change show them.

        In ``W' = W + (c W V) A`` the rows of A have the lengths S. The columns of c V have the
        length c, since V is orthonormal. For a new head, only the product of c and the largest
        singular value is known.

        Raises FitError: the rank differs, or the change has not that form.
        """
        if self.form == "paper":
            return {}
        weight, route = _head(found.plan)
        read = None if weight.scales else found.weight
        implied: dict[str, Any] = {}
        if route is None:
            delta = found.edit.tensors[weight.info.name]
            assert isinstance(delta, AddLowRank)
            S = delta.A.double().norm(dim=1)
            if len(S) != min(self.rank, delta.A.shape[1]):
                raise FitError("-o rank", expected=f"{len(S)}, by the edit", found=str(self.rank))
            implied["singular_values"] = S.tolist()
            X, noise = _solved(read(weight), delta.B) if read else (delta.B, inf)
            lengths = X.norm(dim=0)
            c = float(lengths.mean())
            if noise < _NOISY * min(c, 1 / (1 + c * float(S[0]))):  # W' may be larger than W
                implied["scale"] = c
                if not float((lengths / lengths.mean() - 1).abs().max()) <= _NOISY:
                    raise FitError("the change of the head", expected="columns of one scale",
                                   found="columns of several")  # fmt: skip
        elif read:
            W, new = read(weight), found.edit.created[route.name].float()
            X, noise = _solved(W, new - W)
            largest = float(torch.linalg.matrix_norm(X, 2))
            if noise < _NOISY * largest:
                implied["scale"] = largest / found.evidence["singular_values"][0]
        return implied


def _solved(W: Tensor, change: Tensor) -> tuple[Tensor, float]:
    """X (D, R) float64 with ``W X = change``, by least squares over some rows.

    Also returns the length of X for a ``change`` of the size of W's rounding to 16 bits. If W is
    nearly singular, it is not small; if W is singular, nothing is known of X.
    """
    rows = slice(8 * W.shape[1])
    part = W[rows].double()
    values, vectors = torch.linalg.eigh(part.T @ part)
    if not values[0] > _SINGULAR * values[-1]:
        return part.new_zeros(part.shape[1], change.shape[1]), inf
    inverse = vectors / values @ vectors.T
    error = float(part.square().mean().sqrt()) * _ROUNDING
    noise = error * (len(inverse) * float(inverse.trace())) ** 0.5
    return inverse @ (part.T @ change[rows].double()), noise


def _head(plan: Plan) -> tuple[Weight, HeadRoute | None]:
    """The head; or the embedding that serves as one, and the way to separate them.

    Raises:
        OptionError: there is neither.
    """
    if "lm_head" in plan.roles:
        return plan.weights("lm_head")[0], None
    route = plan.head_route()
    if route is None:
        raise OptionError(
            f"{plan.architecture.title}: the head cannot be edited",
            expected="one of its own, or one that is the embedding and can become its own",
            found=f"a checkpoint with a tensor {plan.architecture.unembedding} that is not used"
            if plan.names.find(plan.architecture.unembedding)
            else "a class in which it is always the embedding",
            hint="choose another method",
        )
    return route.embedding, route


def _edit(bench: Workbench, scale: float, basis: Tensor, A: Tensor) -> Edit:
    """``W' = W + (c W V) A`` with the columns of ``basis`` (D, R) as V and A (R, D)."""
    weight, route = _head(bench.plan)
    W, V = bench.weight(weight), scale * basis.double()
    blocks = (W[start : start + _ROWS].double() for start in range(0, len(W), _ROWS))
    if route is None:
        B = torch.cat([(block @ V).float() for block in blocks])
        return Edit({weight.info.name: AddLowRank(B, A)})
    folded = V @ A.double()
    new = torch.cat([(w + w @ folded).to(route.dtype) for w in blocks])
    return Edit(created={route.name: new}, patches={"config.json": dict(route.config)})


def _elements(found: Contrast) -> int:
    return found.tokens * len(found.gram)


def _evidence(found: Contrast, B: Tensor, S: Tensor, rank: int) -> Mapping[str, Any]:
    """How well the calibration models learned, and how much of their difference is in the edit.

    ``explained`` is 1 - |D - H B|^2 / |D|^2 over the tokens of the pairs, D = T_n - T_t, and
    ``energy`` the share of |B|^2 in the singular values that are kept.
    """
    error = found.square - 2 * float((B * found.cross).sum()) + float((B * (found.gram @ B)).sum())
    return {
        "tokens": found.tokens,
        "losses": {side: list(losses) for side, losses in found.losses.items()},
        "explained": 1 - error / found.square,
        "energy": float(S[:rank].square().sum() / S.square().sum()),
        "singular_values": S[:rank].tolist(),
    }
