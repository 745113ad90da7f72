"""Theorems about the forward pass: what is pooled depends on the text and on nothing else."""

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from converter.checkpoints.layout import check_config
from converter.checkpoints.plan import make_plan
from converter.checkpoints.resolve import resolve
from converter.errors import DataError, OptionError, SourceError
from converter.evaluation.continuations import generate
from converter.evaluation.passages import conditional_losses
from converter.models.batching import (
    Batch,
    Encoder,
    Pooling,
    Sentence,
    batches,
    beginning,
    encode,
    first_token,
    prepare,
)
from converter.models.hooks import Modules
from converter.models.loading import load_language_model, load_model, stream_language_model
from converter.models.resident import LanguageModel, Model, Pool, SecondMoment, run
from converter.models.transformers_loader import Loading
from converter.runtime.progress import LOG
from tests.builders.errors import refused
from tests.builders.models import HIDDEN, Checkpoints, architecture_of, planned, tiny_tokenizer

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


def templated(*parts: str, **settings: Any) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with special tokens around the text ``$A``."""
    tokenizer = deepcopy(tiny_tokenizer())
    core = tokenizer.backend_tokenizer
    core.add_special_tokens(["[SEP]", "[gMASK]"])
    special = {part: core.token_to_id(part) for part in parts if part != "$A"}
    core.post_processor = TemplateProcessing(
        single=list(parts), pair=[*parts, "$B"], special_tokens=list(special.items())
    )
    if "truncation" in settings:
        core.enable_truncation(settings["truncation"])
    if "padding" in settings:
        core.enable_padding(length=settings["padding"], direction="left", pad_id=1)
    return tokenizer


BOS, EOS = "<s>", "</s>"
WITH_BOS: list[tuple[Any, ...]] = [
    ((BOS, "$A"), {}),
    ((BOS, BOS, "$A"), {}),
    ((BOS, "$A", EOS), {}),
    ((BOS, "$A", "[SEP]", EOS), {}),
    ((BOS, "$A"), {"truncation": 8}),
    ((BOS, "$A", EOS), {"truncation": 8, "padding": 64}),
]


@pytest.mark.parametrize(("parts", "settings"), WITH_BOS)
@pytest.mark.parametrize("text", [TEXTS[2], "", f"{BOS}{TEXTS[2]}", "fool " * 900])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_text_is_encoded_whole_after_its_bos_and_before_nothing(
    text: str, prepared: bool, parts: tuple[str, ...], settings: dict[str, Any]
) -> None:
    plain, tokenizer = tiny_tokenizer(), templated(*parts, **settings)
    tokenizer.model_max_length = 8
    if prepared:
        prepare(tokenizer)
    expected = plain(text.removeprefix(BOS), verbose=False)["input_ids"]
    coded = encode(tokenizer, text, beginning(tokenizer))
    assert coded.ids == [plain.bos_token_id, *expected]
    assert coded.start == 1
    assert (len(coded.offsets), coded.offsets[-1][1]) == (len(coded.ids), len(text))
    if prepared and not text.startswith(BOS):  # as packages do that take the defaults
        assert tokenizer(text, verbose=False)["input_ids"] == coded.ids
        assert tokenizer([text, "a"], verbose=False)["input_ids"][0] == coded.ids


@pytest.mark.parametrize("parts", [("$A",), ("$A", EOS), ("$A", "[SEP]")])
def test_where_a_tokenizer_puts_nothing_first_nothing_is_first_unless_needed(
    parts: tuple[str, ...],
) -> None:
    tokenizer = templated(*parts)
    prepare(tokenizer)
    assert beginning(tokenizer) == []
    assert encode(tokenizer, "short", []).ids == tiny_tokenizer()("short")["input_ids"]
    assert tokenizer("short")["input_ids"] == encode(tokenizer, "short", []).ids
    assert beginning(tokenizer, needed=True) == [tokenizer.bos_token_id]


def test_all_that_comes_before_a_text_has_no_weight() -> None:
    tokenizer = templated("[gMASK]", BOS, "$A", EOS)
    shape = Shape()
    shape.get_input_embeddings = lambda: nn.Embedding(len(tokenizer), 1)  # type: ignore[method-assign]
    encode, plain = Encoder(tokenizer, shape), Encoder(tiny_tokenizer(), Shape())
    span = [(4, 9)]
    for pooling in ("mean", "last", "predicting"):
        found, expected = encode(TEXTS[0], pooling, span), plain(TEXTS[0], pooling, span)
        assert found.ids[1:] == expected.ids
        assert found.weights == [0.0, *expected.weights]
    assert encode.predicted(TEXTS[0]).weights == [0.0, *plain.predicted(TEXTS[0]).weights]
    (places,), (others,) = encode.words(TEXTS[0], span)[1], plain.words(TEXTS[0], span)[1]
    assert places == tuple(i + 1 for i in others)
    (batch,) = batches([encode(TEXTS[0], "mean", ()), plain(TEXTS[1], "mean", ())], 2, "cpu")
    for row, ids in zip(batch.rows, batch.content, strict=True):
        assert ids.tolist().index(True) == 2 - row


def test_continuations_go_on_where_the_prompt_ends(checkpoints: Checkpoints) -> None:
    module = load_model(checkpoints("llama"), torch.float32, "cpu", 0)
    said = []
    for parts, settings in WITH_BOS:
        tokenizer = templated(*parts, **settings)
        model = LanguageModel(module, tokenizer, architecture_of("llama"), "cpu")
        prompts = [TEXTS[2], f"{BOS}{TEXTS[2]}", TEXTS[0] * 9]
        texts = generate(model, prompts, max_new_tokens=5)
        said.append((texts, conditional_losses(model, prompts, texts).tolist()))
        assert texts[0] == texts[1]
    assert all(each == said[0] for each in said)


def load(checkpoints: Checkpoints, kind: str) -> tuple[LanguageModel, Modules]:
    module = load_model(checkpoints(kind), torch.float32, "cpu", 0)
    model = LanguageModel(module, tiny_tokenizer(), architecture_of(kind), "cpu")
    return model, {layer: (MODULES[kind].format(layer),) for layer in (1, 4)}


def pooled(
    model: LanguageModel, modules: Modules, sentences: list[Sentence], size: int, side: str
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
    handle = model.module.get_submodule(modules[4][0]).register_forward_hook(
        lambda module, args, output: seen.append(output.detach())
    )
    model.module(input_ids=torch.tensor([coded.ids]))
    handle.remove()
    expected = seen[0][0, 1:].mean(0)  # without the first position
    assert torch.allclose(pooled(model, modules, [coded], 1, "right")[1, 0], expected, atol=1e-6)


@pytest.mark.parametrize("streamed", [False, True])
def test_modules_of_one_layer_are_seen_together(streamed: bool, checkpoints: Checkpoints) -> None:
    given = (*planned(checkpoints("llama")), tiny_tokenizer(), torch.float32, "cpu")
    model: Model = stream_language_model(*given, 10**9) if streamed else load_language_model(*given)
    batched = batches([encoder(TEXTS[0], "mean", [])], 1, "cpu")

    def seen(*names: str) -> Tensor:
        shown: list[Tensor] = []
        model.visit({3: names}, batched, lambda number, layer, f: shown.append(f))
        (only,) = shown
        return only

    mlp, attention = "model.layers.3.mlp", "model.layers.3.self_attn"
    assert torch.allclose(seen(mlp, attention), seen(mlp) + seen(attention), atol=1e-6)
    assert float(seen(attention).norm()) > 0


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
    tokenizer = deepcopy(tiny_tokenizer())
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


def attention_of(folder: Path, how: Loading, **config: Any) -> tuple[str, Tensor]:
    """What a model computes its attention with, and logits."""
    path = folder / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | config))
    try:
        module: Any = load_model(folder, torch.float32, "cpu", 0, how=how)
    finally:
        path.write_text(before)
    with torch.inference_mode():
        logits = module(torch.tensor([[0, 5, 6, 7]])).logits
    return module.config._attn_implementation, logits


ELSEWHERE = ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|flash_attention_2",
             "kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3@main:x",
             "nonsense"]  # fmt: skip


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("asked", ELSEWHERE)
def test_an_attention_that_is_not_there_is_the_usual_one(
    asked: str, key: str, checkpoints: Checkpoints, tmp_path: Path, caplog: Any
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "tiny")
    check_config(json.loads((folder / "config.json").read_text()) | {key: asked})
    with caplog.at_level(logging.INFO, LOG.name):
        used, logits = attention_of(folder, Loading(), **{key: asked})
        assert f"attention: not {asked}, as config.json says" in caplog.text
        caplog.clear()
        usual, expected = attention_of(folder, Loading())
        assert "attention" not in caplog.text
    assert used == usual == "sdpa"
    assert torch.equal(logits, expected)
    assert "kernels" not in sys.modules


def test_an_attention_that_is_there_is_used(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "tiny")
    assert attention_of(folder, Loading(), _attn_implementation="eager")[0] == "eager"
    for name in ("eager", "sdpa"):
        asked = Loading(attention=name)
        assert attention_of(folder, asked, _attn_implementation="flash_attention_2")[0] == name
    with refused(OptionError, what="--attention flash_attention_2", hint="give --attention auto"):
        attention_of(folder, Loading(attention="flash_attention_2"))


def test_every_part_of_a_model_obeys(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("gemma3"), tmp_path / "tiny")
    asked = {"": "flash_attention_2", "text_config": "flash_attention_3", "vision_config": "eager"}
    config = json.loads((folder / "config.json").read_text()) | {"attn_implementation": asked}
    (folder / "config.json").write_text(json.dumps(config))
    source = resolve(str(folder))
    plan = make_plan(source.config, source.weight_map, source.headers())
    given = (source, plan, None, torch.float32, "cpu")
    for model in (load_language_model(*given), stream_language_model(*given, 10**9)):
        modules: Any = model.module.modules()
        parts = [part.config for part in modules if hasattr(part, "config")]
        assert len(parts) > 2
        assert {part._attn_implementation for part in parts} == {"sdpa"}
    assert json.loads((folder / "config.json").read_text())["attn_implementation"] == asked
