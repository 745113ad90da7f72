"""Theorems about the forward pass: what is pooled depends on the text and on nothing else."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from converter.checkpoints.architectures.architecture import architectures
from converter.errors import DataError, SourceError
from converter.models.batching import Batch, Encoder, Pooling, Sentence, batches, first_token
from converter.models.loading import load_model
from converter.models.resident import LanguageModel, Pool, SecondMoment, run
from tests.builders.errors import refused
from tests.builders.models import HIDDEN, Checkpoints, tiny_tokenizer

TEXTS = [
    "the river rises in a range of low hills",
    "short",
    "a lease sets out the rights and duties of the person who owns a building",
    "glass is neither a crystal nor an ordinary liquid, it is something else",
    "you idiot",
]
MODULES = {"llama": "model.layers.{}.mlp", "gpt2": "transformer.h.{}.mlp"}


class Shape:
    """As much of a model as an ``Encoder`` looks at."""

    class config:  # noqa: N801 - as transformers names it
        max_position_embeddings = 512

    def get_input_embeddings(self) -> nn.Embedding:
        return nn.Embedding(len(tiny_tokenizer()), 1)


def encoder(text: str, pooling: Pooling, spans: Sequence[tuple[int, int]]) -> Sentence:
    return Encoder(tiny_tokenizer(), Shape())(text, pooling, spans)


def load(checkpoints: Checkpoints, kind: str) -> tuple[LanguageModel, dict[int, str]]:
    module = load_model(checkpoints(kind), torch.float32, "cpu", 0)
    model = LanguageModel(module, tiny_tokenizer(), architectures()[kind], "cpu")
    return model, {layer: MODULES[kind].format(layer) for layer in (1, 4)}


def pooled(
    model: LanguageModel, modules: dict[int, str], sentences: list[Sentence], size: int, side: str
) -> Tensor:
    pool = Pool(len(sentences))
    batched = batches(sentences, size, "cpu", side)  # type: ignore[arg-type]
    run(model, modules, [(batched, [pool])])
    return torch.stack([pool.pooled[layer] for layer in sorted(modules)])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pooling", ["mean", "last", "predicting"])
def test_batch_size_order_and_padding_side_do_not_matter(
    kind: str, pooling: str, checkpoints: Checkpoints
) -> None:
    model, modules = load(checkpoints, kind)
    spans = [(3, 9)]
    coded = [encoder(t, pooling, spans) for t in TEXTS]  # type: ignore[arg-type]
    alone = pooled(model, modules, coded, 1, "right")
    assert alone.shape == (2, len(TEXTS), HIDDEN)
    for size in (2, 5):
        for side in ("left", "right"):
            assert torch.allclose(pooled(model, modules, coded, size, side), alone, atol=1e-6)
    backwards = pooled(model, modules, coded[::-1], 2, "right")
    assert torch.allclose(backwards.flip(1), alone, atol=1e-6)


def test_the_pool_is_the_mean_of_the_module_over_real_tokens(checkpoints: Checkpoints) -> None:
    model, modules = load(checkpoints, "llama")
    coded = encoder(TEXTS[0], "mean", [])
    seen: list[Tensor] = []
    handle = model.module.get_submodule(modules[4]).register_forward_hook(
        lambda module, args, output: seen.append(output.detach())
    )
    model.module(input_ids=torch.tensor([coded.ids]))
    handle.remove()
    expected = seen[0][0, 1:].mean(0)  # without the first position
    assert torch.allclose(pooled(model, modules, [coded], 1, "right")[1, 0], expected, atol=1e-6)


def test_the_model_is_not_run_past_the_last_layer_of_interest(checkpoints: Checkpoints) -> None:
    model, modules = load(checkpoints, "llama")
    ran: list[int] = []
    for layer in range(6):
        model.module.get_submodule(f"model.layers.{layer}").register_forward_pre_hook(
            lambda module, args, layer=layer: ran.append(layer)
        )
    pooled(model, modules, [encoder(TEXTS[0], "mean", [])], 1, "right")
    assert ran == [0, 1, 2, 3, 4]


def test_predicting_positions_are_those_before_the_span() -> None:
    tokenizer = tiny_tokenizer()
    text = "you are a damn fool, they say"
    start, end = text.index("damn"), text.index(",")
    coded = encoder(text, "predicting", [(start, end)])
    assert coded.ids[0] == first_token(tokenizer) == tokenizer.bos_token_id
    chosen = [i for i, w in enumerate(coded.weights) if w]
    predicted = str(tokenizer.decode([coded.ids[i + 1] for i in chosen]))
    assert predicted.strip() == "damn fool"
    assert sum(coded.weights) == pytest.approx(1)


def test_a_span_that_starts_the_sentence_has_no_predictor_for_its_first_token() -> None:
    coded = encoder("a", "predicting", [(0, 1)])
    assert not any(coded.weights)


def test_the_first_position_never_counts() -> None:
    for pooling in ("mean", "last", "predicting"):
        coded = encoder(TEXTS[0], pooling, [(0, 40)])
        assert coded.weights[0] == 0
    assert not any(batches([coded], 1, "cpu")[0].content[:, 0])


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    with refused(
        SourceError,
        what="the model does not fit in the memory of the cpu ...",
        expected="1000000.0 GB or more available",
    ):
        load_model(tmp_path, torch.float32, "cpu", 10**15)


def test_the_second_moment_is_that_of_the_tokens(checkpoints: Checkpoints) -> None:
    model, modules = load(checkpoints, "llama")
    groups = [TEXTS[:2], TEXTS[2:]]
    results = []
    for size in (1, 3):
        moment = SecondMoment()
        batched = [batches([encoder(t, "mean", []) for t in g], size, "cpu") for g in groups]
        run(model, modules, [(group, [moment.group(group)]) for group in batched])
        results.append(moment.result())
    assert torch.allclose(results[0], results[1], atol=1e-6)
    assert results[0].trace() == pytest.approx(1, abs=1e-5)  # a mean of matrices of trace 1

    tokens: dict[int, list[list[Tensor]]] = {layer: [[], []] for layer in modules}
    for number, group in enumerate(groups):
        for text in group:
            coded = encoder(text, "mean", [])

            def keep(batch: Batch, layer: int, f: Tensor, number: int = number) -> None:
                tokens[layer][number].append(f[0, 1:])

            run(model, modules, [(batches([coded], 1, "cpu"), [keep])])
    expected = torch.zeros(HIDDEN, HIDDEN)
    for layer in modules:
        x = [torch.cat(part) for part in tokens[layer]]
        m = sum(((part.T @ part) / len(part) for part in x), torch.zeros(HIDDEN, HIDDEN))
        expected += m / m.trace() / len(modules)
    assert torch.allclose(results[0], expected, atol=1e-6)


def test_a_layer_that_writes_nothing_has_no_share_of_the_second_moment() -> None:
    moment = SecondMoment()
    moment.moments = {0: torch.zeros(3, 3), 1: 2 * torch.eye(3)}
    assert torch.allclose(moment.result(), torch.eye(3) / 6)


def test_long_texts_are_cut_to_the_positions_of_the_model() -> None:
    shape = Shape()
    shape.config.max_position_embeddings = 10
    try:
        coded = Encoder(tiny_tokenizer(), shape)(TEXTS[0] * 9, "mean", [])
        assert len(coded.ids) == 10
    finally:
        shape.config.max_position_embeddings = 512


def test_tokens_without_an_embedding_are_refused() -> None:
    class Small(Shape):
        def get_input_embeddings(self) -> nn.Embedding:
            return nn.Embedding(5, 1)

    with refused(
        DataError,
        what="the tokenizer does not belong to the model",
        expected="tokens below 5, the rows of the embedding",
    ):
        Encoder(tiny_tokenizer(), Small())(TEXTS[0], "mean", [])
