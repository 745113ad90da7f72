"""Meta's layout: translated, it computes what Meta's code computes, and damage is named."""

import base64
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from converter.checkpoints.formats import meta as native
from converter.checkpoints.formats import meta_small_files as native_small
from converter.checkpoints.formats.meta import check_md5, read_native
from converter.checkpoints.formats.virtual import (
    MAX_SHARD,
    Translated,
    VirtualFile,
    VirtualShard,
    split_shards,
)
from converter.checkpoints.names import is_native
from converter.checkpoints.resolve import resolve
from converter.errors import CheckpointError, DestinationError, SourceError
from converter.runtime.cache import using_cache
from tests.builders.errors import refused
from tests.builders.hostile import Damage, Evil, params, written
from tests.builders.meta import (
    Reference,
    md5,
    rank_file,
    sentencepiece_model,
    write_mistral,
    write_native,
)
from tests.builders.models import tiny_args, tiny_tokenizer

LLAMA3: dict[str, Any] = {"rope_theta": 500000.0, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3}
KINDS: dict[str, dict[str, Any]] = {
    "one part": {},
    "two parts": {"parts": 2},
    "grouped": {"n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "dtype": torch.bfloat16},
    "grouped, two parts": {"parts": 2, "n_kv_heads": 2},
    "Code Llama": {"rope_theta": 1e6},
    "Llama 3": {"parts": 2, **LLAMA3},
    "Llama 3.1": {"use_scaled_rope": True, "dtype": torch.bfloat16, **LLAMA3},
    "tied": {"use_scaled_rope": True, "tied": "missing", **LLAMA3},
    "tied, named": {"use_scaled_rope": True, "tied": "shared", "parts": 2, **LLAMA3},
}
FAR = 200
"""Between two tokens, so that 48 of them reach beyond the length that Llama 3 was trained on."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[Path]:
    """The cache folder of each test, not made yet."""
    with using_cache(tmp_path / "cache"):
        yield tmp_path / "cache"


def materialize(translated: Translated, folder: Path) -> Path:
    """The checkpoint that a translation stands for, as files."""
    shutil.copytree(translated.folder, folder)
    for name, recipes in translated.shards.items():
        (folder / name).write_bytes(VirtualShard(VirtualFile(recipes)).read())
    return folder


def translated_logits(folder: Path, ids: Tensor, positions: Tensor) -> Tensor:
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    every = torch.ones_like(ids)[None]  # without it, transformers takes gaps for ends of texts
    with torch.inference_mode():
        out = model(ids[None], attention_mask=every, position_ids=positions[None])
    return torch.as_tensor(out.logits[0])


def far_apart() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 450, (48,), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(48) * FAR


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_metas_code(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = write_native(source, **KINDS[kind])
    monkeypatch.setattr(native, "split_shards", lambda r: split_shards(r, 20000))
    folder = materialize(read_native(source), tmp_path / "out")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ids, positions = far_apart()
    wanted = reference.logits(ids, positions)
    found = translated_logits(folder, ids, positions)
    assert wanted.std() > 0.5
    assert (found - wanted).abs().max() < 1e-5
    plain = Reference(reference.weights, reference.params | {"use_scaled_rope": False})
    if KINDS[kind].get("use_scaled_rope"):  # here it matters
        assert (plain.logits(ids, positions) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("tied", ["", "shared"])
def test_virtual_shards_are_files_of_safetensors(tied: str, source: Path, tmp_path: Path) -> None:
    write_native(source, parts=2, tied=tied, **LLAMA3)
    translated = read_native(source)
    folder = materialize(translated, tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        recipes = translated.shards["model.safetensors"]
        names = [recipe.name for recipe in recipes]
        assert set(names) == set(file.keys())
        for recipe in recipes:
            assert torch.equal(file.get_tensor(recipe.name), recipe.make())
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == ("model.norm.weight" if tied else "lm_head.weight")


def test_a_recipe_reads_one_tensor_and_no_other(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = native.half_split

    def counted(weight: Tensor, heads: int) -> Tensor:
        made.append(heads)
        return real(weight, heads)

    write_native(source, n_kv_heads=2)
    monkeypatch.setattr(native, "half_split", counted)
    recipes = {r.name: r for r in read_native(source).shards["model.safetensors"]}
    assert made == []
    recipes["model.layers.1.self_attn.k_proj.weight"].make()
    assert made == [2]
    plain = recipes["model.layers.1.self_attn.v_proj.weight"]
    assert plain.make().data_ptr() == plain.make().data_ptr()  # of the mapped file, not a copy


def test_parts_are_mapped_and_run_no_code(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    real = torch.load

    def load(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return real(*args, **options)

    write_native(source, parts=2)
    monkeypatch.setattr(torch, "load", load)
    read_native(source)
    assert [(options["mmap"], options["weights_only"]) for options in asked] == [(True, True)] * 2


@pytest.mark.parametrize(
    "params", [{}, {"head_dim": 8, "sliding_window": 4}, {"rope_theta": 1e6, "max_seq_len": 99}]
)
def test_mistrals_own_layout_is_that_of_transformers(
    params: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    model = write_mistral(source, **params)
    found = resolve(str(source))
    folder = materialize(read_native(source), tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(loaded) is type(model)
    ids = torch.randint(0, 600, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    same = ("sliding_window", "head_dim", "rope_parameters", "rms_norm_eps")
    assert all(getattr(loaded.config, key) == getattr(model.config, key) for key in same)
    assert loaded.config.max_position_embeddings == params.get("max_seq_len", 32768)
    assert found.left_out == ()
    assert [path.name for path in found.originals] == ["consolidated.safetensors", "params.json"]
    assert AutoTokenizer.from_pretrained(folder).is_fast


@pytest.mark.parametrize("own", [False, True])
def test_a_chat_template_beside_the_weights_goes_along(
    own: bool, cli: Callable[..., Any], source: Path, tmp_path: Path
) -> None:
    write_native(source)
    (source / "chat_template.jinja").write_text("{{ messages }}\n")
    if own:
        tiny_tokenizer().save_pretrained(source)
    options = tiny_args(layers="0-1", rank="2")
    cli("convert", source, tmp_path / "out", "--num-pairs", 120, *options, code=0)
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}\n"
    if not own:
        made = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
        assert made["chat_template"] == "{{ messages }}\n"


def test_a_mistral_in_its_own_layout_is_converted(
    source: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    write_mistral(source)
    options = tiny_args(layers="0-1", rank=2)
    result = cli("convert", source, tmp_path / "out", "--num-pairs", 32, *options)
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "mistral"
    assert cli("verify", tmp_path / "out", "--source", source).exit_code == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("moe", {"num_experts": 8}), ("vision_encoder", {"dim": 1}), ("quantization", {"q": "fp8"}),
     ("use_biases", True), ("llama_4_scaling", {"b": 1}), ("causal", False), ("new_key", 3)],
)  # fmt: skip
def test_another_model_of_mistrals_is_refused_by_its_key(
    key: str, value: object, source: Path
) -> None:
    write_mistral(source, **{key: value})
    with refused(CheckpointError, what=f"params.json has {key}, which a dense text model ... not"):
        resolve(str(source))


def test_a_tekken_tokenizer_is_named(source: Path) -> None:
    write_mistral(source, use_biases=False, sliding_window=None)
    (source / "tokenizer.model.v3").rename(source / "tekken.json")
    with refused(CheckpointError, found="tekken.json, which is not read", hint="get ..."):
        resolve(str(source))


def test_what_is_native() -> None:
    assert is_native(["params.json", "consolidated.safetensors"])
    names = ["params.json", "consolidated.00.pth", "tokenizer.model"]
    assert is_native(names)
    assert not is_native([*names, "config.json"])
    assert not is_native(names[1:])
    assert not is_native([names[0], "original/consolidated.00.pth"])


SEVEN_B = {
    "dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05,
    "vocab_size": -1,
}  # fmt: skip
THREE_8B = SEVEN_B | {
    "n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "rope_theta": 500000.0,
    "vocab_size": 128256,
}  # fmt: skip
SMALL = THREE_8B | {
    "dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 256,
    "use_scaled_rope": True,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], int, int, float | None]] = {
    "Llama 1 7B": (SEVEN_B | {"norm_eps": 1e-06}, 11008, 2048, None),
    "Llama 1 65B": (SEVEN_B | {"dim": 8192, "n_heads": 64, "n_layers": 80}, 22016, 2048, None),
    "Llama 2 7B": (SEVEN_B, 11008, 4096, None),
    "Llama 2 13B": (SEVEN_B | {"dim": 5120, "n_heads": 40, "n_layers": 40}, 13824, 4096, None),
    "Llama 2 70B": (
        SEVEN_B | {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64,
                   "n_kv_heads": 8, "n_layers": 80}, 28672, 4096, None,
    ),
    "Code Llama 7B": (SEVEN_B | {"rope_theta": 1000000}, 11008, 16384, None),
    "Llama 3 8B": (THREE_8B, 14336, 8192, None),
    "Llama 3.1 8B": (THREE_8B | {"use_scaled_rope": True}, 14336, 131072, 8.0),
    "Llama 3.2 1B": (SMALL, 8192, 131072, 32.0),
    "Llama 3.2 3B": (
        SMALL | {"dim": 3072, "n_heads": 24, "n_layers": 28, "ffn_dim_multiplier": 1.0},
        8192, 131072, 32.0,
    ),
}  # fmt: skip
"""params.json as published, the width of the FFN, positions, and the factor of rotary scaling."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_configs_of_published_models(model: str, tmp_path: Path) -> None:
    params, ffn, positions, factor = PUBLISHED[model]
    (tmp_path / "params.json").write_text(json.dumps(params))
    read = native_small.read_params(tmp_path / "params.json")
    config = native_small.config_of(read, 32000, torch.float16, False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded: Any = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.intermediate_size, loaded.max_position_embeddings) == (ffn, positions)
    assert loaded.rope_parameters["rope_theta"] == config["rope_theta"]
    assert config["rope_theta"] == params.get("rope_theta", 10000)
    assert loaded.rope_parameters.get("factor") == factor
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    assert LlamaConfig.from_dict(old).rope_parameters == loaded.rope_parameters
    assert loaded.dtype == torch.float16


def test_small_files_go_along_and_are_kept(source: Path, cache: Path) -> None:
    write_native(source, parts=2)
    first = read_native(source)
    assert {path.name for path in first.folder.iterdir()} == {
        "LICENSE.txt", "README.md", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip
    names = [path.name for path in first.originals]
    assert names == ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    config = json.loads((first.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (1, 2, 600)
    assert config["tie_word_embeddings"] is False
    before = (first.folder / "config.json").stat().st_mtime_ns
    again = read_native(source)
    assert again.folder == first.folder
    assert (again.folder / "config.json").stat().st_mtime_ns == before
    (source / "LICENSE.txt").write_text("Another one.\n")
    assert read_native(source).folder != first.folder
    assert not list((cache / "native").glob(".*"))  # nothing temporary is left


def test_an_index_is_written_for_several_shards(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_native(source)
    single = read_native(source)
    assert sum(recipe.nbytes for recipe in single.shards["model.safetensors"]) < MAX_SHARD
    monkeypatch.setattr(native, "split_shards", lambda r: split_shards(r, 20000))
    sharded = read_native(source)
    index = json.loads((sharded.folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == sharded.weight_map
    assert sharded.folder != single.folder


TEXTS = [
    "Hello world", " one space before", "  two  spaces   three", "naïve café, 日本語 🙂", "e\u0301",
    "a\n\n  line\ttab\r\n", "12345 it's  WE'LL", "", " ", "trailing ", "no\u00a0break", "▁x",
    "don't you'd  I'm\u2028", "x" * 300,
]  # fmt: skip


def test_sentencepiece_is_encoded_as_it_does_itself(source: Path) -> None:
    import sentencepiece

    write_native(source)
    own: Any = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    tokenizer: Any = AutoTokenizer.from_pretrained(read_native(source).folder)
    assert tokenizer.is_fast
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == own.encode(text, add_bos=True), text
        ids = own.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == own.decode(ids)
    assert set(tokenizer("Hello")) == {"input_ids", "attention_mask"}
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]


@pytest.mark.parametrize("scaled", [False, True])
def test_ranks_are_encoded_as_by_tiktoken(scaled: bool, source: Path) -> None:
    import tiktoken

    lines = [line.split() for line in rank_file().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    names = native_small.special_tokens(scaled)
    special = {name: len(ranks) + number for number, name in enumerate(names)}
    own = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    write_native(source, use_scaled_rope=scaled, **LLAMA3)
    folder = read_native(source).folder
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    begin = len(ranks)
    for text in TEXTS:
        ids = own.encode(text)
        assert tokenizer(text)["input_ids"] == [begin, *ids], text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    turn = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    ids = own.encode(turn, allowed_special="all")
    assert tokenizer(turn, add_special_tokens=False)["input_ids"] == ids
    places = [0, 1, 4, 6, 7, 8, 9, 255]
    assert [names[place] for place in places] == [
        "<|begin_of_text|>", "<|end_of_text|>",
        "<|finetune_right_pad_id|>" if scaled else "<|reserved_special_token_2|>",
        "<|start_header_id|>", "<|end_header_id|>",
        "<|eom_id|>" if scaled else "<|reserved_special_token_4|>", "<|eot_id|>",
        f"<|reserved_special_token_{247 if scaled else 250}|>",
    ]  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (begin, begin + 1)
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [begin + place for place in ([1, 8, 9] if scaled else [1, 9])]


def test_a_tokenizer_that_is_there_is_taken(source: Path, tmp_path: Path) -> None:
    write_native(tmp_path / "other", **LLAMA3)
    other = read_native(tmp_path / "other").folder
    write_native(source, **LLAMA3)
    (source / "tokenizer.model").unlink()
    config = json.loads((other / "tokenizer_config.json").read_text()) | {"eos_token": "<|eot_id|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(other / "tokenizer.json", source)
    folder = read_native(source).folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    begin = len(rank_file().splitlines())
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == begin + 9


def test_a_missing_package_is_named(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_native(source)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with refused(SourceError, hint="pip install 'gloss-convert[native]'"):
        read_native(source)
    assert not list((cache / "native").iterdir())


def test_md5(source: Path) -> None:
    write_native(source, parts=2)
    names = ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
    check_md5(source, [*names, "LICENSE.txt"], md5)
    data = bytearray((source / names[1]).read_bytes())
    data[len(data) // 2] ^= 1
    (source / names[1]).write_bytes(data)
    check_md5(source, [names[0]], md5)
    with refused(
        CheckpointError,
        what=f"{names[1]} is damaged: its md5 is not that of the checklist",
        found=md5(source / names[1]),
    ) as caught:
        check_md5(source, names, md5)
    assert caught.value.expected != caught.value.found
    (source / "checklist.chk").write_text("no sums\n")
    with refused(CheckpointError, what="checklist.chk is not a list of md5 sums"):
        check_md5(source, names, md5)


def test_md5_of_files_that_are_not_there(source: Path) -> None:
    write_native(source)
    with (source / "checklist.chk").open("a") as file:
        file.write("0" * 32 + " *./NOTICE\n\n")
    check_md5(source, ["consolidated.00.pth", "NOTICE"], md5)
    with (source / "checklist.chk").open("a") as file:
        file.write("0" * 32 + "  consolidated.01.pth\n")
    with refused(CheckpointError, what="consolidated.01.pth is missing"):
        check_md5(source, ["consolidated.00.pth"], md5)


def resave(part: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = torch.load(part, weights_only=True)
    change(tensors)
    torch.save(tensors, part)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without(*names: str) -> Damage:
    def damage(source: Path) -> None:
        for name in names:
            (source / name).unlink()

    return damage


def stored(content: object) -> Damage:
    """The first part is a file of PyTorch that holds this."""
    return lambda source: torch.save(content, source / FIRST)


def first(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The tensors of the first part are changed."""
    return lambda source: resave(source / FIRST, change)


FIRST, SECOND = "consolidated.00.pth", "consolidated.01.pth"
WQ, WQ_2 = "layers.0.attention.wq.weight", "layers.2.attention.wq.weight"
WK, V = "layers.0.attention.wk.weight", "layers.1.attention.wv.weight"
UNREADABLE, UNUSABLE = f"{FIRST} cannot be read as a PyTorch file", "params.json has no usable"
NO_JSON, NO_OBJECT = "params.json cannot be read as JSON", "params.json is not a JSON object"
CONTRADICTS, ITSELF = "contradicts params.json", "params.json contradicts itself"
TWO_PARTS = {"expected": "2 parts of the weights"}
FAULTS: dict[str, tuple[Damage, str, dict[str, str]]] = {
    "no params": (without("params.json"), NO_JSON, {"found": "No such file or directory"}),
    "params not JSON": (written("params.json", "{"), NO_JSON, {}),
    "params a list": (written("params.json", "[]"), NO_OBJECT, {"found": "list"}),
    "params nested": (params(model="x"), NO_OBJECT, {"found": "str"}),
    "endless": (params(n_layers=10**13), f"{UNUSABLE} n_layers", {}),
    "negative": (params(n_layers=-1), f"{UNUSABLE} n_layers", {}),
    "many layers": (params(n_layers=10**11), f"{FIRST} has no tensor {WQ_2}", {}),
    "no dim": (params(dim=None), f"{UNUSABLE} dim", {"found": "None"}),
    "odd layers": (
        params(n_layers=2.5), f"{UNUSABLE} n_layers", {"expected": "...", "found": "2.5"},
    ),
    "text": (params(norm_eps="1e-5"), f"{UNUSABLE} norm_eps", {"found": "'1e-5'"}),
    "infinite": (
        params(ffn_dim_multiplier=1e999), f"{UNUSABLE} ffn_dim_multiplier", {"found": "inf"},
    ),
    "heads": (params(n_heads=5), ITSELF, {"found": "dim 32, n_heads 5, n_kv_heads 5"}),
    "groups": (params(n_kv_heads=3), ITSELF, {"found": "dim 32, n_heads 4, n_kv_heads 3"}),
    "other dim": (params(dim=64), f"tensor tok_embeddings.weight {CONTRADICTS}", {}),
    "other FFN": (
        params(ffn_dim_multiplier=2), f"tensor layers.0.feed_forward.w1.weight {CONTRADICTS}",
        {"expected": "[176, 32] from 2 parts", "found": "[48, 32] in each"},
    ),
    "other vocabulary": (params(vocab_size=700), f"tensor tok_embeddings.weight {CONTRADICTS}", {}),
    "other groups": (params(n_kv_heads=2), f"tensor {WK} {CONTRADICTS}", {}),
    "more layers": (params(n_layers=3), f"{FIRST} has no tensor {WQ_2}", {}),
    "fewer layers": (
        params(n_layers=1), f"{FIRST} has a tensor layers.1.attention.wq.weight, ...", {},
    ),
    "gap": (without(FIRST), f"{FIRST} is missing", TWO_PARTS),
    "last part": (without(SECOND), f"{SECOND} is missing", TWO_PARTS),
    "last part, not listed": (
        without(SECOND, "checklist.chk"), f"tensor tok_embeddings.weight {CONTRADICTS}",
        {"hint": "one of them is of another model, or a part is missing"},
    ),
    "truncated": (lambda source: truncate(source / FIRST), UNREADABLE, {}),
    "empty": (written(FIRST, ""), f"{FIRST} is empty", {}),
    "pointer": (
        written(FIRST, "version https://git-lfs.github.com/spec/v1\n"),
        f"{FIRST} is a pointer of git-lfs, not the file itself", {},
    ),
    "pickle": (lambda s: (s / FIRST).write_bytes(pickle.dumps({})), UNREADABLE, {}),
    "code": (
        stored({"x": Evil()}), "... holds more than tensors, and reading it would execute code", {},
    ),
    "not a table": (stored(torch.ones(2)), f"{FIRST} is not a state_dict", {"found": "Tensor"}),
    "number": (stored({"x": 1}), f"{FIRST} is not a state_dict", {"found": "'x': int"}),
    "missing tensor": (first(lambda t: t.pop(WQ)), f"{FIRST} has no tensor {WQ}", {}),
    "output in one": (
        first(lambda t: t.pop("output.weight")), f"{FIRST} has no tensor output.weight", {},
    ),
    "no embedding": (
        first(lambda t: t.pop("tok_embeddings.weight")),
        f"{FIRST} has no tensor tok_embeddings.weight", {},
    ),
    "unknown tensor": (
        first(lambda t: t.update({"lora.A": t[WQ]})), f"{FIRST} has a tensor lora.A, ...", {},
    ),
    "parts differ": (
        first(lambda t: t.update({V: t[V][:8]})),
        f"{SECOND}: tensor {V} is not like that of the other parts", {},
    ),
    "eight bits": (
        first(lambda t: t.update({V: t[V].to(torch.float8_e4m3fn)})),
        f"{FIRST}: tensor {V} cannot be translated",
        {"expected": "...", "found": "torch.float8_e4m3fn"},
    ),
    "no tokenizer": (without("tokenizer.model"), "source has no tokenizer", {}),
    "broken tokenizer": (
        lambda s: (s / "tokenizer.model").write_bytes(b"\xff" * 99),
        "tokenizer.model cannot be read", {},
    ),
    "broken ranks": (
        written("tokenizer.model", "QQ== 0\nQg== 2\n"),
        "tokenizer.model cannot be read", {"found": "the ranks have gaps"},
    ),
    "broken tokenizer.json": (
        written("tokenizer.json", "{"), "tokenizer.json cannot be read", {},
    ),
    "other tokenizer": (
        lambda s: (s / "tokenizer.model").write_bytes(rank_file()),
        "tokenizer.model does not belong to the model",
        {"expected": "at most 600 tokens", "found": "712"},
    ),
}  # fmt: skip
"""What is done to two parts, and what is said of it: ``what``, and other fields."""


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_named_in_a_sentence(fault: str, source: Path, cache: Path) -> None:
    damage, what, fields = FAULTS[fault]
    write_native(source, parts=2)
    damage(source)
    with refused(CheckpointError, what=what, **fields) as caught:
        read_native(source)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert not list((cache / "native").rglob("*"))


def test_a_cache_that_cannot_be_written_is_not_the_sources_fault(source: Path, cache: Path) -> None:
    write_native(source)
    cache.write_text("")
    with refused(DestinationError, what="the cache ... cannot be written"):
        read_native(source)
