"""The gradient of one weight, from what its layer is given, against that of the whole model."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.models.batching import Encoder, Sentence
from converter.models.resident import Model
from converter.models.training import TrainedMap
from tests.builders.models import Checkpoints
from tests.test_streamed import TEXTS, Opened, difference, log_p

LAYER = 2
KINDS = ["llama", "gpt2", "gemma2", "gpt_neox", "falcon", "opt"]
"""A layer with biases; one with Conv1D weights; one with a norm behind its FFN; FFNs beside the
attention, in two ways; one that lays positions of all texts in a row."""


def texts(model: Model) -> list[Sentence]:
    """With weight on the second half of each text, which stands for an answer."""
    encode = Encoder(model.tokenizer, model.module)
    found = [encode.predicted(text) for text in TEXTS[:3]]
    for text in found:
        half = len(text.ids) // 2
        text.weights[:half] = [0.0] * half
    return found


def down_proj(opened: Opened) -> Weight:
    (weight,) = opened.plan.weights("down_proj", [LAYER])
    return weight


def matrix(source: Source, weight: Weight) -> Tensor:
    """W (O, I)."""
    return source.read(weight.shard, weight.info).movedim(weight.axis, 0).float()


def loss_of(sentences: list[Sentence], number: int, logits: Tensor) -> Tensor:
    """Not the sum of log p, but another function for each text."""
    sentence = sentences[number]
    places = [p for p, w in enumerate(sentence.weights) if w]
    wanted = torch.tensor([sentence.ids[p + 1] for p in places])
    spread = logits.softmax(-1).square().sum()
    return nn.functional.cross_entropy(logits, wanted) * (number + 1) + spread


def through_the_whole_model(opened: Opened, sentences: list[Sentence]) -> Tensor:
    """The gradient (O, I) by autograd, of the model as transformers loads it."""
    module: nn.Module = opened.resident().module
    weight = down_proj(opened)
    parameter = module.get_parameter(f"{weight.module}.weight").requires_grad_()
    total = torch.zeros(())
    for number, sentence in enumerate(sentences):
        logits = module(input_ids=torch.tensor([sentence.ids])).logits[0]
        places = [p for p, w in enumerate(sentence.weights) if w]
        total = total + loss_of(sentences, number, logits[places])
    (found,) = torch.autograd.grad(total, parameter)
    return found.movedim(weight.axis, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_the_whole_model(kind: str, checkpoints: Checkpoints) -> None:
    opened = Opened.of(checkpoints(kind))
    weight = down_proj(opened)
    W = matrix(opened.source, weight)
    wanted = through_the_whole_model(opened, texts(opened.resident()))
    for model in (opened.resident(), opened.streamed()):
        sentences = texts(model)
        trained = TrainedMap(model, weight, W.clone(), sentences)
        for _ in range(2):
            found = trained.gradient(partial(loss_of, sentences))
            assert difference(found, wanted) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_finite_differences_agree(kind: str, streamed: bool, checkpoints: Checkpoints) -> None:
    """At a weight that is not the model's, in float64: the parameter is what runs."""
    opened = Opened.of(checkpoints(kind))
    opened.dtype = torch.float64
    model: Model = opened.streamed() if streamed else opened.resident()
    weight, sentences = down_proj(opened), texts(model)
    generator = torch.Generator().manual_seed(0)
    W = matrix(opened.source, weight).double()
    W += 0.1 * torch.randn(W.shape, generator=generator, dtype=torch.float64)
    trained = TrainedMap(model, weight, W, sentences)
    G = trained.gradient(partial(loss_of, sentences))
    direction = torch.randn(W.shape, generator=generator, dtype=torch.float64)
    step, values = 1e-3, list[float]()
    for sign in (1, -1):
        trained.W += sign * step * direction
        found = list[float]()
        trained.gradient(partial(kept, found, sentences))
        values.append(sum(found))
        trained.W -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    allowed = 1e-5 if kind == "gpt2" else 3e-4  # the norms of the others compute in float32
    assert slope == pytest.approx(float((G.double() * direction).sum()), rel=allowed)


def kept(found: list[float], sentences: list[Sentence], number: int, logits: Tensor) -> Tensor:
    """The loss, which is noted down."""
    value = loss_of(sentences, number, logits)
    found.append(float(value.detach()))
    return value


def test_layers_that_cannot_be_run_alone_are_run_with_those_below(checkpoints: Checkpoints) -> None:
    opened = Opened.of(checkpoints("llama"))
    weight, model = down_proj(opened), opened.resident()
    proof = model.architecture.proof
    assert proof is not None
    together = replace(model.architecture, proof=replace(proof, streams=False))
    model = replace(model, architecture=together)
    sentences = texts(model)
    trained = TrainedMap(model, weight, matrix(opened.source, weight), sentences)
    found = trained.gradient(partial(loss_of, sentences))
    assert difference(found, through_the_whole_model(opened, sentences)) < 1e-5


def test_layers_below_are_run_once_and_the_model_is_as_it_was(checkpoints: Checkpoints) -> None:
    opened = Opened.of(checkpoints("llama"))
    weight, model = down_proj(opened), opened.resident()
    sentences, ran = texts(model), list[str]()
    names = [f"model.layers.{n}" for n in range(6)]
    for name in names:
        part = model.module.get_submodule(f"{name}.self_attn")
        part.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    ids = torch.tensor([sentences[0].ids])
    before = model.module(input_ids=ids).logits
    ran.clear()
    trained = TrainedMap(model, weight, matrix(opened.source, weight) + 0.1, sentences)
    assert set(ran) == set(names[:LAYER])
    ran.clear()
    trained.gradient(partial(loss_of, sentences))
    assert set(ran) == set(names[LAYER:])
    assert torch.equal(model.module(input_ids=ids).logits, before)


def test_a_step_of_a_streamed_model_reads_the_layers_above_only(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer of the weight stays in memory until another pass."""
    opened = Opened.of(checkpoints("llama"))
    weight, model = down_proj(opened), opened.streamed()
    sentences, read = texts(model), list[str]()
    trained = TrainedMap(model, weight, matrix(opened.source, weight), sentences)
    trained.gradient(partial(loss_of, sentences))
    load = model.weights.load

    def noted(part: str) -> None:
        if part not in model.weights.loaded:
            read.append(part)
        load(part)

    monkeypatch.setattr(model.weights, "load", noted)
    trained.gradient(partial(loss_of, sentences))
    above = [f"model.layers.{n}" for n in range(LAYER + 1, 6)]
    assert [name for name in read if name.startswith("model.layers")] == above + above[::-1]
    assert model.weights.loaded == {f"model.layers.{LAYER}"}
    log_p(model)
    assert not model.weights.loaded
