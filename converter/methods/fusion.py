"""Output-layer fusion: what calibration models add, folded into the head or as the paper has it."""

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
"""Among which a scale is chosen."""

_PENALTY = 30.0
"""Tokens of mean energy that the ridge regression adds to each direction."""

_RATE, _WIDTH = 5e-3, 576
"""The rate that worked, and the hidden size where it did."""

_ROUNDING, _NOISY = 2.0**-9, 0.1
"""What rounding to 16 bits changes, as a share; and how much of a length it may be for that to be
known to a hundredth, since its square counts."""

_ROWS = 4096
"""Rows of the head that are computed on at a time."""

_SINGULAR = 1e-9
"""Of the squares of singular values, the share of the largest below which the least is zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What distinguishes a neutral from a toxic calibration model, added to what the head is given.

        h' = h + c (t_n - t_t)          of the output layer, with two more models at hand
        B  = argmin |H B - (T_n - T_t)|^2 + p |B|^2       over the tokens of the pairs
        W' = W + c W V (S U^T)          B = U S V^T, cut off after R singular values

    h (D,) is what the head W (V, D) is given, t_n and t_t what the heads of two calibration models
    are: the first layers of the model, trained on neutral and on toxic text. As B is linear and the
    head is too, ``W' h = W (h + c B^T h)``, so that the result is an ordinary checkpoint. Where the
    head is the embedding, it becomes a weight of its own and the embedding stays as it is.

    This is our construction in the place of that of arXiv 2506.01266, which blends h with what one
    calibration model of neutral text gives, layer-normalised, while the model runs, and keeps that
    model. That is ``form=paper``, which needs code of its own; see ``methods.fusion_paper``.

    The control puts a random orthonormal basis in place of V: the same B, its output turned.

    Attributes:
        form: ``folded``, or ``paper``.
        scale: c; by default chosen. With form=paper it is a, .1 by default.
        rank: R, with form=folded; nothing is cut off if it is the width of the head.
        depth: layers of the calibration models.
        tokens: that each of them is trained to predict.
        rate: at which they learn at first.
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
        """A step of AdamW changes what a map gives by its width times the rate, so it falls."""
        return {"rate": min(_RATE, _RATE * _WIDTH / dimensions.hidden_size)}

    def footprint(self, plan: Plan) -> Footprint:
        """The head; or a new one and the key of the config that says so. Of the paper's form, what
        ``fusion_paper.footprint`` says.

        Raises:
            OptionError: there is no head that can change.
        """
        if self.form == "paper":
            return fusion_paper.footprint(plan, self.depth, self.scale)
        weight, route = _head(plan)
        if route is None:
            rank = min(self.rank, weight.info.shape[1 - weight.axis])
            return Footprint((weight,), (AddLowRank,), rank)
        return Footprint(created={route.name: weight.info.shape}, patches=("config.json",))

    def fit(self, bench: Workbench) -> Proposal:
        """Train the calibration models and fold what tells them apart.

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
        """Singular values and scale, as far as the factors of the change say so.

        With ``W' = W + (c W V) A``, rows of A are as long as S, and columns of c V, which V makes
        orthonormal, as c. Of a new head the product of c and the largest singular value is known.

        Raises FitError: the rank is another one, or the change is not of that form.
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

    Beside it how long X would be of numbers that are what rounding W to 16 bits changes: in a W
    that is nearly singular they are not small, and of one that is singular nothing is known.
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
    """The head, or the embedding that is one and how it becomes two.

    Raises:
        OptionError: neither can be had.
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
