"""What experiments find in decoder layers: those of real classes, and layers made to mislead."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from converter.checkpoints.architectures import library
from converter.checkpoints.architectures.experiments import (
    Layer,
    check_unshared,
    decoder_layers,
    record,
)
from converter.checkpoints.architectures.ffn import (
    check_complete,
    check_projection,
    examine,
    find_ffns,
)
from converter.checkpoints.architectures.tiny import Tiny

_SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, "head_dim": 8,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1,
}  # fmt: skip


def _tiny(model_type: str, **more: Any) -> Tiny:
    config = library.read_config({"model_type": model_type, **_SMALL, **more}, None, False)
    config._experts_implementation = "eager"
    kind = library.class_of(config, "AutoModelForCausalLM")
    model = cast(Any, kind)._from_config(config).double().eval().requires_grad_(False)
    _randomize(model)
    ids = torch.arange(12).reshape(2, 6) * 3 % 61
    inputs = {"input_ids": ids}
    return Tiny(kind, config, model, {}, torch.float64, config.num_hidden_layers, inputs)


def _randomize(model: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1) * 0.7)


def _layers(model_type: str, **more: Any) -> list[Layer]:
    tiny = _tiny(model_type, **more)
    _, blocks, calls = decoder_layers(tiny)
    return [Layer(block, calls[block][0], tiny.tolerance) for block in blocks]


def test_a_gated_ffn_is_found_by_what_it_does() -> None:
    (ffn,) = find_ffns(_layers("llama")[1])
    assert (ffn.module, ffn.site, ffn.norm) == ("mlp", "mlp", None)
    assert ffn.weights == (("down_proj.weight", 0),)
    assert ffn.biases == ()
    assert ffn.gate
    assert ffn.up
    assert (ffn.gate.weight, ffn.gate.axis) == ("mlp.gate_proj.weight", 0)
    assert (ffn.up.weight, ffn.up.axis) == ("mlp.up_proj.weight", 0)


def test_the_gate_is_told_from_the_up_projection_where_relu_doubles_both() -> None:
    (ffn,) = find_ffns(_layers("llama", hidden_act="relu")[0])
    assert ffn.gate
    assert ffn.gate.module == "mlp.gate_proj"
    assert ffn.up
    assert ffn.up.module == "mlp.up_proj"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("self_attn", "mixes positions"),
        ("self_attn.o_proj", "linear map"),
        ("self_attn.v_proj", "linear map"),
        ("mlp.up_proj", "linear map"),
        ("mlp.gate_proj", "linear map"),
        ("input_layernorm", "no matrices"),
        ("mlp.act_fn", "no matrices"),
        ("feed_forward", "no feed_forward"),
    ],
)
def test_what_is_no_ffn_is_refused(module: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        examine(_layers("llama")[0], module)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_axis_is_found_in_square_weights(model_type: str) -> None:
    layer = _layers(model_type, intermediate_size=16, n_inner=16, n_embd=16, n_head=2, n_layer=2)[0]
    (ffn,) = find_ffns(layer)
    ((name, axis),) = ffn.weights
    assert (name, axis) == {"llama": ("down_proj.weight", 0), "gpt2": ("c_proj.weight", 1)}[
        model_type
    ]
    biases = dict.fromkeys(ffn.biases, 0)
    check_projection(layer, ffn.module, {name: axis, **biases})
    with pytest.raises(ValueError, match="does not project what mlp gives"):
        check_projection(layer, ffn.module, {name: 1 - axis, **biases})


def test_a_bias_that_writes_must_be_projected_too() -> None:
    layer = _layers("gpt2", n_embd=16, n_head=2, n_layer=2)[0]
    (ffn,) = find_ffns(layer)
    assert ffn.biases == ("c_proj.bias",)
    with pytest.raises(ValueError, match="something else"):
        check_projection(layer, "mlp", dict(ffn.weights))


def test_a_norm_after_the_ffn_and_what_it_adds_to_its_weight() -> None:
    (ffn,) = find_ffns(_layers("gemma2")[0])
    assert (ffn.module, ffn.site) == ("mlp", "post_feedforward_layernorm")
    assert ffn.norm
    assert ffn.norm.weight == "post_feedforward_layernorm.weight"
    assert ffn.norm.offset == 1


def test_experts_and_the_shared_one_are_one_ffn() -> None:
    layer = _layers("qwen2_moe", **_EXPERTS)[0]
    (ffn,) = find_ffns(layer)
    assert ffn.module == "mlp"
    assert ffn.weights == (("experts.down_proj", 1), ("shared_expert.down_proj.weight", 0))
    for part in ("mlp.experts", "mlp.shared_expert"):
        with pytest.raises(ValueError, match=f"{part} is not all of the FFN mlp"):
            examine(layer, part)
    for left_out in dict(ffn.weights):
        some = {name: axis for name, axis in ffn.weights if name != left_out}
        with pytest.raises(ValueError, match="something else adds to it"):
            check_projection(layer, "mlp", some)
    with pytest.raises(ValueError, match="linear map"):
        examine(layer, "mlp.gate")


def test_layers_with_and_without_experts() -> None:
    dense, sparse = (find_ffns(layer) for layer in _layers("deepseek_v3", **_EXPERTS))
    assert [ffn.weights for ffn in dense] == [(("down_proj.weight", 0),)]
    (ffn,) = sparse
    assert ffn.weights == (("experts.down_proj", 1), ("shared_experts.down_proj.weight", 0))


@pytest.mark.parametrize("before", [True, False])
def test_an_ffn_that_is_no_module_with_norms_before_or_after(before: bool) -> None:
    layer = _layers("opt", ffn_dim=24, do_layer_norm_before=before, word_embed_proj_dim=16)[0]
    (ffn,) = find_ffns(layer)
    assert (ffn.module, ffn.site, ffn.norm) == ("fc2", "fc2", None)
    assert ffn.weights == (("weight", 0),)
    assert ffn.biases == ("bias",)
    assert ffn.up
    assert ffn.up.module == "fc1"
    for wrong in ("fc1", "self_attn.out_proj", "self_attn", "final_layer_norm"):
        with pytest.raises(ValueError, match=wrong):
            examine(layer, wrong)


def test_an_ffn_beside_attention() -> None:
    (ffn,) = find_ffns(_layers("cohere")[0])
    assert (ffn.module, ffn.weights) == ("mlp", (("down_proj.weight", 0),))


def test_a_cache_is_as_it_was_in_each_replay() -> None:
    tiny = _tiny("llama")
    tiny.inputs["use_cache"] = cast(Any, True)
    _, blocks, calls = decoder_layers(tiny)
    layer = Layer(blocks[1], calls[blocks[1]][0], tiny.tolerance)
    for _ in range(3):
        assert torch.equal(layer.call.again(blocks[1]), layer.given)
    assert not layer.is_position_wise("self_attn")


# --- layers made to mislead


class _Mlp(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width, bias=False), nn.Linear(width, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(functional.silu(self.up(x)))
        return found


class _Attention(nn.Module):
    """Attends with scores that are as sharp as ``scale`` says, to a memory if it has one."""

    def __init__(self, scale: float = 1.0, memory: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.scale, self.memory = scale, torch.randn(2, 5, 8).double() if memory else None

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.memory is None else self.memory
        scores = self.q(x) @ self.k(other).mT * self.scale
        if self.memory is None:
            scores = scores + torch.full((5, 5), float("-inf")).triu(1)
        mixed: Tensor = self.o(scores.softmax(-1) @ self.v(other))
        return mixed


class _InPlace(nn.Module):
    """Adds attention to what its FFN gives, where that is."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = _Attention(), _Mlp()

    def forward(self, hidden_states: Tensor) -> Tensor:
        found = cast(Tensor, self.mlp(hidden_states))
        found += self.attention(hidden_states)
        return hidden_states + found


class _Block(nn.Module):
    """Attention, an FFN, and something after it, each added to the residual stream."""

    def __init__(self, after: nn.Module | None = None, **more: Any) -> None:
        super().__init__()
        self.attention = more.get("attention", _Attention())
        self.mlp, self.after = more.get("mlp", _Mlp()), after or nn.Identity()
        self.scale = nn.Parameter(torch.ones(8)) if more.get("scale") else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x: Tensor = hidden_states + self.attention(hidden_states)
        added: Tensor = self.after(self.mlp(x))
        return x + (added if self.scale is None else self.scale * added)


def _layer(block: nn.Module) -> Layer:
    block.double().eval().requires_grad_(False)
    _randomize(block)
    state = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).double()
    (call,) = record([block], lambda: block(state))[block]
    return Layer(block, call, 1e-6)


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(x.mT, (1, 0))
        return functional.conv1d(padded, self.weight, groups=8).mT


class _Summed(nn.Module):
    """A norm of the sum of two FFNs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = _Mlp(), _Mlp(), nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.first(x) + self.second(x))
        return found


class _GatedNorm(nn.Module):
    """A norm that is not linear, and has matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x * torch.sigmoid(self.gate(x))


class _WithIdentity(nn.Module):
    """Experts of which one gives what it is given; a bias hides it from the router."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _Mlp(), _Mlp()
        self.router, self.preference = nn.Linear(8, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        far = torch.tensor([0.0, 0.0, -1e3]) * (self.preference[0] != self.preference[1])
        chosen = functional.one_hot((self.router(x) + far).argmax(-1), 3).to(x.dtype)
        outputs = torch.stack([self.first(x), self.second(x), x], -1)
        return (outputs * chosen.unsqueeze(-2)).sum(-1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("memory", [False, True])
def test_attention_is_no_ffn_however_sharp_it_is(scale: float, memory: bool) -> None:
    layer = _layer(_Block(attention=_Attention(scale, memory)))
    assert not layer.is_position_wise("attention")
    assert [ffn.module for ffn in find_ffns(layer)] == ["mlp"]
    with pytest.raises(ValueError, match="mixes positions"):
        examine(layer, "attention")
    with pytest.raises(ValueError, match="linear map"):
        examine(layer, "attention.o")


def test_a_scale_of_each_channel_that_is_a_module_is_like_a_norm() -> None:
    (ffn,) = find_ffns(_layer(_Block(_Scale())))
    assert ffn.site == "after"
    assert ffn.norm
    assert (ffn.norm.weight, ffn.norm.offset) == ("after.gamma", 0)


def test_a_norm_without_weights_gives_a_multiple() -> None:
    (ffn,) = find_ffns(_layer(_Block(nn.RMSNorm(8, elementwise_affine=False))))
    assert (ffn.site, ffn.norm) == ("after", None)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: _Block(nn.LayerNorm(8)), "is after, which subtracts the mean of each position"),
        (lambda: _Block(nn.Sequential(nn.RMSNorm(8), nn.RMSNorm(8))), "is after, which is no norm"),
        (lambda: _Block(_Convolution()), "it goes through after, which mixes positions"),
        (lambda: _Block(nn.Linear(8, 8)), "it goes through after, which has matrices"),
        (lambda: _Block(nn.Tanh()), "after"),
        (lambda: _Block(scale=True), "scale multiplies each channel by another number"),
        (lambda: _Block(mlp=_WithIdentity()), "experts do that give what they are given"),
        (
            lambda: _Block(mlp=_Summed()),
            "no weight of mlp writes what it gives: mlp.norm, which is in it, comes after them",
        ),
    ],
)
def test_what_is_in_the_way_is_named(block: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        find_ffns(_layer(block()))


def test_a_refused_ffn_is_not_passed_over_for_another() -> None:
    class Two(_Block):
        def __init__(self) -> None:
            super().__init__(_Convolution())
            self.other = _Mlp()

        def forward(self, hidden_states: Tensor) -> Tensor:
            found: Tensor = super().forward(hidden_states) + self.other(hidden_states)
            return found

    with pytest.raises(ValueError, match="mixes positions"):
        find_ffns(_layer(Two()))


def test_an_ffn_whose_output_is_changed_in_place() -> None:
    assert [ffn.module for ffn in find_ffns(_layer(_InPlace()))] == ["mlp"]


def test_a_norm_with_a_gate_before_attention_is_no_ffn() -> None:
    layer = _layer(_Block(attention=nn.Sequential(_GatedNorm(), _Attention())))
    assert [ffn.module for ffn in find_ffns(layer)] == ["mlp"]

    class Flat(_Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm = _GatedNorm()

        def forward(self, hidden_states: Tensor) -> Tensor:
            x: Tensor = hidden_states + self.attention(self.norm(hidden_states))
            return x + cast(Tensor, self.mlp(x))

    assert [ffn.module for ffn in find_ffns(_layer(Flat()))] == ["mlp"]


class _Streams(nn.Module):
    """Four residual streams that an FFN reads and writes; one of them perhaps by channels."""

    def __init__(self, by_channels: bool) -> None:
        super().__init__()
        self.read, self.mlp, self.gains = nn.Linear(8, 1), _Mlp(), nn.Parameter(torch.ones(8))
        self.by_channels = by_channels

    def forward(self, hidden_states: Tensor) -> Tensor:
        shares = self.read(hidden_states).softmax(-2)
        written: Tensor = shares * self.mlp((shares * hidden_states).sum(-2)).unsqueeze(-2)
        if self.by_channels:
            written = torch.cat([written[..., :3, :], written[..., 3:, :] * self.gains], -2)
        return hidden_states + written


def test_every_residual_stream_must_get_a_multiple() -> None:
    def layer(by_channels: bool) -> Layer:
        block = _Streams(by_channels).double().requires_grad_(False)
        _randomize(block)
        state = torch.randn(2, 5, 4, 8).double()
        (call,) = record([block], lambda: block(state))[block]
        return Layer(block, call, 1e-6)

    assert [ffn.module for ffn in find_ffns(layer(False))] == ["mlp"]
    with pytest.raises(ValueError, match="each channel is multiplied by another number"):
        find_ffns(layer(True))


@pytest.mark.parametrize("ffn_first", [False, True])
def test_norms_of_the_residual_stream_itself(ffn_first: bool) -> None:
    class PostNorm(_Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.end = nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, hidden_states: Tensor) -> Tensor:
            parts = (self.mlp, self.attention) if ffn_first else (self.attention, self.mlp)
            x = self.norm(hidden_states + parts[0](hidden_states))
            found: Tensor = self.end(x + parts[1](x))
            return found

    layer = _layer(PostNorm())
    if ffn_first:
        with pytest.raises(ValueError, match="mixed with others, on the way"):
            find_ffns(layer)
    else:
        assert [(ffn.module, ffn.norm) for ffn in find_ffns(layer)] == [("mlp", None)]


def test_a_layer_without_an_ffn() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.RMSNorm(8), _Attention()

        def forward(self, hidden_states: Tensor) -> Tensor:
            found: Tensor = hidden_states + self.attention(self.norm(hidden_states))
            return found

    assert find_ffns(_layer(Alone())) == []


def test_an_ffn_that_runs_twice_is_not_called_none() -> None:
    class Twice(_Block):
        def forward(self, hidden_states: Tensor) -> Tensor:
            x = super().forward(hidden_states)
            found: Tensor = x + self.mlp(x)
            return found

    with pytest.raises(
        ValueError, match="no FFN is found, and the layer is not linear but for att"
    ):
        find_ffns(_layer(Twice()))


class _WithAnother(_Block):
    """A block with an FFN, and one more that is run ``times`` times, or is no module."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        if times:
            self.other = _Mlp()
        else:
            self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = super().forward(hidden_states)
        for _ in range(self.times):
            x = x + self.other(x)
        return x if self.times else x + self.fc2(functional.relu(self.fc1(x)))


@pytest.mark.parametrize("times", [0, 2])
def test_an_ffn_beside_another_is_not_passed_over(times: int) -> None:
    layer = _layer(_WithAnother(times))
    with pytest.raises(ValueError, match="beside mlp and attention something is not linear"):
        check_complete(layer, find_ffns(layer))


def test_a_module_around_attention_and_an_ffn_is_no_attention() -> None:
    class Twice(_Block):
        def forward(self, hidden_states: Tensor) -> Tensor:
            x = super().forward(hidden_states)
            found: Tensor = x + self.mlp(x)
            return found

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Twice()

        def forward(self, hidden_states: Tensor) -> Tensor:
            found: Tensor = self.inner(hidden_states)
            return found

    with pytest.raises(ValueError, match=r"the layer is not linear but for inner\.attention"):
        find_ffns(_layer(Around()))


def test_a_low_rank_map_with_a_norm_is_no_ffn() -> None:
    linear = nn.Sequential(nn.Linear(8, 3, bias=False), nn.Linear(3, 8), nn.RMSNorm(8))
    layer = _layer(_Block(mlp=linear))
    assert find_ffns(layer) == []
    with pytest.raises(ValueError, match="no activation function"):
        examine(layer, "mlp")


# --- lists of layers


class _Model(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor], **lists: nn.ModuleList) -> None:
        super().__init__()
        self.run_lists = run
        for name, blocks in lists.items():
            setattr(self, name, blocks.double())

    def forward(self, state: Tensor) -> Any:
        return SimpleNamespace(logits=self.run_lists(self, state))


def _blocks(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList(_Block() for _ in range(count))


def _through(state: Tensor, *lists: nn.ModuleList) -> Tensor:
    for blocks in lists:
        for block in blocks:
            state = block(state)
    return state


def _found(run: Callable[[Any, Tensor], Tensor], **lists: nn.ModuleList) -> str:
    model = _Model(run, **lists)
    inputs = {"state": torch.randn(2, 5, 8).double()}
    return decoder_layers(Tiny(None, None, model, {}, torch.float64, 2, inputs))[0]


def test_the_list_with_as_many_layers_as_the_config_says() -> None:
    def run(model: Any, state: Tensor) -> Tensor:
        return _through(state, model.other, model.layers)

    assert _found(run, other=_blocks(3), layers=_blocks(2)) == "layers"


def test_an_encoder_and_a_decoder_are_refused() -> None:
    def run(model: Any, state: Tensor) -> Tensor:
        return _through(state, model.encoder, model.decoder)

    with pytest.raises(ValueError, match="encoder and decoder, as of an encoder and a decoder"):
        _found(run, encoder=_blocks(), decoder=_blocks())


def test_layers_that_run_again_are_refused() -> None:
    def run(model: Any, state: Tensor) -> Tensor:
        return _through(state, model.layers, model.layers)

    with pytest.raises(ValueError, match="run several times in one pass"):
        _found(run, layers=_blocks())


def test_a_layer_that_text_does_not_run_through_is_not_called() -> None:
    tiny = Tiny(None, None, None, {}, torch.float64, 2)
    tiny.model = _Model(lambda model, state: model.layers[1](state), layers=_blocks())
    tiny.inputs = {"state": torch.randn(2, 5, 8).double()}
    _, blocks, calls = decoder_layers(tiny)
    assert [len(calls[block]) for block in blocks] == [0, 1]


def test_layers_with_a_weight_in_common_are_refused() -> None:
    first, second = _blocks()
    cast(Any, second).mlp.down = cast(Any, first).mlp.down
    with pytest.raises(ValueError, match=r"layers 0 and 1 of layers have one mlp\.down\.weight"):
        check_unshared("layers", [first, second])


def test_modules_without_hidden_states_are_no_layers() -> None:
    def run(model: Any, state: Tensor) -> Tensor:
        return state

    with pytest.raises(ValueError, match="no list of modules"):
        _found(run, layers=_blocks())
