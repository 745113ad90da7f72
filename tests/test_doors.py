"""What other libraries do not document is known to one module each, and is as that module expects.

A failure here says which library has changed, and in which module that is to be mended.
"""

import ast
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]
from safetensors.torch import load_file
from tokenizers import models
from torch import Tensor

import converter
from converter.checkpoints.architectures import known_models
from converter.checkpoints.architectures.library import MetaTensor
from converter.checkpoints.formats.virtual import VirtualTensor
from converter.hub import limits
from converter.models.transformers_loader import (
    LazyTensor,
    Loading,
    PartLoader,
    from_tensors,
)
from tests.builders.meta import sentencepiece_model
from tests.builders.models import Checkpoints

DOORS = {
    "checkpoints/formats/meta_small_files.py": {"transformers.convert_slow_tokenizer"},
    "hub/limits.py": {"httpx2"},
    "checkpoints/architectures/library.py": {
        "transformers.conversion_mapping", "transformers.core_model_loading",
        "_experts_implementation", "_from_config", "_model_mapping",
    },
    "models/transformers_loader.py": {
        "transformers.core_model_loading", "transformers.modeling_utils", "_attn_implementation",
        "_get_dtype_plan",
    },
}  # fmt: skip
"""Module -> what it alone knows of other libraries: their modules, and names with an underscore."""

DOCUMENTED = {
    "gguf", "huggingface_hub", "huggingface_hub.errors", "huggingface_hub.hf_api",
    "huggingface_hub.utils", "lm_eval", "lm_eval.models.huggingface", "safetensors",
    "safetensors.numpy", "safetensors.torch", "tokenizers", "transformers", "transformers.utils",
}  # fmt: skip
"""Modules of these libraries that their documentation is about."""

LIBRARIES = {name.partition(".")[0] for name in DOCUMENTED} | {"hf_xet", "httpx2"}

HARMLESS = {"os._exit", "hashlib._Hash"}
"""The first is documented, the second is a name for type checkers."""


@contextmanager
def door(library: str, module: str) -> Iterator[None]:
    """Say whose door does not fit any more, whatever is raised."""
    try:
        yield
    except Exception as error:
        pytest.fail(
            f"{library} {version(library)} is not as converter/{module} expects, which alone knows "
            f"it and is to be adapted: {type(error).__name__}: {error}"
        )


def undocumented(source: str) -> set[str]:
    """What a module uses of other libraries that is not documented."""
    nodes = list(ast.walk(ast.parse(source)))
    modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    modules |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    names = {a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}
    names |= {
        n.attr
        for n in nodes
        if isinstance(n, ast.Attribute)
        and ast.unparse(n.value) not in ("self", "cls")
        and ast.unparse(n) not in HARMLESS
    }
    private = {n for n in names - own if n.startswith("_") and not n.startswith("__")}
    return private | {
        module
        for module in modules - DOCUMENTED
        if "._" in module or module.partition(".")[0] in LIBRARIES
    }


def test_what_is_not_documented_is_used_in_its_door_and_nowhere_else() -> None:
    package = Path(converter.__file__).parent
    used = {
        path.relative_to(package).as_posix(): undocumented(path.read_text())
        for path in package.rglob("*.py")
    }
    assert {module: names for module, names in used.items() if names} == DOORS, (
        "what a library does not document is used by one module, which DOORS names"
    )
    assert undocumented("from torch._C import x\nfrom torch import _y\nz._w()\n") == {
        "torch._C", "_y", "_w",
    }  # fmt: skip


LOADER = "models/transformers_loader.py"


def lazy(
    folder: Path, made: list[tuple[str, int]] | None = None
) -> dict[str, LazyTensor | MetaTensor]:
    """The tensors of a checkpoint; who makes one, and in which thread, is added to ``made``."""

    def recipe(name: str, tensor: Tensor) -> VirtualTensor:
        def make() -> Tensor:
            if made is not None:
                made.append((name, threading.get_ident()))
            return tensor

        return VirtualTensor(name, tensor.dtype, tuple(tensor.shape), make)

    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    return {name: LazyTensor(recipe(name, tensor)) for name, tensor in tensors.items()}


LOADED = ("AutoModelForCausalLM", Loading(), "cpu", torch.float32)


def skeleton(folder: Path) -> Any:
    """A model of which all weights are on the meta device."""
    shapes: dict[str, LazyTensor | MetaTensor] = {
        name: MetaTensor(tensor.tensor.dtype, tensor.tensor.shape)
        for name, tensor in lazy(folder).items()
        if isinstance(tensor, LazyTensor)
    }
    return from_tensors(folder, shapes, *LOADED)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "mixtral"])
def test_transformers_makes_a_tensor_by_slicing_it(kind: str, checkpoints: Checkpoints) -> None:
    from transformers import AutoModelForCausalLM

    folder, made = checkpoints(kind), list[tuple[str, int]]()
    expected: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with door("transformers", LOADER):
        model = from_tensors(folder, lazy(folder, made), *LOADED)
        weights = model.state_dict()
        assert {name for name, _ in made} == lazy(folder).keys()
        assert weights.keys() == expected.state_dict().keys()
        assert all(torch.equal(weights[k], x) for k, x in expected.state_dict().items())
        assert all(weight.is_meta for weight in skeleton(folder).state_dict().values())


def test_transformers_loads_a_part_of_a_model_by_its_rules(checkpoints: Checkpoints) -> None:
    """A layer of a mixture, whose experts are fused: it alone, in this thread, one by one."""
    folder, made = checkpoints("mixtral"), list[tuple[str, int]]()
    with door("transformers", LOADER):
        whole = from_tensors(folder, lazy(folder), *LOADED).state_dict()
        model = skeleton(folder)
        loader = PartLoader(model, torch.float32, "cpu")
        weights = {name: loader.weight_of(name) for name in lazy(folder)}
        assert set(weights.values()) <= whole.keys()
        assert loader.weight_of("nothing.weight") is None
        inside = "model.layers.1."
        part = {n: t for n, t in lazy(folder, made).items() if str(weights[n]).startswith(inside)}
        assert any(name not in whole for name in part), "no tensor of the layer is fused"
        names = set(part)
        assert loader.load(dict(part)) == []
        assert {name for name, _ in made} == names
        assert {thread for _, thread in made} == {threading.get_ident()}
        for key, weight in model.state_dict().items():
            assert weight.is_meta != key.startswith(inside), key
            assert weight.is_meta or torch.equal(weight, whole[key]), key


def test_transformers_says_which_tensors_do_not_fit(checkpoints: Checkpoints) -> None:
    folder = checkpoints("llama")
    with door("transformers", LOADER):
        loader = PartLoader(skeleton(folder), torch.float32, "cpu")
        name = "model.layers.1.mlp.down_proj.weight"
        wrong = VirtualTensor(name, torch.float32, (1, 2), lambda: torch.zeros(1, 2))
        problems = loader.load({name: LazyTensor(wrong)})
        assert len(problems) == 1
        assert "down_proj" in problems[0]


def test_the_lists_of_models_read_from_files_are_those_of_transformers() -> None:
    from transformers.models.auto import configuration_auto, modeling_auto

    auto: Any = modeling_auto
    configs: Any = configuration_auto
    with door("transformers", "checkpoints/architectures/known_models.py"):
        assert known_models.config_types() == dict(configs.CONFIG_MAPPING_NAMES)
        for auto_class, name in known_models.LISTS.items():
            assert known_models.model_types(auto_class) == dict(getattr(auto, name))
            assert known_models.knows(next(iter(known_models.model_types(auto_class))))
        assert known_models.version() == transformers.__version__
        assert "MODEL_FOR_CTC_MAPPING_NAMES" in known_models.lists_of("wav2vec2")
        assert not known_models.knows("nonesuch")
        assert known_models.continues_text("llama")
        assert not known_models.continues_text("t5")


def test_the_client_of_the_hub_is_one_of_httpx2() -> None:
    with door("huggingface_hub", "hub/limits.py"):
        assert isinstance(get_session(), httpx2.Client)
        assert issubclass(HfHubHTTPError, httpx2.HTTPError)
        limits.guard_session()
        hooks = list(get_session().event_hooks["response"])
        limits.guard_session()
        assert get_session().event_hooks["response"] == hooks
        assert len(hooks) == 1


def test_an_answer_is_watched_and_a_range_is_read_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[int] = []

    class Endless(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for number in range(1000):
                sent.append(number)
                yield bytes([number % 256]) * 100

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200 if "whole" in request.url.path else 206, stream=Endless())

    client = httpx2.Client(transport=httpx2.MockTransport(answer))
    monkeypatch.setattr(limits, "get_session", lambda: client)
    monkeypatch.setattr(limits, "MAX_ANSWER", 1000)
    with door("httpx2", "hub/limits.py"):
        limits.guard_session()
        with pytest.raises(limits.AnswerError, match="an answer of more than 1,000 bytes"):
            client.get("https://hub.test/api/models/someone/tiny")
        assert len(sent) == 11
        sent.clear()
        assert limits.read_range("https://hub.test/part", 50, 160) == bytes(100) + b"\1" * 10
        assert len(sent) == 2
        sent.clear()
        found = limits.read_range("https://hub.test/whole", 350, 420)
        assert found == b"\3" * 50 + b"\4" * 20
        assert len(sent) == 5


def test_tokenizers_of_meta_are_converted_by_transformers(tmp_path: Path) -> None:
    path, asked = tmp_path / "tokenizer.model", list[object]()
    path.write_bytes(sentencepiece_model())
    with door("transformers", "checkpoints/formats/meta_small_files.py"):
        from transformers.convert_slow_tokenizer import SentencePieceExtractor, TikTokenConverter

        extractor: Any = SentencePieceExtractor(str(path))
        text, spec = extractor.proto.normalizer_spec, extractor.proto.trainer_spec
        assert spec.model_type == spec.BPE
        assert spec.byte_fallback
        assert text.add_dummy_prefix
        assert not text.precompiled_charsmap
        made = extractor.extract(models.BPE)
        assert {"vocab", "merges", "additional_special_tokens"} <= made.keys()
        reader: Any = TikTokenConverter
        converter = reader(extra_special_tokens=["<|a|>", "<|b|>"])
        ranks = {bytes([byte]): byte for byte in range(256)}

        def read(file: object) -> dict[bytes, int]:
            asked.append(file)
            return ranks

        converter.load_tiktoken_bpe = read
        core = converter.converted()
        assert len(asked) == 1
        assert core.get_vocab_size() == len(ranks) + 2
