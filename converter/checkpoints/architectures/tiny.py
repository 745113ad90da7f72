"""A tiny model of the same class: the config of a model with smaller sizes, and random weights.

Sizes are divided, not replaced, so that related sizes stay consistent: a head's width by one
number, the count of heads by another, and the width of the model by both.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from converter.checkpoints.architectures import library
from converter.checkpoints.architectures.library import MetaTensor, text_config

_VOCABULARY = 512
_FIRST_WORD, _LAST_WORD = 10, 200
"""Token ids below and above are special ones."""

_HEAD_WIDTH = 16
"""A head is made no narrower than half of this."""

_LEAST = 16
"""The least width of the model; the least width of anything in it is half of this."""

_MOST = 60_000_000
"""The most parameters of a tiny model that are not on the meta device."""

_LARGE = 1 << 20
"""The least parameters of a wrapper's weight to count as not of its language model."""

_WIDTHS = r"size|dim|embd|d_model|d_ff|dff|dim_ff|inner|rank|width|lowrank|d_ssm|d_state|d_rel"
_HEADS = re.compile(r"(\w*_)?(n_)?(heads?|kv_heads|num_query_groups|n_groups|o_groups)")
_PER_HEAD = re.compile(
    r"\w*(head_dim|d_head|headdim|d_kv|kv_channels|dim_head|head_size|rotary_dim)"
)
_WIDTH = re.compile(rf"(\w*_)?({_WIDTHS})(_mlp|_per_layer_input)?|attention_hidden_size")
_NO_WIDTH = re.compile(
    r".*(vocab|kernel|patch|image|window|chunk|block|type_|max_|conv_|group_size|ngram|beam|"
    r"num_|codebook|segment|multiple|router_).*"
)
_FREE = re.compile(r"intermediate|ffn|expert")
"""Keys of independent widths: kernels for experts want multiples of 8."""

_POSITIONS = re.compile(r"n_positions|n_ctx|max_position_embeddings|max_seq_len|max_target_\w+")
_EXPERTS = re.compile(
    r"(n_routed|num|num_local|moe_num|n|num_moe)_experts|zero_expert_num|num_experts_\w*_layer"
)
_CHOSEN = re.compile(r"(num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|experts_per_token)")
_LAYERS = re.compile(
    r"(num_hidden|n|num|decoder|num_decoder|encoder|num_encoder|vision)_?(layers?|blocks)|layers|"
    r"depth"
)
_OF_TEXT = re.compile(r"(\w*_)?(out|output|projection|text|language|llm|lm)_?(hidden|proj)?_?"
                      r"(size|dim|dims|hidden_size)")  # fmt: skip
"""Keys of other parts of a wrapper that equal the width of the language model."""


class NoTinyModelError(ValueError):
    """The reason why no tiny model of a class runs on text alone."""


@dataclass(slots=True)
class Tiny:
    """A tiny model of the class of a model.

    Attributes:
        tensors: of its checkpoint, by their names there; tensors that text does not use are on the
            meta device.
        inputs: keyword arguments of a forward pass over (B, T) tokens.
        tolerance: relative, of what is computed in the model's dtype.
        layers: its number of decoder layers.
    """

    kind: Any
    config: Any
    model: Any
    tensors: dict[str, Tensor | MetaTensor]
    dtype: torch.dtype
    layers: int
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        return 1e-6 if self.dtype == torch.float64 else 2e-3

    def run(self, model: nn.Module | None = None) -> Tensor:
        """The logits, (B, T, V)."""
        with torch.no_grad(), library.quietly():
            found: Tensor = (model or self.model)(**self.inputs).logits
        return found

    def reloaded(self, tensors: dict[str, Tensor | MetaTensor]) -> Any:
        """The model with other tensors in its checkpoint."""
        return library.load(self.kind, self.config, tensors, self.dtype)


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules of a model, among them that of its decoder layers."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    inner = {n for n in lists for other in lists if n.startswith(f"{other}.")}
    return {n: m for n, m in lists.items() if n not in inner}


def signature(block: nn.Module) -> tuple[Any, ...]:
    """A key that equal layers share: classes of modules, names and shapes of parameters and
    buffers.
    """
    kinds = sorted((name, type(module).__name__) for name, module in block.named_modules())
    shapes = sorted((name, tuple(p.shape)) for name, p in block.named_parameters())
    shapes += sorted((name, tuple(b.shape)) for name, b in block.named_buffers())
    return (*kinds, *shapes)


def make_tiny(kind: Any, config: Any, model: Any) -> Tiny:
    """A tiny model of a class.

    Args:
        config: of the model.
        model: with this config, on the meta device.

    Raises:
        ValueError: no way of shrinking the config gives a model of the same structure that runs.
    """
    _check_takes_text(kind)
    config = library.own_config(kind, config)
    errors: list[Exception] = []
    for small in _attempts(config, model):
        try:
            outline = library.on_meta(kind, small)
            _check_alike(outline, model)
            return _built(kind, small, outline)
        except Exception as error:  # a class may raise anything on wrong sizes
            errors.append(error)
        if len(errors) == 2 and str(errors[0]) == str(errors[1]):
            break  # the fault does not depend on sizes
    reason = str(errors[0]).strip().splitlines()[0] if errors else "it has no layers"
    raise NoTinyModelError(reason) from next(iter(errors), None)


def _check_takes_text(kind: Any) -> None:
    """Raise ValueError if a model of a class does not run on token ids alone."""
    if kind.forward is nn.Module.forward:
        raise NoTinyModelError(f"{kind.__name__} has no forward pass of its own")
    for name, parameter in list(inspect.signature(kind.forward).parameters.items())[1:]:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name != "input_ids":
            raise NoTinyModelError(f"{kind.__name__} does not run without {name}")


def _attempts(config: Any, model: nn.Module) -> Iterator[Any]:
    """Smaller configs. The second differs from the first in the numbers of layers and heads."""
    count = number_of_layers(config)
    kept = _layers_needed(model, count)
    more = min(3 * kept, count)
    sections = _sections_of(model)
    _, heads = _divisors(text_config(config))
    fewer = max(heads // 2, 1)
    tried = ((kept, heads), (more, fewer), (kept, 1), (count, heads), (count, 1))
    for layers, divisor in dict.fromkeys(tried):
        yield _shrunk(config, (count, layers), divisor, sections)


def number_of_layers(config: Any) -> int:
    """The language model's number of layers by its config; 0 if it does not say."""
    count = getattr(text_config(config), "num_hidden_layers", None)
    return count if type(count) is int else 0


def _layers_needed(model: nn.Module, count: int) -> int:
    """The least number of lowest layers that include every kind of layer."""
    needed = min(count, 2)
    for blocks in block_lists(model).values():
        if len(blocks) == count:
            kinds = list(map(signature, blocks))
            needed = max(needed, 1 + max(kinds.index(kind) for kind in kinds))
    return needed


def _built(kind: Any, config: Any, outline: Any) -> Tiny:
    """The model of an outline, in the widest dtype, and with the fewest weights, that it runs in.

    It is built again only for errors that depend on the dtype or on weights on the meta device.
    """
    wanted = _run_by_text(outline)
    try:
        return _filled(kind, config, outline, wanted, torch.float64)
    except Exception as error:
        if re.search(r"\bmeta\b", str(error)):
            return _filled(kind, config, outline, set(outline.state_dict()), torch.float64)
        if re.search(r"dtype|double|float", str(error), re.IGNORECASE):
            return _filled(kind, config, outline, wanted, torch.float32)
        raise


def _filled(kind: Any, config: Any, outline: Any, wanted: set[str], dtype: torch.dtype) -> Tiny:
    state = outline.state_dict()
    if sum(state[name].numel() for name in wanted) > _MOST:
        raise ValueError("no way to make it smaller")
    tensors: dict[str, Tensor | MetaTensor] = {}
    generator = torch.Generator().manual_seed(0)
    real = library.on_disk(outline, {k: v for k, v in state.items() if k in wanted}).keys()
    for name, tensor in library.on_disk(outline, state).items():
        if name in real:
            tensors[name] = _random(tensor, dtype, generator)
        else:
            tensors[name] = MetaTensor(dtype, tuple(tensor.shape))
    tiny = Tiny(kind, config, None, tensors, dtype, number_of_layers(config))
    tiny.model = tiny.reloaded(tensors)
    tiny.inputs = _inputs(tiny.model)
    if not torch.isfinite(tiny.run()).all():
        raise ValueError(f"random weights give no finite logits in {dtype}")
    return tiny


def _check_alike(small: nn.Module, model: nn.Module) -> None:
    """Raise ValueError if parts that text runs through have other parameters than in the model."""

    def names(of: nn.Module) -> set[tuple[str, int]]:
        towers = _towers(of)
        return {
            (re.sub(r"\d+", "N", name), p.ndim)
            for name, p in of.named_parameters()
            if not name.startswith(towers)
        }

    if differing := names(small) ^ names(model):
        raise ValueError(f"a smaller model has other parameters: {sorted(differing)[0][0]}")
    smaller = block_lists(small)
    for name, blocks in block_lists(model).items():
        others = smaller.get(name, ())
        kinds = {signature(block): number for number, block in reversed(list(enumerate(blocks)))}
        for number in sorted(kinds.values()):  # the first layer of each kind
            if number < len(others):
                _check_same_parameters(f"{name}.{number}", others[number], blocks[number])


def _check_same_parameters(name: str, small: nn.Module, block: nn.Module) -> None:
    """Raise ValueError if a layer of a smaller model has other parameters, such as fewer experts
    with modules of their own: a description of one would not fit the other.
    """
    one, other = ({(n, p.ndim) for n, p in b.named_parameters()} for b in (small, block))
    if differing := one ^ other:
        key = min(n for n, _ in differing)
        raise ValueError(f"a smaller model has other parameters in {name}: {key}")


def _run_by_text(model: Any) -> set[str]:
    """Names of the weights that text may run through: all except those of other parts, and large
    ones that are in no part. The first one defines the device of a model.
    """
    inside, towers = _language_models(model), _towers(model)
    first, _ = next(model.named_parameters())
    return {first} | {
        key
        for key, tensor in model.state_dict().items()
        if not key.startswith(towers) and (key.startswith(inside) or tensor.numel() <= _LARGE)
    }


def _language_models(model: Any) -> tuple[str, ...]:
    """Beginnings of names of the weights in modules that have the language model's config."""
    text = text_config(model.config)
    found = [n for n, m in model.named_modules() if getattr(m, "config", None) is text]
    return tuple(f"{n}." if n else "" for n in found) or ("",)


def _towers(model: Any) -> tuple[str, ...]:
    """Beginnings of names of the weights in other models, or outside of the language model in
    modules that have a config of another part."""
    text, inside = text_config(model.config), _language_models(model)
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if hasattr(config := getattr(module, "config", None), "get_text_config")
        and text_config(config) is not text
        and (library.is_model(module) or not name.startswith(inside))
    )


def _random(like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random values that keep the scale of hidden states. No two tensors get the same ones."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    values = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    if like.ndim < 2:
        return (0.7 + 0.3 * values).to(dtype)
    scale: float = 0.7 / max(like.shape[-2:]) ** 0.5
    return (values * scale).to(dtype)


def _inputs(model: nn.Module, batch: int = 2, length: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(_FIRST_WORD, _LAST_WORD, (batch, length), generator=generator)
    given: dict[str, Any] = {"input_ids": ids}
    more = {
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(length).expand(batch, length),
        "use_cache": False,
    }
    known = inspect.signature(model.forward).parameters
    return given | {key: value for key, value in more.items() if key in known}


def _shrunk(
    config: Any, layers: tuple[int, int], heads: int, sections: Sequence[int] | None
) -> Any:
    """A copy of a config with smaller sizes. Parts that are not the language model keep theirs.

    Args:
        layers: their number, and how many to keep.
        heads: what to divide the number of heads by.
        sections: of a rotary embedding, even if the config does not name them.
    """
    config = copy.deepcopy(config)
    library.run_experts_plainly(config)
    text = text_config(config)
    for part in (text, *_others(config, text)):
        if getattr(part, "use_cache", False):
            part.use_cache = False  # not every forward pass has the argument
    width = vars(text).get("hidden_size")
    rope = getattr(text, "rope_parameters", None)
    if sections and isinstance(rope, dict):
        for by_kind in [v for v in rope.values() if isinstance(v, dict)] or [rope]:
            by_kind.setdefault("mrope_section", list(sections))
    per_head, _ = _divisors(text)
    divide = _Divide(per_head, heads, layers, getattr(text, "n_group", None) or 1)
    divide.part(text)
    for part in _others(config, text):
        for key, value in list(vars(part).items()):
            if type(value) is not int:
                continue
            new = value
            if value == width and (part is config or _OF_TEXT.fullmatch(key)):
                new = vars(text)["hidden_size"]
            elif part is config:
                new = divide.token(key, value)
            if new != value:
                setattr(part, key, new)
    return config


def _sections_of(model: nn.Module) -> Sequence[int] | None:
    """Shares of a head in time, height and width, if a module of the model has them."""
    for module in model.modules():
        found = getattr(module, "mrope_section", None)
        found = next(iter(found.values()), None) if isinstance(found, dict) else found
        if isinstance(found, (list, tuple)):
            return found
    return None


def _others(config: Any, text: Any) -> Iterator[Any]:
    """The parts of a config that are not the language model's, including the config itself."""
    if config is text:
        return
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, dict):
            yield from _others(part, text)


def _divisors(text: Any) -> tuple[int, int]:
    """Divisors of the width of a head, and of the number of heads."""
    sizes = {k: v for k, v in vars(text).items() if type(v) is int and v > 1}
    heads = {v for k, v in sizes.items() if _HEADS.fullmatch(k) and not _PER_HEAD.fullmatch(k)}
    main = _first(text, "num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
    widths = [v for k, v in sizes.items() if _PER_HEAD.fullmatch(k)]
    hidden = _first(text, "hidden_size", "n_embd", "d_model")
    most = max(hidden // _LEAST, 1)
    widths = widths or [hidden // main]
    rotated = [int(width * _rotated_share(text)) for width in widths]
    per_head = 1
    while (
        max(widths) // (2 * per_head) >= _HEAD_WIDTH
        and all(
            width % (4 * per_head) == 0 and width // (2 * per_head) >= _HEAD_WIDTH // 2
            for width in widths
        )
        and all(width % (4 * per_head) == 0 for width in rotated)
        and 2 * per_head <= most
    ):
        per_head *= 2
    fitting = [
        number
        for number in range(2, min(main, most // per_head) + 1)
        if main % number == 0 and all(other % number == 0 or number % other == 0 for other in heads)
    ]
    return per_head, max((n for n in fitting if n < main), default=max(fitting, default=1))


def _first(part: Any, *keys: str) -> int:
    """The first of these numbers that a config has; 1 if it has none."""
    own_names = getattr(part, "attribute_map", {})
    found = (vars(part).get(own_names.get(key, key)) for key in keys)
    return next((number for number in found if type(number) is int), 1)


def _rotated_share(text: Any) -> float:
    """Of a head, that a rotary embedding turns."""
    rope = getattr(text, "rope_parameters", None) or {}
    found = rope.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1
    return float(found)


@dataclass(frozen=True, slots=True)
class _Divide:
    """Divides the sizes in a config.

    Attributes:
        per_head, heads: what to divide a head's width and the number of heads by.
        layers: their number, and how many to keep.
        groups: of experts.
    """

    per_head: int
    heads: int
    layers: tuple[int, int]
    groups: int

    def part(self, part: Any) -> None:
        """All sizes of a config, or of a part of one."""
        for key, value in list(vars(part).items()):
            if not key.startswith("_"):
                new = self.value(key, value)
                if new is not value and new != value:
                    setattr(part, key, new)
        if getattr(part, "is_heterogeneous", False):
            part.per_layer_config = self.value("", part.to_dict()["per_layer_config"])
        for name in getattr(part, "sub_configs", None) or {}:
            inner = getattr(part, name, None)
            if inner is not None and not isinstance(inner, dict):
                self.part(inner)

    def value(self, key: str, value: Any) -> Any:
        """The new value of a key."""
        whole, kept = self.layers
        if isinstance(value, dict):
            ids = "vocab" in str(key) and all(type(v) is int for v in value.values())
            items = {k: self.value("_id" if ids else k, v) for k, v in value.items()}
            if all(str(k).isdigit() for k in items):  # by layer
                items = {k: v for k, v in items.items() if int(k) < kept}
            return items
        by_layer = isinstance(value, (list, tuple)) or (
            isinstance(value, str) and "pattern" in str(key)
        )
        if by_layer and len(value) == whole > kept:
            value = value[:kept]
        if isinstance(value, (list, tuple)):
            if key == "mrope_section":
                return self._sections(list(value))
            if key in ("short_factor", "long_factor"):
                return list(value)[: max(len(value) // self.per_head, 1)]
            return type(value)(self.value(key, item) for item in value) if value else value
        return self.number(key, value) if type(value) is int else value

    def number(self, key: str, value: int) -> int:
        """A new size, or the same number if it is not a size."""
        if value < 2:
            return value
        if _EXPERTS.fullmatch(key):
            return min(value, 2 * self.groups if self.groups > 1 else 4)
        if _CHOSEN.fullmatch(key):
            return min(value, 2)
        if "vocab" in key or _POSITIONS.fullmatch(key):
            return _VOCABULARY if "vocab" in key else min(value, _VOCABULARY)
        if _LAYERS.fullmatch(key):
            return self.layers[1] if value == self.layers[0] else value
        if _PER_HEAD.fullmatch(key):
            return max(value // self.per_head, 1)
        if _HEADS.fullmatch(key):
            return value // self.heads if value % self.heads == 0 else 1
        if _WIDTH.fullmatch(key) and not _NO_WIDTH.fullmatch(key):
            divisor = self.per_head * self.heads
            divided = max(-(-value // divisor), min(value, _LEAST // 2)) if divisor > 1 else value
            free = divisor > 1 and (_FREE.search(key) or value % divisor)
            return -(-divided // 8) * 8 if free else divided
        return self.token(key, value)

    def token(self, key: str, value: int) -> int:
        """The id of a special token among those of a smaller vocabulary."""
        if re.fullmatch(r"\w*(_id|_ids|_token_index|_token)", key) and value >= _FIRST_WORD:
            return _LAST_WORD + 100 + value % (_VOCABULARY - _LAST_WORD - 100)
        return _VOCABULARY if "vocab" in key else value

    def _sections(self, sections: list[int]) -> list[int]:
        """Shares of half a head in time, height and width. Those that are equal stay so."""
        found = [section // self.per_head for section in sections]
        odd = min(range(len(sections)), key=lambda i: sections.count(sections[i]))
        found[odd] += sum(sections) // self.per_head - sum(found)
        return found
