"""Fixed numbers: the activations of a model whose weights are a formula.

The key of cached activations has ``EXTRACTION_VERSION`` for the code that extracts them, which must
be raised when the numbers change. They are recorded here for a resident and a streamed model, with
weights that are stored as safetensors, pickled, or in FP8. Weights in Meta's layout are compared
with Meta's forward pass in test_native.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from converter.calibration import gradients
from converter.calibration.collect import extract
from converter.calibration.pairs import Pair, Pairs, Prose
from converter.calibration.statistics import Activations, Request
from converter.manifest import Origin
from converter.models import hooks, resident, streamed
from converter.models.batching import Batch, Pooling
from converter.models.loading import (
    load_language_model,
    load_tokenizer,
    stream_language_model,
)
from converter.models.resident import Model
from converter.runtime.cache import using_cache
from tests.builders.models import planned
from tests.test_quantization import BLOCKS, as_fp8

WORDS = ("<s>", "</s>", "<unk>", "damn", "hell", *(f"w{n}" for n in range(43)))
PAIRS = (
    Pair("w1 w2 damn w3", "w1 w2 w4 w3", ((6, 10),)),
    Pair("hell w5 w6 damn w7 w8", "w9 w5 w6 w10 w7 w8", ((0, 4), (11, 15))),
    Pair("w11 w12 hell", "w11 w12 w13", ((8, 12),)),
    Pair("w14 w15 w16 w17 w18 damn w19", "w14 w15 w16 w17 w18 w20 w19", ((20, 24),)),
)
PROSE = (" ".join(f"w{n}" for n in range(20, 42)), "w21 w3 w17 w30 w8 w25")
REQUESTS = {
    "moments": Request(
        "ffn", "predicting", (1, 2), True, True, directions=3, protect_shared=2, per_layer=2
    ),
    "residual": Request("residual", "last", (0, 2), second_moment=False, gradient=True),
    "mean": Request("ffn", "mean", (2,), second_moment=True),
    "final": Request("final", "mean", (3,), second_moment=False),
    "attention": Request(
        "attention", "last8", (0, 2), second_moment=False, prompts=("w1 w2 ", "w3 "), chunks=4
    ),
    "slopes": Request(
        "attention", "predicting", (0, 2), second_moment=False, chunks=2, slopes=True
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers; weight number n of parameter k is sin(0.37 n^2 + k), scaled."""
    folder = tmp_path_factory.mktemp("formula")
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    model: Any = LlamaForCausalLM(LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(WORDS), max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    ))  # fmt: skip
    with torch.no_grad():
        for k, (_, weight) in enumerate(sorted(model.named_parameters())):
            waves = torch.sin(0.37 * torch.arange(weight.numel(), dtype=torch.float64) ** 2 + k)
            scale, shift = (0.4, 0.0) if weight.ndim == 2 else (0.1, 1.0)
            weight.copy_((shift + scale * waves).reshape(weight.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stored_as(kind: str, checkpoint: Path, folder: Path) -> Path:
    """The same checkpoint with its weights stored in another way."""
    if kind == "safetensors":
        return checkpoint
    if kind == "fp8":
        return as_fp8(checkpoint, folder, BLOCKS)
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(checkpoint / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def extracted(folder: Path, forward: str, request: Request) -> Activations:
    """What ``request`` asks for, of a model that is ``resident`` or ``streamed``."""
    source, plan = planned(folder)
    given = (source, plan, load_tokenizer(folder), torch.float32, "cpu")
    model: Model = (
        stream_language_model(*given, 10**9)
        if forward == "streamed"
        else load_language_model(*given)
    )
    here = Origin(name="test")
    pairs, prose = Pairs(PAIRS, here, ""), Prose(PROSE, here, "")
    found, dropped = extract(model, request, pairs, prose, batch_size=3)
    assert dropped == 0
    return found


def fingerprint(name: str, x: Tensor) -> tuple[float, float]:
    """The norm of a tensor, and its product with cosines; of eigenvectors, whatever their sign."""
    x = x.double().flatten()
    x = x.abs() if name.startswith(("leading", "moments")) else x
    return float(x.norm()), float(x @ torch.cos(torch.arange(len(x), dtype=torch.float64)))


@pytest.mark.parametrize("forward", ["resident", "streamed"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("safetensors", name) for name in REQUESTS), ("pickle", "moments"), ("fp8", "moments")],
)
def test_activations_are_the_recorded_numbers(
    kind: str, name: str, forward: str, checkpoint: Path, tmp_path: Path
) -> None:
    source = stored_as(kind, checkpoint, tmp_path / "source")
    with using_cache(tmp_path / "cache"):
        seen = extracted(source, forward, REQUESTS[name]).tensors()
    found = {key: fingerprint(key, tensor) for key, tensor in seen.items()}
    recorded = RECORDED["fp8" if kind == "fp8" else name]
    assert found.keys() == recorded.keys()
    for key, (norm, product) in recorded.items():
        assert found[key] == pytest.approx((norm, product), rel=TOLERANCE, abs=TOLERANCE * norm), (
            f"{key} of request {name} is another: if the code that extracts activations was meant "
            "to change, raise EXTRACTION_VERSION and record these numbers anew; else it is a "
            f"mistake: {found}"
        )


@pytest.mark.parametrize("forward", ["resident", "streamed"])
@pytest.mark.parametrize("pooling", ["predicting", "mean"])
def test_one_pass_with_gradients_gives_the_bytes_of_three(
    forward: str, pooling: Pooling, checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three are run where the disk has no room for what tokens owe to each layer."""
    request = replace(REQUESTS["moments"], pooling=pooling)
    calls, runs = list[int](), list[int]()
    run = hooks.call

    def counted(module: Any, batch: Batch) -> Any:
        calls.append(batch.ids.numel())
        return run(module, batch)

    for model in (resident, streamed):
        monkeypatch.setattr(model, "call", counted)
    found = []
    for disk in (gradients._ON_DISK, 0):
        monkeypatch.setattr(gradients, "_ON_DISK", disk)
        calls.clear()
        with using_cache(tmp_path / "cache"):
            found.append(extracted(checkpoint, forward, request).tensors())
        runs.append(sum(calls))
    once, again = found
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert runs[1] > 1.5 * runs[0]


TOLERANCE = 1e-4
"""Relative to the norm of a tensor: other processors and libraries round otherwise."""

MOMENTS = {
    "toxic.1": ((9.98867, -1.974215), (10.09462, -1.385026)),
    "toxic.2": ((11.88334, 2.942765), (11.56326, 2.305961)),
    "neutral.1": ((6.758143, -2.830372), (6.863323, -2.663985)),
    "neutral.2": ((7.369259, 1.343658), (7.317012, 1.156626)),
    "leading.1": ((1.414214, -0.7045011), (1.414214, -0.7332731)),
    "worth.1": ((0.6417245, 0.7292915), (0.6215441, 0.7051826)),
    "leading.2": ((1.414214, -0.08350617), (1.414214, 0.07099876)),
    "worth.2": ((0.5032687, 0.5691959), (0.4840501, 0.5474611)),
    "second_moment": ((0.4241364, 0.008132508), (0.428475, 0.01011118)),
    "moments.directions": ((1.732051, 0.2427518), (1.732051, 0.434739)),
    "moments.words": ((2.945129, -1.883387), (2.813994, -1.67615)),
    "moments.weights": ((1.080123, 0.2455143), (1.080123, 0.2455143)),
    "moments.pairs": ((1.170792, -0.5147101), (1.24659, -0.04563198)),
    "moments.prose": ((1.818414, 0.428665), (1.848129, 0.608995)),
    "moments.tokens": ((34.4093, 35.12846), (34.4093, 35.12846)),
}
"""Of the request ``moments``: of weights stored as they are, and in FP8."""

RECORDED: dict[str, dict[str, tuple[float, float]]] = {
    "moments": {key: plain for key, (plain, _) in MOMENTS.items()},
    "fp8": {key: fp8 for key, (_, fp8) in MOMENTS.items()},
    "residual": {
        "toxic.0": (16.97561, -5.74136),
        "toxic.2": (27.42972, -6.129896),
        "neutral.0": (13.21545, -2.032241),
        "neutral.2": (21.51955, 3.605281),
        "causal.0": (2.596271, -0.8319254),
        "causal.2": (1.961508, -0.8273673),
    },
    "attention": {
        "toxic.0": (7.720825, -0.5670289),
        "toxic.2": (7.040936, -1.434554),
        "neutral.0": (7.495609, 1.490249),
        "neutral.2": (5.331268, -2.039915),
        "norms.0": (4.154865, 0.743938),
        "norms.2": (2.743517, -0.04156775),
    },
    "slopes": {
        "toxic.0": (3.999366, -2.960439),
        "toxic.2": (1.087076, 0.3822932),
        "neutral.0": (7.845914, -4.190527),
        "neutral.2": (2.495599, 2.084108),
        "norms.0": (4.224711, 4.652923),
        "norms.2": (2.764888, 3.016087),
    },
    "mean": {
        "toxic.2": (7.319435, 2.205149),
        "neutral.2": (7.369259, 1.343658),
        "second_moment": (0.4617967, -0.01615108),
    },
    "final": {
        "toxic.3": (5.560961, -1.441807),
        "neutral.3": (6.005143, -2.996388),
    },
}
