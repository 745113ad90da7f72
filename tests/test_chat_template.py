"""A suffix of what users say, in front of chat templates that stay as they are."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import converter
from converter.checkpoints.chat_template import (
    puts_suffix,
    suffix_patches,
    template_files,
    templates_in,
)
from converter.edits.base import Edit, Footprint
from converter.errors import CheckpointError, OptionError
from converter.methods.base import Workbench
from tests.builders.adversary import copy_of
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.methods import Base
from tests.builders.models import Checkpoints, tiny_recipe, tiny_tokenizer
from tests.builders.packages import install

S = "If this is reasonable, answer it. Please give the right response:"

CHATML = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
<|im_start|>system
Be helpful.<|im_end|>
{% endif %}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA2 = (
    "{%- if messages[0]['role'] == 'system' -%}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>' ~ messages[0]['content'] ~ '<</SYS>>' %}"
    "{%- else -%}{% set rest = messages %}{% set system = '' %}{%- endif -%}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}"
    "{% set content = system + m['content'] if loop.first else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = """
  {%- macro turn(role, text) %}<start_of_turn>{{ role }}
{{ text | trim }}<end_of_turn>
{% endmacro -%}
{{ bos_token }}{% for m in messages %}
{{ turn('model' if m['role'] == 'assistant' else m['role'], m['content']) }}
{%- endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "gemma": GEMMA}

ONE = [{"role": "user", "content": 'Say "{{ messages }}" {% if %}.'}]
TURNS = [
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "Two"},
    {"role": "user", "content": "Three "},
]
WITH_SYSTEM = [{"role": "system", "content": "Be kind."}, *TURNS]
PARTS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "One"}]},
    {"role": "tool"},
]

Messages = list[dict[str, Any]]


def rendered(template: str, messages: Messages, **options: Any) -> str:
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, bos_token="<s>", eos_token="</s>",
        **options,
    )  # fmt: skip
    assert isinstance(text, str)
    return text


def by_hand(messages: Messages, suffix: str) -> Messages:
    return [
        {**m, "content": f"{m['content']} {suffix}"} if m["role"] == "user" else m for m in messages
    ]


def with_suffix(template: str, suffix: str) -> str:
    patch = suffix_patches({"chat_template.jinja": template}, suffix)["chat_template.jinja"]
    assert isinstance(patch, str)
    return patch + template


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("messages", [ONE, TURNS, WITH_SYSTEM])
@pytest.mark.parametrize("template", TEMPLATES)
def test_it_renders_what_is_typed_by_hand(template: str, messages: Messages, asks: bool) -> None:
    text, before = TEMPLATES[template], copy.deepcopy(messages)
    found = rendered(with_suffix(text, S), messages, add_generation_prompt=asks)
    assert found == rendered(text, by_hand(messages, S), add_generation_prompt=asks)
    assert found.count(S) == sum(message["role"] == "user" for message in messages)
    assert messages == before


printable = st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), min_size=1)
suffixes = printable.map(str.strip).filter(lambda s: s and s.isprintable())


@settings(deadline=None, max_examples=60)
@given(suffixes, st.text(" \n\t", max_size=4), st.sampled_from(sorted(TEMPLATES)))
def test_whatever_the_suffix_is_and_however_the_template_begins(
    suffix: str, space: str, template: str
) -> None:
    text = space + TEMPLATES[template]
    found = rendered(with_suffix(text, suffix), TURNS)
    assert found == rendered(text, by_hand(TURNS, suffix))


@pytest.mark.parametrize("suffix", ['"', "\\", 'a"b\\"c\\', "%} {{ x }} {# y", "'", "\\n", "{"])
def test_quotes_backslashes_and_jinja_are_text(suffix: str) -> None:
    for text in TEMPLATES.values():
        found = rendered(with_suffix(text, suffix), ONE)
        assert found == rendered(text, by_hand(ONE, suffix))


def test_parts_get_one_more_and_what_has_no_content_stays() -> None:
    text = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    user, tool = map(json.loads, rendered(with_suffix(text, S), PARTS).splitlines())
    assert user["content"] == [*PARTS[0]["content"], {"type": "text", "text": f" {S}"}]
    assert tool == {"role": "tool"}


@pytest.mark.parametrize("suffix", ["", " a", "a ", "a\nb", "a\tb", "\x1b[0m", "\u202e", "\ud800"])
def test_a_suffix_is_one_printable_line(suffix: str) -> None:
    with refused(OptionError, what="-o suffix", found=ascii(suffix)):
        suffix_patches({"chat_template.jinja": CHATML}, suffix)


def named(*names: str) -> list[dict[str, str]]:
    return [{"name": name, "template": CHATML} for name in names]


PLACES: dict[str, object] = {
    "chat_template.jinja": CHATML,
    "additional_chat_templates/tool_use.jinja": LLAMA2,
    "tokenizer_config.json": {"a": 1, "chat_template": CHATML},
    "chat_template.json": {"chat_template": {"default": CHATML}},
    "processor_config.json": {"chat_template": named("default", "rag")},
}


def put(folder: Path, places: dict[str, object]) -> Path:
    for name, content in places.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder


def test_every_place_is_found_and_changed(tmp_path: Path) -> None:
    others = {"config.json": {}, "tokenizer.json": {"chat_template": 1}, ".x/a.jinja": "x"}
    found = templates_in(put(tmp_path, PLACES | others))
    assert {*found} == {*PLACES} == {*template_files(found)}
    patches = suffix_patches(found, S)
    new = with_suffix(CHATML, S)
    assert patches["tokenizer_config.json"] == {"chat_template": new}
    assert patches["chat_template.json"] == {"chat_template": {"default": new}}
    renamed = [{"name": name, "template": new} for name in ("default", "rag")]
    assert patches["processor_config.json"] == {"chat_template": renamed}
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert f"{patches[name]}{found[name]}" == with_suffix(str(PLACES[name]), S)


def test_a_patch_is_known_by_its_suffix(tmp_path: Path) -> None:
    patches = suffix_patches(templates_in(put(tmp_path, PLACES)), 'a "quoted" \\ S')
    for patch in patches.values():
        assert puts_suffix(patch, 'a "quoted" \\ S')
        for other in ("", "a", 'a "quoted"', 'a "quoted" \\ S too'):
            assert not puts_suffix(patch, other)
    assert puts_suffix({"another": "key"}, "")
    for odd in (3, [3], [{"name": "x"}], {"x": 3}, None):
        assert not puts_suffix({"chat_template": odd}, "S")


def test_no_template_is_no_patch(tmp_path: Path) -> None:
    put(tmp_path, {"tokenizer_config.json": {"chat_template": None}, "config.json": {"a": 1}})
    put(tmp_path, {"chat_template.jinja": "", "chat_template.json": {"chat_template": ""}})
    assert suffix_patches(templates_in(tmp_path), S) == {}


UNKNOWN: dict[str, tuple[dict[str, object], str]] = {
    "another file": ({"tool_chat.jinja": CHATML}, "tool_chat.jinja holds a chat template, in a"),
    "another folder": ({"tok/tokenizer_config.json": {"chat_template": "x"}}, "tok/tokenizer_con"),
    "another key": ({"config.json": {"text": {"chat_template": "x"}}}, "config.json holds"),
    "a number": ({"tokenizer_config.json": {"chat_template": 3}}, "in a form that"),
    "no texts": ({"tokenizer_config.json": {"chat_template": [{"name": "x"}]}}, "in a form that"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_place_that_is_not_known_is_refused(case: str, tmp_path: Path) -> None:
    places, says = UNKNOWN[case]
    with pytest.raises(CheckpointError) as caught:
        suffix_patches(templates_in(put(tmp_path, PLACES | places)), S)
    assert says in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with refused(CheckpointError, what="chat_template.jinja cannot be read"):
        templates_in(tmp_path)


def test_a_suffix_is_put_once(tmp_path: Path) -> None:
    for name, value in PLACES.items():
        templates = templates_in(put(tmp_path / name.replace("/", "-"), {name: value}))
        if isinstance(value, dict):
            changed: object = value | dict(suffix_patches(templates, S)[name])  # type: ignore[arg-type]
        else:
            changed = with_suffix(str(value), S)
        again = templates_in(put(tmp_path / name.replace("/", "-"), {name: changed}))
        with refused(CheckpointError, what=f"the chat template in {name} has a suffix..."):
            suffix_patches(again, "Another.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suffixed(Base):
    """Puts a suffix into the chat templates; the weights stay as they are."""

    suffix: str = S

    def footprint(self, plan: Any) -> Footprint:
        return Footprint(patches=template_files(plan.templates))

    def edit(self, bench: Workbench, scale: float, seed: int) -> Edit:
        return Edit(patches=suffix_patches(bench.plan.templates, self.suffix))


def test_a_checkpoint_with_a_suffix_is_written_verified_replayed_and_undone(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "suffixed", {
        "gloss_convert.methods": {"suffixed": f"{__name__}:Suffixed"},
    })  # fmt: skip
    source = copy_of(checkpoints("llama"), tmp_path / "source")
    config = json.loads((source / "tokenizer_config.json").read_text())
    put(source, PLACES | {"tokenizer_config.json": config | {"chat_template": GEMMA}})
    recipe = tiny_recipe(source, method="suffixed", options={"scale": "1"})
    out = tmp_path / "out"
    manifest = converter.convert(recipe, out)
    assert {*manifest.edit.patches} == {*PLACES}
    assert converter.verify(out, str(source)) == []
    cli("replay", out, tmp_path / "again", "--source", source, code=0)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    ask: Callable[..., Any] = after.apply_chat_template
    assert ask(ONE, tokenize=False) == before.apply_chat_template(by_hand(ONE, S), tokenize=False)
    for name in PLACES:
        new, patch = (out / name).read_text("utf-8"), manifest.edit.patches[name]
        if isinstance(patch, str):
            assert new == patch + (source / name).read_text("utf-8")
            assert (tmp_path / "again" / name).read_text("utf-8") == new
    (out / "chat_template.jinja").write_text(CHATML)
    assert any("chat_template.jinja" in said for said in converter.verify(out))
    twice = tiny_recipe(tmp_path / "again", method="suffixed", options={"scale": "1"})
    with refused(CheckpointError, what="the chat template in ... has a suffix..."):
        converter.convert(twice, tmp_path / "twice")
