"""The cache of activations: hit when nothing changed, missed when any one input does."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from converter.calibration import collect as extraction
from converter.calibration import statistics as activations
from converter.calibration.datasets import Spans
from converter.calibration.linear_algebra import leading_eigenvectors
from converter.calibration.pairs import Prose, load_pairs, load_prose
from converter.calibration.split import Part
from converter.calibration.statistics import Request, load_activations
from converter.calibration.word_list import load_words
from converter.entrypoints import convert as pipeline
from converter.errors import DataError, FitError
from converter.manifest import Origin
from converter.methods.workbench import Bench
from converter.models import loading
from converter.models import resident as forward
from converter.models.batching import Encoder, Pooling, batches
from converter.recipe import Recipe
from converter.runtime import cache as runtime_cache
from converter.runtime.cache import remembered_digest, sha256_of, using_cache
from tests.builders.errors import refused
from tests.builders.models import (
    HIDDEN,
    TINY,
    Checkpoints,
    architecture_of,
    tiny_recipe,
    tiny_tokenizer,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[Path]:
    """The cache folder of each test, not made yet."""
    with using_cache(tmp_path / "cache"):
        yield tmp_path / "cache"


class HasAsked(Exception):  # noqa: N818 - it is not an error
    """A fit has its activations; nothing more is wanted of it."""


class ActivationBench(Bench):
    """A workbench that ends the fit once it has the activations that the method asks for."""

    def activations(self, request: Request) -> activations.Activations:
        super().activations(request)
        raise HasAsked


class Runs:
    """Runs the activation stage and says whether the model was loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded, load = 0, loading.load_model

        def counted(*args: Any, **settings: Any) -> nn.Module:
            self.loaded += 1
            return load(*args, **settings)

        monkeypatch.setattr(loading, "load_model", counted)

    def __call__(self, recipe: Recipe) -> str:
        source, plan, method = pipeline.prepare(recipe)
        words = load_words(recipe.word_list)
        pairs = load_pairs(recipe.pairs, words, recipe.num_pairs, recipe.seed)
        prose = load_prose(recipe.neutral)
        before = self.loaded
        bench = ActivationBench.of(recipe, source, plan, words, "cpu")
        with pytest.raises(HasAsked):
            bench.fit(method, Part(pairs, prose))
        return "miss" if self.loaded > before else "hit"


@pytest.mark.slow
def test_the_cache_is_hit_when_nothing_changed_and_missed_when_any_input_does(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    stage = Runs(monkeypatch)
    recipe = tiny_recipe(source, num_pairs=16)
    assert stage(recipe) == "miss"
    assert stage(recipe) == "hit"
    # what the activations do not depend on
    for same in ({"rank": "2"}, {"alpha": "0.5"}, {"candidates": "svd"}, {"edit_layers": "1"}):
        assert stage(replace(recipe, options={**TINY, **same})) == "hit", same
    moved = shutil.copytree(source, tmp_path / "moved")
    assert stage(replace(recipe, source=str(moved))) == "hit"  # by content, not by path

    prose = tmp_path / "prose.txt"
    prose.write_text("Another text. " * 60)
    for change in (
        {"num_pairs": 17},
        {"seed": 1},
        {"neutral": str(prose)},
        {"forward_dtype": "bfloat16"},
        {"batch_size": 3},  # rounding only, but equal keys must mean equal bytes
        {"options": {**TINY, "layers": "2-3"}},
        {"options": {**TINY, "pooling": "mean"}},
        {"options": {**TINY, "site": "residual"}},
    ):
        assert stage(replace(recipe, **change)) == "miss", change
    for name in ("config.json", "tokenizer_config.json"):
        text = (source / name).read_text()
        (source / name).write_text(text + "\n")
        assert stage(recipe) == "miss", name
        (source / name).write_text(text)
        assert stage(recipe) == "hit", name
    shard = max(source.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert stage(recipe) == "miss"
    monkeypatch.setattr(extraction, "MAX_TOKENS", 255)
    assert stage(recipe) == "miss"
    monkeypatch.undo()


def test_another_version_or_library_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = load_pairs("builtin", load_words("builtin"), 16, 0)
    request = Request("ffn", "mean", (1,), False)

    def key(device: str = "cpu", mode: str = "resident") -> str:
        how: dict[str, Any] = {"device": device, "dtype": "float32", "batch_size": 16, "mode": mode}
        part, llama = Part(pairs, load_prose("builtin")), architecture_of("llama")
        return activations.cache_key(extraction.activation_inputs({}, llama, part, request, **how))

    first = key()
    assert key() == first
    assert key("cuda:1") == key("cuda") != first
    assert key(mode="streamed") != first
    with monkeypatch.context() as changed:
        changed.setattr(extraction, "EXTRACTION_VERSION", extraction.EXTRACTION_VERSION + 1)
        assert key() != first
    monkeypatch.setattr(extraction, "version", lambda name: "0")
    assert key() != first


def test_the_toxic_side_is_pooled_as_asked_and_the_neutral_side_over_its_tokens(
    checkpoints: Checkpoints,
) -> None:
    module = loading.load_model(checkpoints("llama"), torch.float32, "cpu", 0)
    tokenizer, pairs = tiny_tokenizer(), load_pairs("builtin", load_words("builtin"), 16, 0)
    model = forward.LanguageModel(module, tokenizer, architecture_of("llama"), "cpu")
    encode = Encoder(tokenizer, module)
    prose = Prose(("A text.",), Origin(name="test"), "")
    other = Prose(("Quite another text, and longer.",), Origin(name="test"), "")

    def seen(request: Request, prose: Prose = prose) -> activations.Activations:
        return extraction.extract(model, request, pairs, prose, batch_size=5)[0]

    def alone(text: str, pooling: Pooling, spans: Spans, site: str) -> Tensor:
        pool = forward.Pool(1)
        name = "model.layers.3.mlp" if site == "ffn" else "model.layers.3"
        batched = batches([encode(text, pooling, spans)], 1, "cpu")
        forward.run(model, {3: (name,)}, [(batched, [pool])])
        return pool.pooled[3][0]

    pair = pairs.pairs[7]
    poolings: tuple[Pooling, ...] = ("predicting", "mean", "last")
    for pooling in poolings:
        for site in ("ffn", "residual"):
            found = seen(Request(site, pooling, (3,), False))
            expected = alone(pair.toxic, pooling, pair.spans, site)
            assert torch.allclose(found.toxic[3][7], expected, atol=1e-5)
            plain: Pooling = "last" if pooling == "last" else "mean"
            assert torch.allclose(
                found.neutral[3][7], alone(pair.neutral, plain, (), site), atol=1e-5
            )
    rows = [seen(Request("ffn", pooling, (3,), False)).toxic[3] for pooling in poolings]
    assert not torch.allclose(rows[0], rows[1], atol=1e-4)
    moments = [seen(Request("ffn", "mean", (3,), True), p).second_moment for p in (prose, other)]
    assert moments[0] is not None
    assert moments[1] is not None
    assert float((moments[0] - moments[1]).abs().max()) > 1e-5


def test_moments_are_kept_and_every_distinct_word_weighs_the_same(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    module = loading.load_model(checkpoints("llama"), torch.float32, "cpu", 0)
    model = forward.LanguageModel(module, tiny_tokenizer(), architecture_of("llama"), "cpu")
    pairs, prose = load_pairs("builtin", load_words("builtin"), 40, 0), load_prose("builtin")
    prose = replace(prose, paragraphs=prose.paragraphs[:2])
    request = Request("ffn", "predicting", (2, 3), True, True, directions=5, protect_shared=2)
    seen, dropped = extraction.extract(model, request, pairs, prose, batch_size=8)
    assert dropped == 0
    assert seen.second_moment is not None
    assert seen.moments is not None
    V, shared = seen.moments.directions.double(), leading_eigenvectors(seen.second_moment, 2)
    assert torch.allclose(V.T @ V, torch.eye(5).double(), atol=1e-6)
    assert float((shared.T @ V).abs().max()) < 1e-6
    distinct = {p.toxic[a:b].lower() for p in pairs.pairs for a, b in p.spans}
    assert float(seen.moments.weights.sum()) == pytest.approx(len(distinct))

    path = tmp_path / "a.safetensors"
    inputs = {"directions": 5, "protect_shared": 2}
    activations.save_activations(replace(seen, inputs=inputs), path)
    found = load_activations(path, request, HIDDEN)
    assert found.moments is not None
    assert found.moments.tokens == seen.moments.tokens
    for name, tensor in seen.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name
    with refused(
        DataError,
        what="activations a.safetensors were taken with another directions",
        expected="6",
        found="5",
        hint="give -o directions=5 or other activations",
    ):
        load_activations(path, replace(request, directions=6), HIDDEN)
    wrong = {**seen.tensors(), "moments.pairs": torch.zeros(3, 5, 4)}
    save_file(wrong, path)
    with refused(
        DataError,
        what="activations a.safetensors: moments.pairs",
        expected="shape [3, 5, 5]",
        found="[3, 5, 4]",
    ):
        load_activations(path, request, HIDDEN)
    with refused(FitError, what="... leaves nothing of what toxic words depend on"):
        extraction.extract(
            model, replace(request, protect_shared=HIDDEN), pairs, prose, batch_size=8
        )


def test_a_damaged_cache_file_is_made_again(
    checkpoints: Checkpoints, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Runs(monkeypatch)
    recipe = tiny_recipe(checkpoints("llama"), num_pairs=16)
    assert stage(recipe) == "miss"
    (path,) = (cache / "activations").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert stage(recipe) == "miss"
    assert stage(recipe) == "hit"


def test_one_wrong_bit_in_a_file_is_noticed(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    path = tmp_path / "seen.safetensors"
    seen = activations.Activations({0: x}, {0: -x}, torch.eye(8), {})
    activations.save_activations(seen, path)
    assert torch.equal(load_activations(path, REQUEST, 8).toxic[0], x)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with refused(DataError, what="activations seen.safetensors: toxic.0 is damaged"):
        load_activations(path, REQUEST, 8)


REQUEST = Request("ffn", "mean", (0,), True)


WHOLE = {"toxic.0": torch.ones(4, 8), "neutral.0": torch.ones(4, 8), "second_moment": torch.eye(8)}


@pytest.mark.parametrize(
    ("name", "tensor", "what", "expected", "found"),
    [
        ("neutral.0", None, "...", "a tensor neutral.0", None),
        ("second_moment", None, "...", "a tensor second_moment", None),
        ("neutral.0", torch.ones(5, 8), "...: neutral.0", "shape [4, 8]", "[5, 8]"),
        ("toxic.0", torch.ones(4, 9), "...: toxic.0", "shape [4, 8]", "[4, 9]"),
        ("toxic.0", torch.full((4, 8), torch.nan), "...: toxic.0 holds NaN or Inf", None, None),
    ],
)
def test_files_that_do_not_serve_are_refused(
    name: str, tensor: Tensor | None, what: str, expected: str | None, found: str | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    others = {key: value for key, value in WHOLE.items() if key != name}
    save_file(others if tensor is None else others | {name: tensor}, tmp_path / "a.safetensors")
    with refused(DataError, what=what, expected=expected, found=found):
        load_activations(tmp_path / "a.safetensors", REQUEST, 8)


def test_remembered_digests_are_true(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert remembered_digest(path) == sha256_of(path)
    assert not cache.exists()  # too young for its times to be trusted
    monkeypatch.setattr(runtime_cache, "SETTLED", -1.0)
    assert remembered_digest(path) == sha256_of(path)
    assert list((cache / "digests").iterdir())
    stat = path.stat()
    path.write_bytes(b"two")  # same size, and the same time by force
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert remembered_digest(path) == sha256_of(path)
    (memo,) = (cache / "digests").iterdir()
    memo.write_text("{broken")
    assert remembered_digest(path) == sha256_of(path)
