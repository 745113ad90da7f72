"""Hostile and broken sources, made in code: what is done to a good one, and what must be said.

A case is a damage to a folder, an exit code and a part of the sentence. ``tests/test_hostile.py``
runs them all.
"""

import io
import json
import os
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SINGLE, BIN = "model.safetensors", "pytorch_model.bin"

Damage = Callable[[Path], object]
Case = tuple[Damage, int, str]


def header(raw: bytes, data: int = 0, length: int | None = None) -> Damage:
    """The last shard has this header, and so many bytes after it."""

    def damage(folder: Path) -> None:
        shard = max(folder.glob("model-*.safetensors"))
        said = len(raw) if length is None else length
        shard.write_bytes(said.to_bytes(8, "little") + raw + bytes(data))

    return damage


def entries(data: int = 8, **changes: Any) -> Damage:
    """The last shard has one tensor ``a`` of 8 bytes, but for these changes of its entry."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return header(json.dumps({"a": entry}).encode(), data)


ONE = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
NO_ENTRY = "without dtype, shape or offsets"
NOT_JSON = "the header is not JSON"

HEADERS: dict[str, Case] = {
    "length of 2^63": (header(b"{}", 0, 1 << 63), 4, "is truncated or not a safetensors file"),
    "length of 2^64 - 1": (header(b"{}", 0, (1 << 64) - 1), 4, "is truncated or not"),
    "length beyond the limit": (header(b"{}", 0, 100_000_001), 4, "is truncated or not"),
    "length of one byte more": (header(b"{}", 0, 3), 4, "is truncated or not"),
    "length of zero": (header(b"", 8), 4, "is a file of zero bytes"),
    "list": (header(b"[]"), 4, "is not a JSON object"),
    "space first": (header(b" {}"), 4, "is not a JSON object"),
    "byte order mark": (header(b"\xef\xbb\xbf{}"), 4, "is not a JSON object"),
    "zeros": (header(bytes(64)), 4, "is not a JSON object"),
    "open": (header(b"{"), 4, NOT_JSON),
    "two objects": (header(b"{}{}"), 4, NOT_JSON),
    "something after it": (header(b'{"a":' + ONE + b"}\0", 8), 4, NOT_JSON),
    "comma at the end": (header(b'{"a":' + ONE + b",}", 8), 4, NOT_JSON),
    "bad UTF-8 in a name": (header(b'{"\xff":' + ONE + b"}", 8), 4, "invalid start byte"),
    "half of a pair in a name": (header(b'{"\\ud800":' + ONE + b"}", 8), 4, "surrogates"),
    "bad escape in a name": (header(b'{"\\x":' + ONE + b"}", 8), 4, "Invalid \\escape"),
    "bad UTF-8 in the metadata": (header(b'{"__metadata__":{"a":"\xff"}}'), 4, "invalid start"),
    "metadata that is a list": (header(b'{"__metadata__":[]}'), 4, NOT_JSON),
    "metadata of numbers": (header(b'{"__metadata__":{"a":1}}'), 4, NOT_JSON),
    "metadata in metadata": (header(b'{"__metadata__":{"a":{}}}'), 4, NOT_JSON),
    "metadata twice": (header(b'{"__metadata__":{},"__metadata__":{}}'), 4, "a key twice"),
    "tensor twice": (header(b'{"a":' + ONE + b',"a":' + ONE + b"}", 8), 4, "a key twice"),
    "tensor twice, spelled otherwise": (
        header(b'{"a":' + ONE + b',"\\u0061":' + ONE + b"}", 8), 4, "a key twice",
    ),
    "dtype twice": (
        header(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
        4, NO_ENTRY,
    ),
    "200,000 lists in one another": (header(b"[" * 200_000), 4, "is not a JSON object"),
    "200,000 objects in one another": (header(b'{"a":' * 200_000), 4, NO_ENTRY),
    "1,000 lists in a shape": (
        header(b'{"a":{"shape":' + b"[" * 1000 + b"]" * 1000 + b"}}"), 4, NO_ENTRY
    ),
    "overlap": (
        header(b'{"a":%s,"b":%s}' % (ONE, ONE), 16), 4, "leaves a hole or an overlap"
    ),
    "hole": (entries(data_offsets=[8, 16], data=16), 4, "leaves a hole or an overlap"),
    "longer than its shape": (entries(data_offsets=[0, 9], data=9), 4, "has the wrong length"),
    "no offsets": (header(b'{"a":{"dtype":"F32","shape":[2]}}', 8), 4, NO_ENTRY),
    "end before start": (entries(data_offsets=[8, 0]), 4, "leaves a hole or an overlap"),
    "beyond the file": (entries(shape=[2**40], data_offsets=[0, 2**42]), 4, "is truncated or has"),
    "bytes after the last": (entries(data=9), 4, "is truncated or has bytes after"),
    "data missing": (entries(data=7), 4, "is truncated or has bytes after"),
    "negative offset": (entries(data_offsets=[-8, 0]), 4, NO_ENTRY),
    "offset beyond 63 bits": (entries(data_offsets=[0, 1 << 63]), 4, NO_ENTRY),
    "offset as a float": (entries(data_offsets=[0, 8.0]), 4, NO_ENTRY),
    "offset as infinity": (entries(data_offsets=[0, float("inf")]), 4, NO_ENTRY),
    "offset as a truth": (entries(data_offsets=[False, 8]), 4, NO_ENTRY),
    "three offsets": (entries(data_offsets=[0, 8, 8]), 4, NO_ENTRY),
    "offsets as text": (entries(data_offsets="08"), 4, NO_ENTRY),
    "offset of 4,000 digits": (
        header(b'{"a":{"data_offsets":[0,%s]}}' % (b"9" * 4000)), 4, NO_ENTRY,
    ),
    "negative axes": (entries(shape=[-1, -2]), 4, NO_ENTRY),
    "product that overflows": (entries(shape=[1 << 32, 1 << 32]), 4, "has the wrong length"),
    "product that overflows to 2": (entries(shape=[(1 << 63) - 1, 2, 2]), 4, "the wrong length"),
    "overflow hidden by a zero": (
        entries(0, shape=[1 << 62, 1 << 62, 0], data_offsets=[0, 0]), 4, "the wrong length",
    ),
    "65 axes": (entries(shape=[1] * 64 + [2]), 4, NO_ENTRY),
    "shape as text": (entries(shape="2"), 4, NO_ENTRY),
    "shape of lists": (entries(shape=[[2]]), 4, NO_ENTRY),
    "shape as a float": (entries(shape=[2.0]), 4, NO_ENTRY),
    "shape of 400 digits": (entries(shape=[10**400]), 4, NO_ENTRY),
    "shape as NaN": (entries(shape=[float("nan")]), 4, NO_ENTRY),
    "dtype as a number": (entries(dtype=32), 4, NO_ENTRY),
    "dtype as a list": (entries(dtype=["F32"]), 4, NO_ENTRY),
    "entry as a number": (header(b'{"a":3}', 8), 4, NO_ENTRY),
    "entry as null": (header(b'{"a":null}'), 4, NO_ENTRY),
    "entry of 10,000 bytes": (entries(more="x" * 10_000), 4, NO_ENTRY),
    "name of 5,000 bytes": (header(b'{"%s":%s}' % (b"a" * 5000, ONE), 8), 4, "not plain text"),
    "name with NUL": (header(b'{"a\\u0000b":' + ONE + b"}", 8), 4, "a\\x00b is not plain text"),
    "name with a new line": (header(b'{"a\\nb":' + ONE + b"}", 8), 4, "is not plain text"),
    "name that steers a terminal": (
        header(b'{"\\u001b[2Ja":' + ONE + b"}", 8), 4, "tensor \\x1b[2Ja is not plain text",
    ),
    "name from right to left": (
        header('{"a\u202eb":'.encode() + ONE + b"}", 8), 4, "tensor a\\u202eb is not plain",
    ),
    "name of nothing": (header(b'{"":' + ONE + b"}", 8), 4, "is not plain text"),
    "unknown dtype": (entries(dtype="F3"), 4, ""),
    "pointer of git-lfs": (
        lambda f: max(f.glob("*.safetensors")).write_text("version https://git-lfs.github.com/x\n"),
        4, "is a pointer of git-lfs",
    ),
    "empty file": (lambda f: max(f.glob("*.safetensors")).write_bytes(b""), 4, "is empty"),
    "7 bytes": (lambda f: max(f.glob("*.safetensors")).write_bytes(b"7" * 7), 4, "is truncated or"),
}  # fmt: skip


def written(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def folder_for(pattern: str) -> Damage:
    """A folder is in the place of the last file of this kind."""

    def damage(folder: Path) -> None:
        path = max(folder.glob(pattern))
        path.unlink()
        path.mkdir()

    return damage


def index(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The weight map of the index is changed."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / INDEX).read_text())
        change(found["weight_map"])
        (folder / INDEX).write_text(json.dumps(found))

    return damage


def placed(shard: object) -> Damage:
    """The index places a tensor in this file, which is there if it can be."""

    def damage(folder: Path) -> None:
        first = min(folder.glob("model-*.safetensors"))
        if isinstance(shard, str) and "/" not in shard and shard.isprintable() and shard:
            place = folder / shard
            place.parent.mkdir(exist_ok=True, parents=True)
            if not place.exists():
                place.write_bytes(first.read_bytes())
        index(lambda m: m.update({next(iter(m)): shard}))(folder)

    return damage


OUTSIDE, NO_SHARD = "outside the folder", "in a file that cannot be a shard"

INDEXES: dict[str, Case] = {
    "folder above": (placed("../x.safetensors"), 4, OUTSIDE),
    "folder above, from below": (placed("a/../../x.safetensors"), 4, OUTSIDE),
    "absolute": (placed("/etc/passwd"), 4, OUTSIDE),
    "absolute, twice": (placed("//etc/passwd"), 4, OUTSIDE),
    "folder below": (placed("below/x.safetensors"), 4, OUTSIDE),
    "history": (placed(".git/x.safetensors"), 4, OUTSIDE),
    "the folder": (placed("."), 4, OUTSIDE),
    "the one above": (placed(".."), 4, OUTSIDE),
    "nothing": (placed(""), 4, OUTSIDE),
    "a number": (placed(3), 4, OUTSIDE),
    "null": (placed(None), 4, OUTSIDE),
    "a list": (placed(["model.safetensors"]), 4, OUTSIDE),
    "backslashes": (placed("..\\x.safetensors"), 4, NO_SHARD),
    "NUL": (placed("a\0.safetensors"), 4, NO_SHARD),
    "new line": (placed("a\n.safetensors"), 4, NO_SHARD),
    "escape": (placed("\x1b[2J.safetensors"), 4, NO_SHARD),
    "right to left": (placed("a\u202e.safetensors"), 4, NO_SHARD),
    "300 letters": (index(lambda m: m.update({"a": "x" * 300 + ".safetensors"})), 4, NO_SHARD),
    "hidden": (placed(".x.safetensors"), 4, NO_SHARD),
    "config.json": (placed("config.json"), 4, NO_SHARD),
    "manifest": (placed("gloss_manifest.json"), 4, NO_SHARD),
    "edit": (placed("gloss_edit.safetensors"), 4, NO_SHARD),
    "sums": (placed("SHA256SUMS"), 4, NO_SHARD),
    "card": (placed("README.md"), 4, NO_SHARD),
    "index itself": (placed(INDEX), 4, NO_SHARD),
    "another format": (placed("pytorch_model.bin"), 4, NO_SHARD),
    "other case": (placed("MODEL-00001-of-00002.safetensors"), 4, ""),
    "missing": (index(lambda m: m.update(ghost="ghost.safetensors")), 4, "found no such file"),
    "misplaced": (
        index(lambda m: m.update({next(n for n in m if m[n] < max(m.values())): max(m.values())})),
        4, "the index misplaces tensor model.embed_tokens.weight: expected model-",
    ),
    "ghost": (
        index(lambda m: m.update(ghost=max(m.values()))), 4, "tensor ghost: expected it in model-",
    ),
    "empty": (index(lambda m: m.clear()), 4, "has no weight_map"),
    "map that is a list": (written(INDEX, '{"weight_map":[]}'), 4, "no weight_map"),
    "list": (written(INDEX, "[]"), 4, "is not a JSON object"),
    "broken": (written(INDEX, "{"), 4, "cannot be read"),
    "not UTF-8": (lambda f: (f / INDEX).write_bytes(b'{"\xff":1}'), 4, "cannot be read"),
    "100,000 lists": (written(INDEX, "[" * 100_000), 4, "cannot be read"),
    "twice": (
        written(INDEX, '{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}'),
        4, "it has the key",
    ),
    "10 GB of nothing": (lambda f: os.truncate(f / INDEX, 10**10), 4, "is too large"),
    "a million lists": (
        written(INDEX, "[[]%s]" % (",[]" * 10**6)), 4, "more than 1,000,000 lists and objects",
    ),
    "a folder": (folder_for(INDEX), 4, f"has no {INDEX}"),
}  # fmt: skip


def config(**changes: Any) -> Damage:
    """config.json has other values; one that is None is left out."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        found = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return damage


def with_packed(**changes: Any) -> Damage:
    """The same, and a tensor is packed as quantized ones are."""

    def damage(folder: Path) -> None:
        shard = max(folder.glob("*.safetensors"))
        save_file(load_file(shard) | {"x.qweight": torch.ones(2, dtype=torch.int32)}, shard)
        config(**changes)(folder)

    return damage


NO_LAYER = "config.json: the number of layers: expected from 1 to 10,000, found"
LAYERS = "Field 'num_hidden_layers' expected int"

CONFIGS: dict[str, Case] = {
    "dtype": (config(dtype="torch.bfloat16"), 4, "config.json: dtype: expected bfloat16, found"),
    "vocabulary": (config(vocab_size=1 << 20), 4, "expected 1048576 rows, its vocab_size, found"),
    "no layers": (config(num_hidden_layers=0), 4, NO_LAYER),
    "negative layers": (config(num_hidden_layers=-1), 4, NO_LAYER),
    "10^9 layers": (config(num_hidden_layers=10**9), 4, "at most 10,000, found 1000000000"),
    "10^4000 layers": (config(num_hidden_layers=10**4000), 4, "found a number of 13288 bits"),
    "layers as text": (config(num_hidden_layers="6"), 4, LAYERS),
    "layers as NaN": (config(num_hidden_layers=float("nan")), 4, LAYERS),
    "layers as infinity": (config(num_hidden_layers=float("inf")), 4, LAYERS),
    "layers as a truth": (config(num_hidden_layers=True), 4, LAYERS),
    "layers as a list": (config(num_hidden_layers=[6] * 10**6), 4, LAYERS),
    "no hidden size": (config(hidden_size=None), 4, "expected shape [4096, 48], found [32, 48]"),
    "another hidden size": (config(hidden_size=64), 4, "contradicts config.json: expected shape"),
    "huge hidden size": (config(hidden_size=1 << 50), 4, "at most 16,777,216"),
    "hidden size of 4,000 digits": (config(hidden_size=10**4000), 4, "a number of 13288 bits"),
    "another FFN": (config(intermediate_size=47), 4, "contradicts config.json: expected shape ["),
    "more layers than there are": (
        config(num_hidden_layers=7), 4, "tensor model.layers.6.mlp.down_proj.weight is missing",
    ),
    "fewer layers than there are": (
        config(num_hidden_layers=5), 4, "layers.5.mlp.down_proj.weight with 5 layers, found it in",
    ),
    "10^9 positions": (config(max_position_embeddings=10**9), 4, "at most 16,777,216"),
    "huge heads": (config(head_dim=10**12), 4, "at most 16,777,216"),
    "huge vocabulary": (config(vocab_size=10**12), 4, "at most 16,777,216"),
    "10^9 layers of a tower": (config(vision_config={"depth": 10**9}), 4, "at most 10,000"),
    "10^9 labels": (config(num_labels=10**9), 4, "at most 100,000"),
    "10^9 experts deep down": (config(a=[{"b": {"num_experts": 10**9}}]), 4, "at most 10,000"),
    "unknown model": (config(model_type="nonesuch"), 4, "upgrade transformers, or check the name"),
    "model as a list": (config(model_type=["llama"]), 4, "found a list of 1"),
    "model as deep lists": (
        written("config.json", '{"model_type":%s}' % ("[" * 90 + "]" * 90)),
        4, "nested too deeply",
    ),
    "100,000 lists": (
        written("config.json", '{"a":%s}' % ("[" * 10**5 + "]" * 10**5)), 4, "cannot be read",
    ),
    "number of 5,000 digits": (
        written("config.json", '{"a":%s}' % ("9" * 5000)), 4, "cannot be read",
    ),
    "list": (written("config.json", "[]"), 4, "is not a JSON object"),
    "empty": (written("config.json", ""), 4, "config.json is empty"),
    "NUL": (written("config.json", "\0"), 4, "cannot be read"),
    "10 GB of nothing": (lambda f: os.truncate(f / "config.json", 10**10), 4, "is too large"),
    "quantized as a text": (with_packed(quantization_config="x" * 10**6), 4, "quantized"),
    "quantized as a list": (with_packed(quantization_config=[1]), 4, "is quantized"),
    "quantized, AWQ": (with_packed(quantization_config={"quant_method": "awq"}), 4, "scheme awq"),
    "quantized, steering a terminal": (
        with_packed(quantization_config={"quant_method": "\x1b[2J"}), 4, "scheme \\x1b[2J",
    ),
    "quantized in blocks of 0": (
        with_packed(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 0]}),
        4, "block size",
    ),
    "other weights": (config(transformers_weights="other.safetensors"), 4, "names other weights"),
    "compiled code": (config(attn_implementation="someone/kernel"), 4, "asks for compiled code"),
    "compiled code below": (
        config(text_config={"_attn_implementation": {"": "a/b"}}), 4, "compiled code",
    ),
    "adapter beside it": (written("adapter_config.json", "{}"), 4, "an adapter beside it"),
}  # fmt: skip


def sparse(name: str) -> Damage:
    """A file of 10 GB that takes no room."""

    def damage(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, 10**10)

    return damage


def link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)

    return damage


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def a_socket(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)  # its path must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("s")
    os.chdir(here)


def deep(folder: Path) -> None:
    """300 folders in one another."""
    here = os.open(".", os.O_RDONLY)
    os.chdir(folder)
    for _ in range(300):
        Path("d").mkdir()
        os.chdir("d")
    os.fchdir(here)
    os.close(here)


OUT, NOWHERE = "is a link that leads out of the source", "is a link that leads nowhere"

FILES: dict[str, Case] = {
    "licence from elsewhere": (link("LICENSE", "/etc/passwd"), 4, f"LICENSE {OUT}"),
    "any file from elsewhere": (link("notes.txt", "/etc/hostname"), 4, f"notes.txt {OUT}"),
    "from above": (link("LICENSE", "../secret"), 4, f"LICENSE {OUT}"),
    "from below, out": (link("docs/a.md", "../../secret"), 4, f"docs/a.md {OUT}"),
    "through a link to a folder": (
        lambda f: (link("up", "..")(f), link("LICENSE", "up/secret")(f)), 4, f"LICENSE {OUT}",
    ),
    "config from elsewhere": (link("config.json", "../secret"), 4, f"config.json {OUT}"),
    "tokenizer from elsewhere": (link("tokenizer.json", "../secret"), 4, f"tokenizer.json {OUT}"),
    "index from elsewhere": (link(INDEX, "../secret"), 4, f"{INDEX} {OUT}"),
    "card from elsewhere": (link("README.md", "../secret"), 4, f"README.md {OUT}"),
    "manifest from elsewhere": (link("gloss_manifest.json", "../secret"), 4, OUT),
    "a device": (link("vocab.txt", "/dev/zero"), 4, f"vocab.txt {OUT}"),
    "weights that are a device": (link("x.bin", "/dev/zero"), 4, "x.bin is no file"),
    "nowhere": (link("LICENSE", "nothing"), 4, f"LICENSE {NOWHERE}"),
    "in a circle": (link("LICENSE", "LICENSE"), 4, f"LICENSE {NOWHERE}"),
    "shard nowhere": (
        lambda f: link(max(f.glob("*.safetensors")).name, "nothing")(f), 4, "found no such file"
    ),
    "config as a pipe": (pipe("config.json"), 4, "config.json is no file"),
    "manifest as a pipe": (pipe("gloss_manifest.json"), 4, "is no file"),
    "card as a pipe": (pipe("README.md"), 4, "found a named pipe"),
    "some pipe": (pipe("x"), 4, "x is no file: expected files and folders, found a named pipe"),
    "shard as a pipe": (
        lambda f: pipe(max(f.glob("*.safetensors")).name)(f), 4, "is no file"
    ),
    "socket": (a_socket, 4, "found a socket"),
    "config as a folder": (
        folder_for("config.json"), 4, "no config.json"
    ),
    "shard as a folder": (
        folder_for("*.safetensors"), 4, "no such file"
    ),
    "300 folders": (deep, 4, "more than 32 folders within one another"),
    "name that is not UTF-8": (
        lambda f: open(os.fsencode(f) + b"/\xff.txt", "w").close(),  # noqa: PTH123
        4, "the file name '\\udcff.txt' is not plain text",
    ),
    "name with a new line": (written("a\nb.txt", ""), 4, "'a\\nb.txt' is not plain text"),
    "name that steers a terminal": (written("\x1b[2J", ""), 4, "is not plain text"),
    "name from right to left": (written("a\u202eb", ""), 4, "is not plain text"),
    "tokenizer of 10 GB": (sparse("tokenizer.json"), 4, "tokenizer.json is too large"),
    "tokenizer config of 10 GB": (sparse("tokenizer_config.json"), 4, "is too large"),
    "vocabulary of 10 GB": (sparse("vocab.txt"), 4, "vocab.txt is too large"),
    "template of 10 GB": (sparse("chat_template.jinja"), 4, "is too large"),
    "generation config of 10 GB": (sparse("generation_config.json"), 4, "is too large"),
    "card of 10 GB": (sparse("README.md"), 4, "README.md is too large"),
    "manifest of 10 GB": (sparse("gloss_manifest.json"), 4, "is too large"),
    "two sets of weights": (
        lambda f: (f / SINGLE).write_bytes(min(f.glob("*.safetensors")).read_bytes()), 4, "two sets"
    ),
}  # fmt: skip


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def saved(content: object, **settings: Any) -> Damage:
    """The weights are a pickle of this."""

    def damage(folder: Path) -> None:
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        if isinstance(content, bytes):
            (folder / BIN).write_bytes(content)
        else:
            torch.save(content, folder / BIN, **settings)

    return damage


Parts = Iterator[tuple[str, bytes]]


def packed(change: Callable[[str, bytes], Parts], compression: int = zipfile.ZIP_STORED) -> Damage:
    """The parts of a good archive are changed and packed again."""

    def damage(folder: Path) -> None:
        saved({"a": torch.arange(8.0)})(folder)
        with zipfile.ZipFile(io.BytesIO((folder / BIN).read_bytes())) as old:
            parts = [(name, old.read(name)) for name in old.namelist()]
        with zipfile.ZipFile(folder / BIN, "w", compression) as new:
            for name, data in parts:
                for part in change(name, data):
                    new.writestr(*part)

    return damage


def replaced(old: bytes, new: bytes) -> Callable[[str, bytes], Parts]:
    """In the pickle of an archive."""

    def change(name: str, data: bytes) -> Parts:
        if name.endswith("data.pkl"):
            assert old in data
            data = data.replace(old, new)
        yield name, data

    return change


def with_more(name: str, content: bytes) -> Callable[[str, bytes], Parts]:
    def change(found: str, data: bytes) -> Parts:
        yield found, data
        if found.endswith("data.pkl"):
            yield name, content

    return change


def same(name: str, data: bytes) -> Parts:
    yield name, data


def padded(name: str, data: bytes) -> Parts:
    yield name, data + bytes(10**7 if name.endswith("data.pkl") else 0)


CODE = "holds more than tensors, and reading it would execute code"
NO_FILE = "cannot be read as a PyTorch file"
NOT_OURS, NO_DICT = "is an archive that PyTorch has not written", "is not a state_dict"
OLD = {"_use_new_zipfile_serialization": False}
SHAPE, STRIDE, NUMEL = b"K\x08\x85", b"K\x01\x85", b"K\x08tq"
LARGE = b"J" + (1 << 30).to_bytes(4, "little")


def either(first: Callable[[str, bytes], Parts], then: Callable[[str, bytes], Parts]) -> Any:
    return lambda n, d: (part for name, data in first(n, d) for part in then(name, data))


PICKLES: dict[str, Case] = {
    "code": (saved({"a": Evil()}), 4, CODE),
    "code, before PyTorch 1.6": (saved({"a": Evil()}, **OLD), 4, CODE),
    "code as a name": (saved({Evil(): torch.ones(1)}), 4, CODE),
    "code, bare": (saved(b"cpathlib\nPath.touch\n(cpathlib\nPath\n(S'executed'\ntRtR."), 4, ""),
    "code of a module": (saved(b"\x80\x02cos\nsystem\nX\x0e\0\0\0touch executed\x85R."), 4, ""),
    "no dictionary": (saved([torch.ones(1)]), 4, "expected names and tensors, found list"),
    "tensor in a dictionary in it": (
        saved({"a": {"b": torch.ones(1)}}), 4, "found 'a': dict; save the model's",
    ),
    "number as a name": (saved({1: torch.ones(1)}), 4, "found a name that is a int"),
    "name that steers a terminal": (saved({"\x1b[2J": torch.ones(1)}), 4, NO_DICT),
    "name of 1 MB": (saved({"\n" * 10**6: torch.ones(1)}), 4, NO_DICT),
    "sparse, 10^9 wide": (
        saved({"a": torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (10**9, 10**9),
                                            check_invariants=True)}), 4, NO_DICT,
    ),
    "4 bytes that stand for 4 TB": (
        saved({"a": torch.zeros(1).expand(10**12)}),
        4, "only what it repeats: expected 4,000,000,000,000 bytes, found 4",
    ),
    "the same, before PyTorch 1.6": (
        saved({"a": torch.zeros(1).expand(10**12)}, **OLD), 4, "only what it repeats",
    ),
    "on no device": (saved({"a": torch.empty(3, device="meta")}), 4, ""),
    "shape beyond its numbers": (packed(replaced(SHAPE, LARGE + b"\x85")), 4, NO_FILE),
    "stride beyond its numbers": (packed(replaced(STRIDE, LARGE + b"\x85")), 4, NO_FILE),
    "numbers beyond the file": (
        packed(either(replaced(NUMEL, LARGE + b"tq"), replaced(SHAPE, LARGE + b"\x85"))),
        4, NO_FILE,
    ),
    "compressed": (packed(same, zipfile.ZIP_DEFLATED), 4, NOT_OURS),
    "compressed a thousand times": (packed(padded, zipfile.ZIP_DEFLATED), 4, NOT_OURS),
    "part outside": (packed(with_more("../../executed", b"")), 4, NOT_OURS),
    "no archive": (saved(b"PK\x03\x04 and then nothing"), 4, NO_FILE),
    "empty": (saved(b""), 4, "pytorch_model.bin is empty"),
    "text": (saved(b"<html>404</html>"), 4, "pytorch_model.bin "),
    "never ending": (saved(b"\x80\x02" + b"]" * 10**5), 4, NO_FILE),
    "pointer": (saved(b"version https://git-lfs.github.com/spec/v1\n"), 4, "pointer of git-lfs"),
    "10 GB of nothing": (lambda f: (saved(b"")(f), sparse(BIN)(f)), 4, "of zero bytes"),
}  # fmt: skip


def params(**changes: Any) -> Damage:
    """Meta's params.json has other values."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps(found | changes))

    return damage


NATIVE: dict[str, Case] = {
    "layers of 4,000 digits": (params(n_layers=10**4000), 4, "found a number of 13288 bits"),
    "huge dim": (params(dim=1 << 39), 4, "contradicts params.json"),
    "dim beyond all": (params(dim=1 << 50), 4, "no usable dim"),
    "dim of zero": (params(dim=0), 4, "no usable dim"),
    "NaN": (params(norm_eps=float("nan")), 4, "no usable norm_eps"),
    "infinity": (params(rope_theta=float("inf")), 4, "no usable rope_theta"),
    "huge multiplier": (params(ffn_dim_multiplier=1e11), 4, "contradicts params.json"),
    "huge vocabulary": (params(vocab_size=1 << 39), 4, "contradicts params.json"),
    "100,000 lists": (written("params.json", "[" * 10**5), 4, "cannot be read"),
    "10 GB of nothing": (sparse("params.json"), 4, "params.json is too large"),
    "tokenizer of 10 GB": (sparse("tokenizer.model"), 4, "tokenizer.model is too large"),
    "part that is missing": (
        lambda f: (f / "consolidated.07.pth").write_bytes(b""), 4, "is missing: expected 8 parts"
    ),
    "part as a pipe": (pipe("consolidated.01.pth"), 4, "is no file"),
    "params from elsewhere": (link("params.json", "../secret"), 4, f"params.json {OUT}"),
    "sums of something else": (written("checklist.chk", "\x1b[2J\n"), 4, "not a list of md5 sums"),
    "code": (lambda f: torch.save({"a": Evil()}, f / "consolidated.00.pth"), 4, CODE),
    "repeated numbers": (
        lambda f: _repeat(f / "consolidated.00.pth", "tok_embeddings.weight"), 4, "",
    ),
}  # fmt: skip


def _repeat(path: Path, name: str) -> None:
    (path.parent / "checklist.chk").unlink(missing_ok=True)
    tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
    torch.save(tensors | {name: torch.zeros(1).half().expand(10**9, 32)}, path)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(
    *fields: bytes, count: int | None = None, tensors: int = 0, version: int = 3, rest: bytes = b""
) -> bytes:
    """A GGUF header with these fields."""
    said = len(fields) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, tensors, said) + b"".join(fields) + rest


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<IQ", 10, value)


def array(key: str, kind: int, count: int, data: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count) + data


DAMAGED = "is damaged: found"

GGUFS: Mapping[str, tuple[bytes, int, str]] = {
    "empty": (b"", 4, "is not a GGUF file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", 4, "is a pointer of git-lfs"),
    "magic alone": (b"GGUF", 4, DAMAGED),
    "version 1": (gguf(version=1), 4, "version 1, where 2 and 3 are known"),
    "other byte order": (gguf(version=3 << 24), 4, "where 2 and 3 are known"),
    "2^63 fields": (gguf(count=1 << 63), 4, "9,223,372,036,854,775,808 fields"),
    "2^63 tensors": (gguf(tensors=1 << 63), 4, "9,223,372,036,854,775,808 tensors"),
    "more fields than there are": (gguf(count=5), 4, DAMAGED),
    "text of 2^63 bytes": (gguf(struct.pack("<Q", 1 << 63), count=1), 4, "a text of 9,223"),
    "list of 2^63": (gguf(array("a", 0, 1 << 63)), 4, "a has 9,223,372,036,854,775,808 elements"),
    "list of 10^8 bytes": (gguf(array("a", 0, 10**8)), 4, "a has 100,000,000 elements"),
    "list of lists": (gguf(array("a", 9, 1)), 4, "a value of the unknown type 9"),
    "unknown type": (gguf(text("a") + struct.pack("<I", 99)), 4, "the unknown type 99"),
    "10^9 blocks": (gguf(number("llama.block_count", 10**9)), 4, "where at most 10,000 can be"),
    "10^9 experts": (gguf(number("x.expert_count", 10**9)), 4, "where at most 10,000 can be"),
    "huge embedding": (gguf(number("llama.embedding_length", 1 << 40)), 4, "at most 16,777,216"),
    "huge context": (gguf(number("llama.context_length", 1 << 62)), 4, "at most 16,777,216"),
    "tensor of 2^32 - 1 axes": (
        gguf(tensors=1, rest=text("a") + b"\xff" * 4), 4, "tensor a of 4,294,967,295 axes"
    ),
    "tensor that ends early": (gguf(tensors=1, rest=text("a")), 4, DAMAGED),
    "no architecture": (gguf(), 4, "transformers cannot read"),
    "unknown architecture": (
        gguf(text("general.architecture") + struct.pack("<I", 8) + text("nonesuch")),
        4, "transformers cannot read",
    ),
}  # fmt: skip
