"""Which models of this transformers can be edited, tried one by one; a draft of a data file."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from converter.checkpoints.architectures import known_models
from converter.checkpoints.architectures.architecture import Architecture
from converter.checkpoints.architectures.find import find_architecture
from converter.checkpoints.architectures.inference import NO_FFN
from converter.checkpoints.architectures.kind import allow_own_code
from converter.checkpoints.layout import MAX_CONFIG, check_config, read_json
from converter.errors import CheckpointError
from converter.hub.addresses import model_place
from converter.hub.remotes import find_remote
from converter.runtime import progress


@dataclass(frozen=True, slots=True)
class Tried:
    """One class of models.

    Attributes:
        auto_class: the class that loads it.
        title: name of the class.
        architecture: its description, if it was proved.
        reason: why it was not, else empty.
    """

    model_type: str
    auto_class: str
    title: str
    architecture: Architecture | None
    reason: str = ""

    @property
    def row(self) -> str:
        """The row of a Markdown table."""
        start = f"| `{self.model_type}` | {self.title} |"
        if self.architecture is None:
            result = "no FFN" if self.reason == NO_FFN else "refused"
            return f"{start} {result} | {self.reason if result == 'refused' else ''} |"
        without, count = self.architecture.sizes.without_ffn, len(self.architecture.layers)
        some = f", {count - len(without)} of {count} layers" if without else ""
        weights = "<br>".join(f"`{name}`" for name in self.architecture.down_projections())
        return f"{start} proved{some} | {weights} |"

    def record(self) -> dict[str, Any]:
        """The same as data for JSON."""
        found = self.architecture
        return {
            "model_type": self.model_type,
            "class": self.title,
            "auto_class": self.auto_class,
            "proved": found is not None,
            "reason": self.reason,
            "down_projections": list(found.down_projections()) if found else [],
            "layers_without_ffn": list(found.sizes.without_ffn) if found else [],
        }


_HEAD = "| `model_type` | class | result | down-projections, or why not |\n|---|---|---|---|"


def table(tried: Sequence[Tried]) -> str:
    """A Markdown table of classes, and how many of them are proved."""
    counts = []
    for auto_class in known_models.AUTO_CLASSES:
        named = set(known_models.model_types(auto_class).items())
        those = [each for each in tried if (each.model_type, each.title) in named]
        proved = sum(each.architecture is not None for each in those)
        counts.append(f"{proved} of {len(those)} that {auto_class} loads")
    rows = "\n".join([_HEAD, *(each.row for each in tried)])
    return f"{rows}\n\nProved with transformers {known_models.version()}: {', '.join(counts)}."


def examples() -> Mapping[str, Mapping[str, Any]]:
    """``model_type`` -> additions that its default config needs to run."""
    text = files("converter").joinpath("checkpoints/architectures/examples.toml").read_text("utf-8")
    return tomllib.loads(text)


def try_all(model_types: tuple[str, ...] = ()) -> Iterator[Tried]:
    """Describe and prove every class that continues text, by its default config.

    Args:
        model_types: only these.
    """
    wanted = {
        (model_type, title): auto_class
        for auto_class in reversed(known_models.AUTO_CLASSES)
        for model_type, title in known_models.model_types(auto_class).items()
        if not model_types or model_type in model_types
    }
    with progress.bar("trying", len(wanted), "classes"):
        for (model_type, title), auto_class in sorted(wanted.items()):
            yield try_one(model_type, auto_class, title)
            progress.advance(1)


def try_one(model_type: str, auto_class: str, title: str) -> Tried:
    """Describe and prove one class, by its default config."""
    config = {"model_type": model_type, **examples().get(model_type, {}), "architectures": [title]}
    try:
        return Tried(model_type, auto_class, title, find_architecture(config))
    except CheckpointError as error:
        reason = error.found if error.found and "architecture" in error.what else error.what
        return Tried(model_type, auto_class, title, None, reason.replace("|", "/"))


def draft(source: str, subfolder: str = "", *, trust_remote_code: bool = False) -> str:
    """A data file for the model of a source: the inferred description, or a form to fill in.

    Raises:
        SourceError, CheckpointError: the source has no config that can be read.
    """
    allow_own_code(trust_remote_code)
    folder = _with_config(source, subfolder)
    config = read_json(folder / "config.json", MAX_CONFIG)
    check_config(config)
    lines = [f'model_type = "{config.get("model_type")}"']
    try:
        found = find_architecture(config, folder)
    except CheckpointError as error:
        lines += [f"# {line}" for line in str(error).splitlines()] + [
            "# The list of decoder layers in the class, and the feed-forward networks in a layer:",
            'blocks = "model.layers"',
            'ffns = ["mlp"]',
        ]
        return "\n".join(lines)
    start = f"{found.block}."
    ffns = dict.fromkeys(
        ffn.module.removeprefix(start) for kind in found.kinds for ffn in kind.ffns
    )
    named = ", ".join(f'"{name}"' for name in ffns)
    lines += [f'blocks = "{found.block.removesuffix(".{layer}")}"', f"ffns = [{named}]"]
    lines += ["# Inferred and proved, so that no file is needed:", *_described(found)]
    return "\n".join(lines)


def _with_config(source: str, subfolder: str) -> Path:
    """A folder with the config of a source, and the code beside it."""
    place, subfolder = model_place(source, subfolder)
    if Path(place).is_dir():
        return Path(place) / subfolder
    remote = find_remote(place)
    inside = f"{subfolder}/" if subfolder else ""
    wanted = [n for n in remote.sizes if n.startswith(inside) and n.endswith((".json", ".py"))]
    small = [n for n in wanted if remote.sizes[n] <= MAX_CONFIG] or [f"{inside}config.json"]
    return remote.download(small, first=True) / subfolder


def _described(found: Architecture) -> Iterator[str]:
    """A description as comments."""
    yield f"#   {found.title}, loaded by {found.auto_class}"
    for number, kind in enumerate(found.kinds):
        layers = [n for n, other in enumerate(found.layers) if other == number]
        yield f"#   layers {', '.join(map(str, layers))}:" + ("" if kind.ffns else " no FFN")
        for ffn in kind.ffns:
            yield f"#     reaches the residual stream from {ffn.site}"
            for weight in ffn.weights:
                yield (
                    f"#     {weight.weight} {list(weight.shape)}, outputs along axis "
                    f"{weight.output_axis}"
                )
            if ffn.norm:
                yield f"#     behind the norm {ffn.norm} + {ffn.norm_offset}"
        for role, spec in kind.roles.items():
            part = f", part {spec.part[0] + 1} of {spec.part[1]}" if spec.part[1] > 1 else ""
            yield f"#     {role}: {spec.weight}{part}"
    yield f"#   embedding: {found.embedding}"
    if found.head:
        yield f"#   head: {found.head.weight}"
    if found.final_norm:
        yield f"#   final norm: {found.final_norm} + {found.norm_offset}"
