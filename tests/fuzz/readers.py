"""Every reader of untrusted bytes as a function of bytes, which may raise ``ConverterError``.

Anything else that it raises is a crash; so are ten seconds, and memory beyond the campaign's limit.
A new reader is one function here with ``@reader``, and a folder of seeds in ``corpus``.
"""

import atexit
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from msgspec import structs

from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.statistics import Request, load_activations, read_inputs
from converter.calibration.word_list import load_words
from converter.checkpoints.architectures.architecture import Dimensions
from converter.checkpoints.formats import meta_small_files as native_small
from converter.checkpoints.formats import pickle_files as pickled
from converter.checkpoints.formats.gguf import check_header
from converter.checkpoints.front_matter import read_card
from converter.checkpoints.layout import check_config, read_index, read_json
from converter.checkpoints.names import CARD, EDIT_FILE, INDEX, MANIFEST, SIGNATURE
from converter.checkpoints.plan import make_plan
from converter.checkpoints.safetensors.header import DTYPES, parse_header, read_header
from converter.checkpoints.safetensors.rewrite import Region, find_damage, read_raw
from converter.checkpoints.source import Source
from converter.edits.deltas import KINDS
from converter.entrypoints import verify as verification
from converter.entrypoints.diff_manifests import diff_manifests
from converter.errors import ConverterError, VerificationError
from converter.manifest import Manifest
from converter.methods.known import METHODS
from converter.methods.options import configure, parse_factors, parse_layers
from converter.outputs.adapter.verify import check_adapter
from converter.outputs.claim import finished_in
from converter.outputs.journal import Journal
from converter.outputs.record_checks import (
    check_edit_file,
    delta_of_record,
    edit_of,
    recorded_edit,
)
from converter.recipe import LocalInputs, Settings
from converter.release.card import make_card
from converter.release.licences import terms_of
from converter.release.manifest import read_manifest
from converter.release.recording import differences, read_recording, recipe_of
from converter.release.verify import check_kept
from tests.fuzz import skeleton

Reader = Callable[[bytes], None]
Form = Literal["bytes", "json", "safetensors"]

READERS: dict[str, Reader] = {}
FORMS: dict[str, Form] = {}
"""How the fuzzer changes an input of each: byte by byte, or keeping it well-formed."""


def reader(form: Form = "bytes") -> Callable[[Reader], Reader]:
    """Put a function under its name into ``READERS``."""

    def register(function: Reader) -> Reader:
        name = function.__name__.rstrip("_")
        READERS[name], FORMS[name] = function, form
        return function

    return register


def run(name: str, data: bytes) -> ConverterError | None:
    """Give bytes to a reader; what it refuses them with, which must be one printable line."""
    try:
        READERS[name](data)
    except ConverterError as error:
        refused = error
    else:
        return None
    assert str(refused).isprintable(), repr(str(refused))
    return refused


@cache
def scratch() -> Path:
    """A folder for the files that readers want, in memory where there is such a place."""
    memory = Path("/dev/shm")
    folder = Path(mkdtemp(prefix="gloss-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def output() -> Path:
    """A converted checkpoint, in which a reader replaces one file."""
    skeleton.write_output(scratch() / "output")
    return scratch() / "output"


def placed(name: str, data: bytes) -> Path:
    path = scratch() / name
    path.write_bytes(data)
    return path


def try_all(attempts: Iterable[Callable[[], object]]) -> None:
    """Make each attempt; the last refusal is that of all."""
    refused = None
    for attempt in attempts:
        try:
            attempt()
        except ConverterError as error:
            refused = error
    if refused:
        raise refused


@reader("safetensors")
def header(data: bytes) -> None:
    """The header of a shard, its tensors, and the search for the first damaged one."""
    path = placed("model.safetensors", data)
    find_damage(path, skeleton.prefixes(skeleton.shard(skeleton.AFTER)))
    tensors = read_header(path).tensors
    with path.open("rb", buffering=0) as file:
        for info in list(tensors.values())[:50]:
            if info.dtype in DTYPES:
                read_raw(file, info)
            Region(file, info).read(0, min(info.nbytes, 1000))


@reader("json")
def index(data: bytes) -> None:
    """The index of several shards."""
    read_index(placed(INDEX, data))


@reader("json")
def config(data: bytes) -> None:
    """config.json, the index and all headers as one JSON object, as far as the plan."""
    given = read_json(placed("config.json", data))
    headers = {}
    for name, entries in as_object(given.get("shards")).items():
        raw = json.dumps(entries).encode()
        size = as_object(given.get("sizes")).get(name)
        headers[name] = parse_header(raw, size if type(size) is int else 8 + len(raw), name)
    weight_map = given.get("weight_map")
    if weight_map is not None:
        weight_map = read_index(placed(INDEX, json.dumps({"weight_map": weight_map}).encode()))
    stated = as_object(given.get("config"))
    check_config(stated)  # as whoever reads the file does, before a model is built of it
    plan = make_plan(stated, weight_map, headers)
    for role in plan.roles:
        plan.bias_route(role)


def as_object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


@reader("json")
def manifest(data: bytes) -> None:
    """gloss_manifest.json in an otherwise right output: verified, replayed, compared, its card."""
    folder = output()
    skeleton.seal(folder, data)
    verification._check_loading = no_loading
    found = verification.verify(folder)
    assert all(problem for problem in found)
    diff_manifests(folder / MANIFEST, placed("other.json", json.dumps(known()).encode()))
    recording = read_recording(folder)
    differences(recording, "cpu")
    card_of(read_manifest(folder))
    recipe_of(recording, LocalInputs(source="tiny"), refit=True)


def no_loading(folder: Path, trust_remote_code: bool) -> Any:
    """In place of what transformers makes of the folder, which is not ours and takes long."""
    return iter(())


@cache
def known() -> dict[str, Any]:
    return skeleton.manifest()


@reader("json")
def part(data: bytes) -> None:
    """``[[path, value], ...]``: parts of a right manifest, replaced."""
    try:
        changes = json.loads(data)
    except (ValueError, RecursionError):
        return
    changed = json.loads(json.dumps(known()))
    for change in changes if isinstance(changes, list) else []:
        if isinstance(change, list) and len(change) == 2 and isinstance(change[0], list):
            replace(changed, *change)
    manifest(json.dumps(changed).encode())


def replace(tree: Any, path: list[Any], value: Any) -> None:
    """Put a value at a path, if there is such a place."""
    for key in path[:-1]:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return
    try:
        tree[path[-1]] = value
    except (IndexError, TypeError):
        return


@reader("safetensors")
def edit(data: bytes) -> None:
    """The tensors of an edit, as a manifest that fits them says, and as if of every kind."""
    folder = scratch() / "edit"
    folder.mkdir(exist_ok=True)
    (folder / EDIT_FILE).write_bytes(data)
    manifest = Manifest.from_json(known())
    stored = recorded_edit(folder, manifest)
    for kind, delta in KINDS.items():
        tensors = {field.name: field.name for field in fields(delta)}
        with suppress(VerificationError):
            delta_of_record(structs.replace(manifest.edited[0], kind=kind, tensors=tensors), stored)
    list(check_edit_file(manifest, stored))
    list(check_kept(manifest, stored))
    edit_of(manifest, stored).digest()


@reader("safetensors")
def activations(data: bytes) -> None:
    """A file of activations, for each kind of request."""
    path = placed("activations.safetensors", data)
    read_inputs(path)
    requests = (
        Request("ffn", "mean", (0,), second_moment=False),
        Request("ffn", "mean", (0,), True, gradient=True),
        Request("ffn", "mean", (0,), True, True, directions=1, protect_shared=1, per_layer=1),
    )
    try_all(partial(load_activations, path, request, skeleton.D) for request in requests)


@cache
def words() -> Any:
    return load_words(str(placed("list.txt", b"damn\nhell\n")))


@reader()
def pairs_jsonl(data: bytes) -> None:
    load_pairs(str(placed("pairs.jsonl", data)), words(), None, 0)


@reader()
def pairs_tsv(data: bytes) -> None:
    load_pairs(str(placed("pairs.tsv", data)), words(), None, 0)


@reader()
def pairs_csv(data: bytes) -> None:
    load_pairs(str(placed("pairs.csv", data)), words(), None, 0)


@reader()
def prose(data: bytes) -> None:
    load_prose(str(placed("prose.txt", data)))


@reader()
def word_list(data: bytes) -> None:
    load_words(str(placed("words.txt", data)))


@reader()
def sums(data: bytes) -> None:
    """SHA256SUMS of a right output."""
    skeleton.seal(output(), json.dumps(known()).encode(), data)
    verification._check_loading = no_loading
    verification.verify(output())


@reader()
def card(data: bytes) -> None:
    """The card of a source, what it says of the licence, and the card made of both."""
    card_of(Manifest.from_json(known()), data)


def card_of(manifest: Manifest, data: bytes = b"") -> None:
    """A card, made; it must have the front matter and headings that the template has."""
    source = Source(
        name="tiny", folder=scratch(), config=skeleton.CONFIG, shards=(skeleton.SHARD,),
        weight_map=None, companions=(), card=read_card(placed(CARD, data)),
    )  # fmt: skip
    text, _ = make_card(source, None, manifest, terms_of(source, None), skeleton.ZERO)
    assert text.startswith("---\n")
    text.encode()


@reader("json")
def adapter_config(data: bytes) -> None:
    check(adapter(), "adapter_config.json", data)


@reader("safetensors")
def adapter_weights(data: bytes) -> None:
    check(adapter(), "adapter_model.safetensors", data)


@cache
def adapter() -> Path:
    """An adapter of the same edit."""
    folder = scratch() / "adapter"
    skeleton.write_adapter(folder)
    return folder


def check(folder: Path, name: str, data: bytes) -> None:
    """Verify an adapter in which one file is this."""
    kept = (folder / name).read_bytes()
    (folder / name).write_bytes(data)
    try:
        list(check_adapter(folder, Manifest.from_json(skeleton.adapter_manifest()), {}, None))
    finally:
        (folder / name).write_bytes(kept)


@reader("json")
def params(data: bytes) -> None:
    """Meta's params.json."""
    import torch

    found = native_small.read_params(placed("params.json", data))
    json.dumps(native_small.config_of(found, 3, torch.bfloat16, tied=False))


@reader()
def pickle(data: bytes) -> None:
    pickled.load_tensors(placed("pytorch_model.bin", data))


@reader()
def gguf_(data: bytes) -> None:
    """What is looked at before transformers is given the file."""
    check_header(placed("model.gguf", data))


@reader("json")
def signature(data: bytes) -> None:
    """``model.sig`` beside a right output."""
    from converter.release.signing import load_public_key

    key = load_public_key(placed("key.pem", skeleton.PUBLIC_KEY.encode()))
    (output() / SIGNATURE).write_bytes(data)
    key.check(output())
    (output() / SIGNATURE).unlink()


@reader()
def options(data: bytes) -> None:
    """Options: the first line is a method, the others ``key=value``, a size, layers or factors."""
    method, *lines = data.decode("utf-8", "replace").split("\n")
    sizes = Dimensions(4, 8, 8, ffn_layers=(0, 1, 2, 3))
    method = METHODS.names()[len(method) % len(METHODS.names())]
    attempts: list[Callable[[], object]] = []
    for line in lines[:20]:
        key, _, value = line.partition("=")
        attempts.append(partial(configure, method, {key: value}, sizes))
        attempts.append(partial(Settings, memory_limit=line))  # type: ignore[arg-type]
        attempts.append(partial(parse_layers, "layers", line, 4))
        attempts.append(partial(parse_factors, "factors", line, 4))
    try_all(attempts)


@reader()
def journal(data: bytes) -> None:
    """What a killed run has left: never an error, and what is believed can be written again."""
    folder = scratch() / "claimed"
    folder.mkdir(exist_ok=True)
    path, shard = scratch() / "journal.jsonl", "model.safetensors"
    (folder / shard).write_bytes(b"")
    path.write_bytes(b'{"key": "k"}\n' + data)
    kept = Journal(path, folder, "k", dict)
    for done in kept.before({shard: {shard}}).values():
        kept.finished(shard, done)
    assert finished_in(path) % 2 == 0


@reader()
def message(data: bytes) -> None:
    """Whatever a sentence quotes, it stays one printable line; ``run`` asserts that."""
    text = data.decode("utf-8", "surrogateescape")
    raise ConverterError(text or "nothing", expected=text, found=text, hint=text)


@reader("json")
def listing(data: bytes) -> None:
    """What a Hub answers when it is asked for a repo."""
    from huggingface_hub.hf_api import ModelInfo

    from converter.hub.repos import repo_of

    try:
        info = ModelInfo(**json.loads(data))  # type: ignore[no-untyped-call]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return  # ``hub.resolve`` refuses what the client cannot take
    repo = repo_of("model", info, None)
    assert all(not Path(name).is_absolute() for name in repo.sizes)
