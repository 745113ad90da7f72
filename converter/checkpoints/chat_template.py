"""Chat templates: find them in a checkpoint, and add a suffix S to every user message.

A template is a program in Jinja that writes a conversation as text. Templates treat a message's
content differently, so a template's own text does not change: a preamble in front of it puts S into
the messages, which it then renders as usual.

    preamble(S) + template renders the same as template with " " + S behind user messages

Messages of tools, systems and the model get no S. A user message is a text, or a list of parts,
which gets one more part. Readers use different templates of a checkpoint, so all of them must
change.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from converter.checkpoints.names import INDEX, MANIFEST, is_companion
from converter.errors import CheckpointError, OptionError
from converter.runtime.files import decode, read_file, reason

_KEY = "chat_template"

_JSON = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
"""JSON files that can have templates under that key: of processors, of tokenizers."""

_MAX_BYTES = 16_000_000
"""The most bytes of a file with a template."""

_UNREAD = (INDEX, MANIFEST, "tokenizer.json", "vocab.json")
"""Large JSON files in which no reader looks for a template."""

_MARK = "{#- gloss-convert: suffix of user messages -#}"

_PREAMBLE = (
    _MARK + "{%- set gloss = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' and message['content'] is string -%}"
    "{%- set gloss.messages = gloss.messages"
    " + [dict(message, content=message['content'] + SUFFIX)] -%}"
    "{%- elif message['role'] == 'user' and message['content'] -%}"
    "{%- set gloss.messages = gloss.messages"
    " + [dict(message, content=message['content'] + [{'type': 'text', 'text': SUFFIX}])] -%}"
    "{%- else -%}{%- set gloss.messages = gloss.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = gloss.messages "
)
"""The preamble without its end. In a sandbox lists cannot be appended to, but can be added."""


def is_template_file(name: str) -> bool:
    """Whether a file of a checkpoint, by its name, can hold templates that readers use."""
    path = PurePosixPath(name)
    named = str(path.parent) == "additional_chat_templates" and path.suffix == ".jinja"
    return named or name in ("chat_template.jinja", *_JSON)


def templates_in(folder: Path) -> dict[str, str]:
    """File -> its text, for all files with chat templates in a folder and its subfolders.

    Raises:
        CheckpointError: one cannot be read.
    """
    found = {}
    for path in sorted(p for kind in ("jinja", "json") for p in _files(folder, kind)):
        name = path.relative_to(folder).as_posix()
        read = is_template_file(name) or path.stat().st_size <= _MAX_BYTES
        if path.name in _UNREAD or not (read and is_companion(name)):
            continue
        try:
            text = decode(read_file(path, _MAX_BYTES))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} cannot be read", found=reason(error)) from error
        if path.suffix == ".jinja" or f'"{_KEY}"' in text:
            found[name] = text
    return {name: text for name, text in found.items() if not _has_none(name, text)}


def _files(folder: Path, ending: str) -> list[Path]:
    return [*folder.glob(f"*.{ending}"), *folder.glob(f"*/*.{ending}")]


def _has_none(name: str, text: str) -> bool:
    """Whether a file is empty, or a known JSON file without a template in its place."""
    return not (_object(name, text).get(_KEY) if name in _JSON else text)


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} cannot be read as JSON", found=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object", found=type(value).__name__)
    return value


def template_files(templates: Mapping[str, str]) -> tuple[str, ...]:
    """The files that a suffix changes: all that hold templates; see ``templates_in``.

    Raises:
        CheckpointError: one is in a place whose readers are not known.
    """
    for name in templates:
        if not is_template_file(name):
            raise CheckpointError(
                f"{name} holds a chat template, in a place where the suffix cannot be put",
                hint="remove the file if nothing reads it, or give -o suffix=none",
            )
    return tuple(templates)


def suffix_patches(templates: Mapping[str, str], suffix: str) -> dict[str, Mapping[str, Any] | str]:
    """File -> the patch that makes every template of a checkpoint put S behind user messages.

    Args:
        templates: file -> its text; see ``templates_in``.
        suffix: S; a space comes before it.

    Raises:
        OptionError: S is empty, has white space at an end, or is not one printable line.
        CheckpointError: a template has a suffix already, or cannot get one where it is stored.
    """
    if not suffix or suffix != suffix.strip() or not suffix.isprintable():
        raise OptionError(
            "-o suffix", expected="one printable line, without white space around it",
            found=ascii(suffix)[:80],
        )  # fmt: skip
    return {name: _patch(name, templates[name], suffix) for name in template_files(templates)}


def _patch(name: str, text: str, suffix: str) -> Mapping[str, Any] | str:
    if name not in _JSON:
        return _preamble(name, text, suffix)
    return {_KEY: _changed(name, _object(name, text)[_KEY], suffix)}


def _changed(name: str, value: Any, suffix: str) -> Any:
    """The changed form of a template, of an object of named templates, or of a list of them."""
    if isinstance(value, str):
        return _preamble(name, value, suffix) + value
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return {key: _changed(name, text, suffix) for key, text in value.items()}
    if isinstance(value, list) and all(_is_named(entry) for entry in value):
        return [{**e, "template": _changed(name, e["template"], suffix)} for e in value]
    raise CheckpointError(
        f"{name} holds chat templates in a form that the suffix cannot be put into",
        expected="a text, or texts with names", found=type(value).__name__,
    )  # fmt: skip


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("template"), str)


def _preamble(name: str, template: str, suffix: str) -> str:
    """The preamble of a template.

    White space at a template's beginning matters for transformers, which drops a line end behind a
    tag. So such a template starts on a new line, and any other one follows at once.
    """
    if _MARK in template:
        raise CheckpointError(
            f"the chat template in {name} has a suffix of gloss-convert already",
            hint="give the model that it was made from, or -o suffix=none",
        )
    return _begun(suffix) + _ENDS[template[:1].isspace()]


_ENDS = ("-%}", "%}\n")
"""Of the preamble, before a template that begins with something to see and with white space."""


def _begun(suffix: str) -> str:
    """The preamble but for its end, with S as a string of Jinja."""
    escaped = suffix.replace("\\", "\\\\").replace('"', '\\"')
    return _PREAMBLE.replace("SUFFIX", f'" {escaped}"')


def puts_suffix(patch: Mapping[str, Any] | str, suffix: str) -> bool:
    """Whether a patch makes every template that it changes put this suffix, and no other."""
    begun = tuple(_begun(suffix) + end for end in _ENDS)
    if isinstance(patch, str):
        return bool(suffix) and patch in begun
    value = patch.get(_KEY, {})
    if isinstance(value, str):
        return bool(suffix) and value.startswith(begun)
    if isinstance(value, list) and all(map(_is_named, value)):
        value = dict(enumerate(entry["template"] for entry in value))
    return isinstance(value, Mapping) and all(
        isinstance(text, str) and puts_suffix({_KEY: text}, suffix) for text in value.values()
    )
