"""Teacher-forced numbers: what they are, by definition and on tiny models."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from converter.calibration.collect import causal_moments, moments_within
from converter.checkpoints.plan import Plan
from converter.models import loading
from converter.models import resident as forward
from converter.models.batching import Encoder, Sentence
from converter.models.edited import edited
from converter.models.likelihood import (
    Words,
    divergences,
    log_probabilities,
    mean_change,
    perplexity,
    perplexity_estimate,
    perplexity_ratio,
    teacher_forced,
    word_changes,
)
from tests.builders.edits import removal
from tests.builders.models import (
    HIDDEN,
    TINY_MODELS,
    Checkpoints,
    architecture_of,
    planned,
    tiny_tokenizer,
)


@pytest.fixture
def model(checkpoints: Checkpoints) -> forward.LanguageModel:
    module = loading.load_model(checkpoints("llama"), torch.float32, "cpu", 0)
    return forward.LanguageModel(module, tiny_tokenizer(), architecture_of("llama"), "cpu")


@pytest.fixture
def plan(checkpoints: Checkpoints) -> Plan:
    """Of the checkpoint of ``model``."""
    return planned(checkpoints("llama"))[1]


def test_log_probabilities_are_those_of_the_logits(model: forward.LanguageModel) -> None:
    lengths = (2, 9, 40, 9, 700 // 2)
    sentences = [Sentence([(7 * i + n) % 300 for i in range(n)]) for n in lengths]
    found = log_probabilities(model, [sentences])[0]
    for sentence, values in zip(sentences, found, strict=True):
        ids = torch.tensor([sentence.ids])
        logits = model.module(ids).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(1, ids[0, 1:, None])[:, 0].detach().numpy()
        assert np.allclose(values, expected, atol=1e-5)


def test_perplexity_is_the_number_of_equally_likely_tokens() -> None:
    even = [np.full(5, -math.log(8)), np.full(3, -math.log(8))]
    assert perplexity(even) == pytest.approx(8)
    assert perplexity_ratio(even, even).value == 1
    assert perplexity_ratio(even, even).error == 0
    halved = [x - math.log(2) for x in even]
    assert perplexity_ratio(even, halved).value == pytest.approx(2)
    estimate = perplexity_estimate([*even, np.full(8, -math.log(2))])
    assert estimate.value == pytest.approx(4)  # the geometric mean: every token counts the same
    assert estimate.error > 0


def test_the_standard_error_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(0)

    def draw() -> tuple[float, float]:
        before = [rng.normal(-3, 1, rng.integers(3, 30)) for _ in range(200)]
        shift = [rng.normal(0.02, 0.1) for _ in before]  # whole sentences are hard or easy
        after = [b - s for b, s in zip(before, shift, strict=True)]
        estimate = perplexity_ratio(before, after)
        return estimate.value, estimate.error

    values, errors = zip(*(draw() for _ in range(300)), strict=True)
    assert np.mean(values) == pytest.approx(math.exp(0.02), abs=0.002)
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.15)


def test_what_resembles_each_other_is_one_sampling_unit() -> None:
    """Copies of a sentence tell nothing new, if it is said that they are copies."""
    rng = np.random.default_rng(0)
    before = [rng.normal(-3, 1, 10) for _ in range(40)]
    after = [b + rng.normal(0, 0.1) for b in before]
    once = perplexity_ratio(before, after)
    groups = [i for i in range(40) for _ in range(9)]
    first, second = ([x for x in values for _ in range(9)] for values in (before, after))
    assert perplexity_ratio(first, second, groups).error == pytest.approx(once.error)
    assert perplexity_ratio(first, second).error < 0.4 * once.error
    assert mean_change([[-1.0, -2.0]]).error == math.inf
    assert not mean_change([[-1.0, -2.0]]).finite
    assert perplexity_ratio([np.zeros(2)] * 3, [np.full(2, -1e6)] * 3).value == math.inf


def test_words_are_counted_one_by_one_and_their_gain_is_capped() -> None:
    before = [np.log([0.5, 0.5, 0.1, 0.2]), np.log([0.01, 0.3])]
    after = [np.log([0.5, 0.25, 0.1, 0.1]), np.log([0.9, 0.3])]
    words: Words = [[(2,), (3, 4)], [(1,)]]  # places in the ids: one after those in the list
    changes = word_changes(before, after, words)
    halved, gained = math.log(0.5), math.log(90)
    assert np.allclose(changes[0], [halved, halved])
    assert np.allclose(changes[1], [gained])
    assert mean_change(changes).value == pytest.approx((2 * halved + gained) / 3)
    assert teacher_forced(changes).value == pytest.approx((0.5 + 0.5 + math.e) / 3)


def test_the_divergence_is_that_of_the_distributions(
    model: forward.LanguageModel, plan: Plan
) -> None:
    """Against what PyTorch makes of a categorical distribution; 0 of a model from itself."""
    encode = Encoder(model.tokenizer, model.module)
    texts = ("you stupid idiot, get out of my kitchen", "a river", "one more sentence than two")
    sentences = [encode(text, "mean", ()) for text in texts]
    edit = removal(plan, dict.fromkeys((0, 1, 2), torch.eye(HIDDEN)[:, :16]))
    hooks = (partial(edited, model.module, plan, edit), nullcontext)
    found, none = divergences(model, model, hooks, sentences)
    for values, sentence in zip(found, sentences, strict=True):
        ids = torch.tensor([sentence.ids])
        with torch.inference_mode():
            p = Categorical(logits=model.module(input_ids=ids).logits[0, :-1])
            with edited(model.module, plan, edit):
                q = Categorical(logits=model.module(input_ids=ids).logits[0, :-1])
        assert values == pytest.approx(kl_divergence(p, q).numpy(), abs=2e-6)
        assert values.max() > 1e-4
    assert not any(values.any() for values in none)


def test_the_causal_moment_is_the_derivative_along_a_removal(
    model: forward.LanguageModel, plan: Plan
) -> None:
    """Removing a share s of u from one layer changes log p by -s n u^T A u, to first order."""
    encode = Encoder(model.tokenizer, model.module)
    text = "you stupid idiot, get out of my kitchen"
    spans = [(4, 10), (11, 16)]
    sentence, (_, wordplaces) = encode(text, "predicting", spans), encode.words(text, spans)
    n = sum(w > 0 for w in sentence.weights)
    assert n == sum(len(word) for word in wordplaces)
    modules = {layer: (f"model.layers.{layer}.mlp",) for layer in (1, 3)}
    moments = dict(causal_moments(model, modules, [sentence]))
    s = 0.02

    def log_p(share: float, layer: int, u: Tensor) -> float:
        edit = removal(plan, {layer: math.sqrt(share) * u[:, None]})  # f - share u (u^T f)
        with edited(model.module, plan, edit):
            ((values,),) = log_probabilities(model, [[sentence]])
        return float(sum(values[i - 1] for word in wordplaces for i in word))

    for layer, A in moments.items():
        assert torch.equal(A, A.T)
        values, vectors = torch.linalg.eigh(A)
        for place in (0, -1):  # what hinders toxic words most, and what helps them most
            u = vectors[:, place]
            slope = (log_p(s, layer, u) - log_p(0.0, layer, u)) / s
            assert abs(slope) > 0.2
            assert slope == pytest.approx(-n * float(values[place]), rel=0.05)


@pytest.mark.parametrize("kind", sorted(TINY_MODELS))
def test_in_every_architecture_a_moment_is_the_derivative_along_what_the_ffn_adds(
    kind: str, checkpoints: Checkpoints
) -> None:
    """Also where logits are scaled or capped, where a norm follows, and where tokens are flat."""
    architecture = architecture_of(kind)
    auto = architecture.auto_class
    module = loading.load_model(checkpoints(kind), torch.float32, "cpu", 0, auto_class=auto)
    model = forward.LanguageModel(module, tiny_tokenizer(), architecture, "cpu")
    encode = Encoder(model.tokenizer, module)
    sentences = [encode.predicted("you stupid idiot, get out"), encode.predicted("a cup of tea")]
    n = sum(len(s.ids) - 1 for s in sentences)
    (name,) = architecture.sites(3)
    A = dict(causal_moments(model, {3: (name,)}, sentences))[3].double()
    u = torch.linalg.eigh(A).eigenvectors[:, -1].float()

    def log_p(share: float) -> float:
        def along(m: Any, args: Any, output: Any) -> Any:
            f, *rest = output if isinstance(output, tuple) else (output,)
            f = f - share * (f @ u)[..., None] * u * content(f)
            return (f, *rest) if rest else f

        hook = module.get_submodule(name).register_forward_hook(along)
        (values,) = log_probabilities(model, [sentences])
        hook.remove()
        return float(sum(v.sum() for v in values))

    def content(f: Tensor) -> Tensor:
        """All positions but the first: what is done to the attention sink is not counted."""
        length = max(len(s.ids) for s in sentences)
        return (torch.arange(f[..., 0].numel()) % length > 0).float().view(*f.shape[:-1], 1)

    slope = (log_p(0.01) - log_p(-0.01)) / 0.02
    assert slope == pytest.approx(-n * float(u.double() @ A @ u.double()), rel=0.02)
    assert slope < 0


def test_moments_of_sentences_and_of_their_pieces_add_up_to_the_causal_moment(
    model: forward.LanguageModel,
) -> None:
    encode = Encoder(model.tokenizer, model.module)
    texts = ("a cup of tea", "you stupid idiot, get out of my kitchen, now", "the cat sat down")
    sentences = [encode.predicted(text) for text in texts]
    count = sum(len(s.ids) - 1 for s in sentences)
    modules = {layer: (f"model.layers.{layer}.mlp",) for layer in (1, 3)}
    V = torch.linalg.qr(torch.randn(HIDDEN, 3))[0]
    A = torch.stack([A for _, A in causal_moments(model, modules, sentences)]).sum(0)
    whole, pieces = moments_within(model, modules, [(sentences, None), (sentences, 4)], V)
    assert whole.shape == (3, 3, 3)
    assert torch.allclose(whole.sum(0), count * V.T @ A @ V, atol=1e-4)
    for place, sentence in enumerate(sentences):  # in their order, not in that of the batch
        (alone,) = moments_within(model, modules, [([sentence], None)], V)
        assert torch.allclose(whole[place], alone[0], atol=1e-5)
    assert len(pieces) == sum(-(-len(s.ids) // 4) for s in sentences)
    first = -(-len(sentences[0].ids) // 4)
    assert torch.allclose(pieces[:first].sum(0), whole[0], atol=1e-5)
    assert torch.allclose(pieces.sum(0), whole.sum(0), atol=1e-4)


def test_bias_keep_spares_the_bias_in_hooks_too(model: forward.LanguageModel, plan: Plan) -> None:
    layer: Any = model.module.get_submodule("model.layers.3.mlp.down_proj")
    U = torch.linalg.qr(torch.randn(HIDDEN, 2))[0]
    x = torch.randn(1, 3, layer.in_features)
    with edited(model.module, plan, removal(plan, {3: U}, bias=False)):
        kept = layer(x) @ U
    assert torch.allclose(kept, (layer.bias @ U).expand_as(kept), atol=1e-6)
    with edited(model.module, plan, removal(plan, {3: U}, bias=True)):
        assert float((layer(x) @ U).abs().max()) < 1e-6
