"""GGUF files that transformers can read: unpacked once, into the user's cache.

transformers dequantizes the whole model in memory; then it is a folder like any other. The readers
of these files make objects for every list element and layers for every number, so a small file
could demand all memory. The header is therefore checked first.
"""

import io
import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from converter.checkpoints.formats import version_4
from converter.checkpoints.formats.meta_small_files import llama3_scaling
from converter.checkpoints.formats.virtual import making
from converter.checkpoints.intact import refuse_placeholder
from converter.errors import CheckpointError, ConverterError, SourceError
from converter.runtime import progress
from converter.runtime.cache import cache_folder, remembered_digest, replacing, temporary_folder
from converter.text import readable

_VERSION = 2
"""Version of the unpacked files. Raise it when they change."""

_SMALLEST = 1.5
"""Bits per weight of GGUF's smallest quantization; a smaller file cannot be the whole model."""

_MAX_FIELDS = 10_000
_MAX_TENSORS = 200_000
_MAX_ELEMENTS = 1 << 21
"""The most elements of a list; the largest vocabularies have a quarter of a million words, and
twice as many merges.
"""

_MAX_TEXT = 16_000_000
"""The most bytes of a string."""

_LIMITS = (
    (re.compile(r".*\.(block|expert)_count"), 10_000),
    (re.compile(r"(?!general\.).*(_length|_count|_size|_rank)"), 1 << 24),
)
"""Patterns of keys -> the largest value allowed. The second spares ``general.``: keys there
describe the file, and some hold the number of parameters.
"""

_SCALES = ("freq_base_swa", "scale_linear", "scaling.")
"""Beginnings of keys for the scaling of positions, after the architecture and ``rope.``."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _LIST = 8, 9
"""Types of values, by their numbers in the format."""


def unpacked(path: Path) -> Path:
    """The folder of a GGUF file's model in bfloat16; it is made on the first call.

    Beside it are the digests of its files. If the files no longer have these digests, it is made
    again.

    Raises:
        CheckpointError: transformers cannot read it, or not all of it.
        SourceError: a package for GGUF is missing.
        DestinationError: the cache cannot be written.
    """
    folder = cache_folder() / "gguf" / f"{remembered_digest(path)}-{made_by()}"
    known = folder.with_suffix(".json")
    if not folder.is_dir() or _digests(folder) != _read_digests(known):
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder, lambda: load(path), "5GB")
        with replacing(known) as part:
            part.write_text(json.dumps(_digests(folder)), "utf-8")
    return folder


def made_by() -> str:
    """The versions that the files of ``make_folder`` depend on. They are in the names of cache
    folders, so that a folder of another version is not used.
    """
    return f"{_VERSION}-{version('transformers')}"


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: remembered_digest(path) for path in sorted(folder.iterdir())}


def _read_digests(path: Path) -> object:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def make_folder(
    folder: Path, loaded: Callable[[], tuple[Any, Any]], shard_size: str, card: str = ""
) -> None:
    """Write a model and its tokenizer to a folder of the cache. Raises as ``making``."""
    with making(folder) as part:
        model, tokenizer = loaded()
        with progress.doing("writing what was unpacked to the cache"):
            model.save_pretrained(part, max_shard_size=shard_size)
            tokenizer.save_pretrained(part)
            version_4.complete(part, tokenizer)
        if card:
            (part / "README.md").write_text(card, "utf-8")
        for made in part.iterdir():
            made.chmod(0o644)


def load(path: Path) -> tuple[Any, Any]:
    """Model in bfloat16 and tokenizer of a GGUF file.

    It is read from a folder of its own, since transformers would use an adapter beside it, or ask
    whether to run code. Raises CheckpointError or SourceError, as ``unpacked``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    check_header(path)
    try:
        with temporary_folder() as alone, _parsed_once() as parse:
            (alone / path.name).symlink_to(path.resolve())
            with redirect_stderr(io.StringIO()):
                config = _config(path, alone)
            with (
                progress.bar(f"unpack {readable(path.name)}", 100, "%") as shown,
                redirect_stderr(_Percent(shown)),  # its progress bar cannot be turned off
            ):
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    alone,
                    config=config,
                    gguf_file=path.name,
                    local_files_only=True,
                    trust_remote_code=False,
                    dtype=torch.bfloat16,
                    quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
                    output_loading_info=True,
                )
                tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
            reader = parse(str(alone / path.name))
    except ConverterError:
        raise
    except ImportError as error:
        raise SourceError(
            f"{path.name} needs packages that are not installed",
            found=str(error).strip().split("\n")[0],
            hint="pip install 'gloss-convert[gguf]'",
        ) from error
    except Exception as error:  # a third party's loader may raise anything on an untrusted file
        raise CheckpointError(
            f"transformers cannot read {path.name}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        ) from error
    model, info = loaded
    _check_complete(path, reader, model, info)
    _read_positions(path, reader, model.config)
    return model, tokenizer


_PATCHING = Lock()


@contextmanager
def _parsed_once() -> Iterator[Callable[[str], Any]]:
    """Within this context, a file is parsed once. transformers parses it anew for the config, the
    tensors and the tokenizer, which takes seconds each time.
    """
    import gguf

    library: Any = gguf
    with _PATCHING:
        known = library.GGUFReader
        library.GGUFReader = parse = cache(known)
        try:
            yield parse
        finally:
            library.GGUFReader = known


class _Percent(io.StringIO):
    """Moves a bar of 100 as far as a bar of tqdm says that is written here; a second one, which
    begins anew, moves it no more."""

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self._shown = shown

    def write(self, text: str) -> int:
        for percent in re.findall(r"(\d+)%\|", text):
            self._shown.update(max(min(int(percent), 100) - self._shown.n, 0))
        return len(text)


def _config(path: Path, folder: Path) -> Any:
    """The config in the header of a file (linked in ``folder``); refused if it describes a larger
    model than the file can hold, since the model would be made first.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        folder, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    loader: Any = AutoModelForCausalLM
    with torch.device("meta"):  # modules without numbers
        model = loader.from_config(config, trust_remote_code=False)
    named, size = sum(p.numel() for p in model.parameters()), path.stat().st_size
    if named * _SMALLEST > 8 * size:
        raise _incomplete(path, expected=f"{named:,} weights", found=f"{size:,} bytes")
    return config


def _check_complete(path: Path, reader: Any, model: Any, info: dict[str, Any]) -> None:
    """Refuse other tensors than the model's: transformers fills missing ones with random numbers,
    and ignores surplus ones.
    """
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, info[what])):
            found = f"{len(names)} {what.replace('_', ' ')}, the first {names[0]}"
            raise _incomplete(path, found=found)
    parts = (str(tensor.name).split(".") for tensor in reader.tensors)
    blocks = {int(part[1]) for part in parts if part[0] == "blk" and part[1].isdigit()}
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if blocks != set(range(layers)):
        raise CheckpointError(
            f"{path.name} has other blocks than its header says",
            expected=f"blk.0 to blk.{layers - 1}", found=f"{len(blocks)} of them",
        )  # fmt: skip


def _read_positions(path: Path, reader: Any, config: Any) -> None:
    """Put the file's scaling of positions into a config. transformers reads it for few models, and
    would run the others with wrong positions on long texts.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    keys = {key.partition(".rope.")[2]: key for key in reader.fields}
    said = {k: reader.fields[name].contents() for k, name in keys.items() if k.startswith(_SCALES)}
    tensors = {t.name: t.data for t in reader.tensors if t.name.startswith("rope_f")}
    whole = parameters.get("full_attention", parameters)
    if whole.get("rope_type") != "default":
        return  # it was read already, or there are no positions
    if "sliding_attention" in parameters and (theta := said.pop("freq_base_swa", None)):
        parameters["sliding_attention"]["rope_theta"] = float(theta)
    scaling = _scaling(said)
    if tensors.keys() == {"rope_freqs.weight"} and not scaling:
        factors = torch.tensor(tensors.pop("rope_freqs.weight")).flatten()
        scaling = _as_llama3(whole["rope_theta"], factors)
    if scaling is None or tensors:
        raise CheckpointError(
            f"{path.name} scales positions in a way that transformers does not read",
            expected="a linear scaling, YaRN, or that of Llama 3.1",
            found=", ".join([*(f"{key} {said[key]}" for key in said), *tensors]) or "another",
            hint="give the model in safetensors as SOURCE",
        )  # fmt: skip
    whole |= scaling


def _scaling(said: dict[str, Any]) -> dict[str, Any] | None:
    """``rope_parameters`` for a header; None if they cannot express it."""
    told = {key.removeprefix("scaling."): value for key, value in said.items()}
    kind, length = told.pop("type", "linear"), told.pop("original_context_length", 0)
    factor = float(told.pop("factor", 0) or told.pop("scale_linear", 0))
    told.pop("finetuned", None)
    if kind == "none" or (kind in ("linear", "yarn") and factor in (0, 1)):
        return {}
    if kind == "linear" and not told:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and length and not told:
        length = int(length)
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    return None


def _as_llama3(theta: float, factors: torch.Tensor) -> dict[str, Any] | None:
    """The same from the divisors of frequencies; None if they are not those of Llama 3.1."""
    factor = float(factors.max())
    if bool((factors == 1).all()):
        return {}
    scaling = llama3_scaling(factor)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = theta ** (-torch.arange(len(factors)) / len(factors)) / (2 * math.pi)
    turns *= scaling["original_max_position_embeddings"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    return scaling if torch.allclose(expected, factors, rtol=1e-3) else None


def _incomplete(path: Path, **details: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} does not hold the model that it names",
        hint="fetch the file again; of a file in parts, join them first",
        **details,
    )


def check_header(path: Path) -> None:
    """Raise CheckpointError if a file is not GGUF, ends early, or has impossible values."""
    with path.open("rb") as file:
        start = file.read(64)
        refuse_placeholder(start, path.name, may_be_empty=True)
        if not start.startswith(b"GGUF"):
            raise CheckpointError(f"{path.name} is not a GGUF file", hint="fetch the file again")
        file.seek(4)
        try:
            _check(file)
        except (ValueError, struct.error) as error:
            raise CheckpointError(
                f"the header of {path.name} is damaged", found=str(error),
                hint="fetch the file again",
            ) from error  # fmt: skip


def _check(file: BufferedReader) -> None:
    (version,) = _read(file, "<I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, where 2 and 3 are known")
    tensors, fields = _read(file, "<QQ")
    if fields > _MAX_FIELDS or tensors > _MAX_TENSORS:
        raise ValueError(f"{fields:,} fields and {tensors:,} tensors")
    for _ in range(fields):
        key = _text(file)
        (kind,) = _read(file, "<I")
        _value(file, key, kind)
    for _ in range(tensors):
        name = _text(file)
        (axes,) = _read(file, "<I")
        if axes > 4:
            raise ValueError(f"tensor {name} of {axes:,} axes")
        _read(file, f"<{axes}QIQ")


def _value(file: BufferedReader, key: str, kind: int) -> None:
    is_list, count = kind == _LIST, 1
    if is_list:
        kind, count = _read(file, "<IQ")
    if count > _MAX_ELEMENTS:
        raise ValueError(f"{key} has {count:,} elements")
    if kind == _STRING:
        for _ in range(count):
            _text(file)
        return
    if kind not in _SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    numbers = _read(file, f"<{count}{_SCALARS[kind]}")
    for pattern, most in _LIMITS:
        if not is_list and pattern.fullmatch(key) and numbers[0] > most:
            raise ValueError(f"{key} is {numbers[0]:,}, where at most {most:,} can be")


def _text(file: BufferedReader) -> str:
    (length,) = _read(file, "<Q")
    if length > _MAX_TEXT:
        raise ValueError(f"a text of {length:,} bytes")
    return file.read(length).decode("utf-8", "replace")


def _read(file: BufferedReader, layout: str) -> tuple[int, ...]:
    """Numbers in a layout of ``struct``. Raises struct.error at the end of the file."""
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
