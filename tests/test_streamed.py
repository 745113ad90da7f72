"""A model that is run a layer at a time gives what it gives when it is in memory as a whole."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter.calibration.collect import causal_moments, moments_within
from converter.checkpoints.names import EDIT_FILE
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import TensorInfo
from converter.checkpoints.safetensors.rewrite import read_raw
from converter.checkpoints.source import Source
from converter.edits.base import Edit
from converter.edits.edit_file import load_bases
from converter.errors import CheckpointError, ConverterError, OptionError, SourceError
from converter.models import loading as models
from converter.models import placement as mode
from converter.models.batching import Encoder, batches, logit_positions
from converter.models.edited import edited, lowest_layer, module_edits
from converter.models.likelihood import entering, log_probabilities
from converter.models.placement import choose_forward
from converter.models.resident import LanguageModel, Model
from converter.models.streamed import StreamedModel
from converter.models.streamed_memory import HiddenStates
from converter.recipe import Settings, parse_size
from converter.runtime import memory, progress
from tests.builders.edits import removal
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import (
    HIDDEN,
    LAYERS,
    OTHER_LAYOUTS,
    TINY_MODELS,
    Checkpoints,
    planned,
    tiny_tokenizer,
)
from tests.test_formats import as_pickles
from tests.test_plan import VARIANTS
from tests.test_quantization import BLOCKS, as_fp8

TEXTS = [
    "the river rises in a range of low hills",
    "short",
    "a lease sets out the rights and duties of the person who owns a building",
    "glass is neither a crystal nor an ordinary liquid, it is something else",
    "you stupid idiot, get out",
]
ALL = range(LAYERS)


@dataclass
class Opened:
    """A checkpoint with its plan, and its model in both ways."""

    source: Source
    plan: Plan
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, folder: Path) -> "Opened":
        return cls(*planned(folder))

    def resident(self) -> LanguageModel:
        return models.load_language_model(
            self.source, self.plan, tiny_tokenizer(), self.dtype, "cpu"
        )

    def streamed(self, budget: int = 10**9) -> StreamedModel:
        return models.stream_language_model(
            self.source, self.plan, tiny_tokenizer(), self.dtype, "cpu", budget
        )

    def modules(self, site: str = "ffn", layers: Any = ALL) -> dict[int, tuple[str, ...]]:
        architecture = self.plan.architecture
        if site == "ffn":
            return {layer: architecture.sites(layer) for layer in layers}
        if site == "final":
            return {LAYERS: ()}
        return {layer: (architecture.block.format(layer=layer),) for layer in layers}


def activations(
    model: Model, modules: dict[int, tuple[str, ...]], size: int = 3
) -> dict[tuple[int, int], Tensor]:
    """(layer, text) -> activations of its tokens."""
    encode = Encoder(model.tokenizer, model.module)
    batched = batches([encode(text, "mean", ()) for text in TEXTS], size, "cpu")
    found: dict[tuple[int, int], Tensor] = {}

    def show(number: int, layer: int, f: Tensor) -> None:
        for row, values, mask in zip(
            batched[number].rows, f, batched[number].mask.bool(), strict=True
        ):
            assert (layer, row) not in found
            found[layer, row] = values[mask].clone()

    model.visit(modules, batched, show)
    return found


def log_p(model: Model) -> Tensor:
    """Of all tokens of the texts."""
    encode = Encoder(model.tokenizer, model.module)
    (values,) = log_probabilities(model, [[encode(text, "mean", ()) for text in TEXTS]])
    return torch.cat([torch.from_numpy(x) for x in values])


def predicted(model: Model) -> list[Any]:
    encode = Encoder(model.tokenizer, model.module)
    return [encode.predicted(text) for text in TEXTS]


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative to what is expected, which must be something."""
    assert float(expected.norm()) > 0
    return float((found - expected).norm() / expected.norm())


ROUNDING = 1e-5


@pytest.mark.parametrize("kind", sorted(TINY_MODELS | OTHER_LAYOUTS))
def test_in_every_architecture_streaming_gives_the_same(
    kind: str, checkpoints: Checkpoints
) -> None:
    """Activations of FFNs, of layers and before the head, log-probabilities with and without an
    edit, gradients.

    ``pytest -rP`` shows the largest difference of each architecture.
    """
    opened = Opened.of(checkpoints(kind))
    whole, streamed = opened.resident(), opened.streamed()
    differences: dict[str, float] = {}
    for site, seen in {"ffn": ALL, "block": ALL, "final": [LAYERS]}.items():
        a, b = (activations(m, opened.modules(site)) for m in (streamed, whole))
        assert a.keys() == b.keys() == {(n, i) for n in seen for i in range(len(TEXTS))}
        differences[site] = max(difference(a[key], b[key]) for key in b)
    plain = [log_p(m) for m in (streamed, whole)]
    differences["log p"] = float((plain[0] - plain[1]).abs().max())
    basis = torch.linalg.qr(torch.randn(HIDDEN, 4, generator=torch.manual_seed(0)))[0]
    edit = removal(opened.plan, {1: basis, 4: basis})
    hooked = []
    for model in (streamed, whole):
        with edited(model.module, opened.plan, edit):
            hooked.append(log_p(model))
    differences["edited"] = float((hooked[0] - hooked[1]).abs().max())
    assert float((hooked[1] - plain[1]).abs().max()) > 1e-3
    for layers in (ALL, (2, 4)):
        modules = opened.modules(layers=layers)
        a2, b2 = (dict(causal_moments(m, modules, predicted(m))) for m in (streamed, whole))
        assert sorted(a2) == sorted(b2) == sorted(layers)
        differences[f"gradients of {len(layers)}"] = max(difference(a2[n], b2[n]) for n in b2)
    print(f"{kind}: largest difference {max(differences.values()):.1e}")
    assert max(differences.values()) < ROUNDING, differences
    assert not streamed.weights.loaded


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss"])
def test_the_size_of_batches_and_where_hidden_states_are_kept_do_not_matter(
    kind: str, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened.of(checkpoints(kind))
    kept, filed = opened.streamed(), opened.streamed()
    filed._held = 3000  # some in memory, most in the file
    sizes: list[int] = []
    leave = HiddenStates.__exit__

    def noted(states: HiddenStates, *reason: object) -> None:
        sizes.append(states.filed)
        leave(states, *reason)

    monkeypatch.setattr(HiddenStates, "__exit__", noted)
    expected = activations(opened.resident(), opened.modules())
    for size in (1, 3, len(TEXTS)):
        found = [activations(m, opened.modules(), size) for m in (kept, filed)]
        for key in expected:
            assert torch.equal(found[0][key], found[1][key])
            assert difference(found[0][key], expected[key]) < ROUNDING
    assert torch.equal(log_p(kept), log_p(filed))
    basis = torch.linalg.qr(torch.randn(HIDDEN, 5, generator=torch.manual_seed(0)))[0]
    modules = opened.modules(layers=(1, 2, 4))
    sums = [
        moments_within(m, modules, [(predicted(m), None), (predicted(m)[:3], 4)], basis)
        for m in (kept, filed, opened.resident())
    ]
    for a, b, c in zip(*sums, strict=True):
        assert torch.equal(a, b)
        assert difference(a, c) < ROUNDING
    assert sizes[::2] == [0] * (len(sizes) // 2)
    assert all(size > 0 for size in sizes[1::2])
    assert not list(tmp_path.rglob("tmp*"))  # the file has no name


def test_hidden_states_keep_their_places(tmp_path: Path) -> None:
    a, b, c = torch.randn(3, 10, 4)
    half = torch.randn(10, 4).bfloat16()
    with HiddenStates(200, tmp_path / "new") as states:
        for name, tensor in (("a", a), ("b", b), ("half", half)):
            states.put(name, tensor)
        assert states.filed == b.nbytes + half.nbytes
        states.put("b", c)
        assert states.filed == b.nbytes + half.nbytes
        assert torch.equal(states.get("a", "cpu"), a)
        assert torch.equal(states.get("b", "cpu"), c)
        assert torch.equal(states.get("half", "cpu"), half)
        states.drop("a")
        states.put("d", b)  # there is room again
        assert states.filed == b.nbytes + half.nbytes
        assert list((tmp_path / "new").iterdir()) == []


class Reads:
    """What is read of a checkpoint, while each part is loaded."""

    def __init__(self, model: StreamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.bytes, self.names, self.most = model, 0, list[str](), 0
        self.layers: list[list[str]] = []
        self.embedding: dict[str, bool] = {}

        def read(file: Any, info: TensorInfo) -> Tensor:
            self.bytes += info.nbytes
            self.names.append(info.name)
            return read_raw(file, info)

        monkeypatch.setattr(models, "read_raw", read)
        load = model.weights.load

        def loading(part: str) -> None:
            load(part)
            self.layers.append(self.in_memory())
            self.embedding[part] = not model.module.get_input_embeddings().weight.is_meta

        monkeypatch.setattr(model.weights, "load", loading)

    def in_memory(self) -> list[str]:
        """The layers of which a parameter is in memory."""
        pattern = r"^((.*\.)?(layers|h|blocks)\.\d+)\."
        names = (n for n, p in self.model.module.named_parameters() if not p.is_meta)
        found = (re.match(pattern, name) for name in names)
        return sorted({match[1] for match in found if match})

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.bytes, self.names, self.layers = 0, [], []
        yield


@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "mixtral", "gpt2", "gemma3", "deepseek_v3"]
)
def test_every_byte_is_read_once_in_a_pass_and_one_layer_is_in_memory(
    kind: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened.of(checkpoints(kind))
    model = opened.streamed()
    reads = Reads(model, monkeypatch)
    sizes = {
        info.name: info.nbytes
        for header in opened.plan.headers.values()
        for info in header.tensors.values()
        if not re.search("vision|multi_modal|visual", info.name)
    }
    found = {name: re.search(r"(layers|h)\.(\d+)\.", name) for name in sizes}
    inside = {name: int(match[2]) for name, match in found.items() if match}

    with reads.counted():
        log_p(model)
    assert reads.bytes == sum(sizes.values())
    assert sorted(reads.names) == sorted(sizes)
    assert max(map(len, reads.layers)) == 1
    assert {layer for loaded in reads.layers for layer in loaded} == {
        opened.plan.architecture.block.format(layer=layer) for layer in ALL
    }
    first, second = (opened.plan.architecture.block.format(layer=layer) for layer in (1, 2))
    tied = model.module.config.get_text_config().tie_word_embeddings
    assert reads.embedding[first] == reads.embedding[second] == tied  # the head needs it
    with reads.counted():
        activations(model, opened.modules(layers=(1, 3)))
    assert len(reads.names) == len(set(reads.names))
    assert {n for n in reads.names if n in inside} == {n for n in inside if inside[n] <= 3}
    assert not any("norm" in n or "lm_head" in n for n in reads.names if n not in inside)
    assert max(map(len, reads.layers)) == 1
    assert not reads.embedding[first]
    with reads.counted():
        dict(causal_moments(model, opened.modules(layers=(2, 4)), predicted(model)))
    counts = {name: reads.names.count(name) for name in sizes}
    for name, layer in inside.items():
        assert counts[name] == (2 if layer >= 2 else 1), name
    assert all(counts[name] == 1 for name in set(sizes) - set(inside)), counts
    assert max(map(len, reads.layers)) == 1
    assert reads.in_memory() == []
    assert all(p.is_meta for p in model.module.parameters())


def test_a_pass_that_fails_leaves_nothing_in_memory(checkpoints: Checkpoints) -> None:
    opened = Opened.of(checkpoints("llama"))
    model = opened.streamed()
    encode = Encoder(model.tokenizer, model.module)
    batched = batches([encode(text, "mean", ()) for text in TEXTS], 2, "cpu")

    def show(number: int, layer: int, f: Tensor) -> None:
        if layer == 3:
            raise ValueError("enough of this")

    with pytest.raises(ValueError, match="enough of this"):
        model.visit(opened.modules(), batched, show)
    assert all(p.is_meta for p in model.module.parameters())
    for number, _ in model.logits(batched):
        assert number == 0
        break
    assert all(p.is_meta for p in model.module.parameters())
    expected = activations(opened.resident(), opened.modules())
    found = activations(model, opened.modules())
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_progress_ends_at_the_number_of_texts(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened.of(checkpoints("llama"))
    for model in (opened.resident(), opened.streamed()):
        steps: list[int] = []
        monkeypatch.setattr(progress, "advance", steps.append)
        encode = Encoder(model.tokenizer, model.module)
        coded = [encode(text, "mean", ()) for text in TEXTS]
        batched = batches(coded, 2, "cpu")
        model.visit(opened.modules(), batched, lambda number, layer, f: None)
        assert sum(steps) == len(TEXTS)
        assert len(steps) > 1
        log_probabilities(model, [coded, coded])
        modules = opened.modules(layers=(2, 4))
        dict(causal_moments(model, modules, predicted(model)))
        assert sum(steps) == 4 * len(TEXTS)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_layers_below_the_first_edited_one_run_once_for_all_edits(
    kind: str, way: str, checkpoints: Checkpoints
) -> None:
    """To the last bit, and no layer below is called again; unless the edit is in one of them."""
    opened = Opened.of(checkpoints(kind))
    model: Model = opened.resident() if way == "resident" else opened.streamed()
    encode = Encoder(model.tokenizer, model.module)
    texts = [[encode(text, "mean", ()) for text in some] for some in (TEXTS[:2], TEXTS[2:])]
    entered = entering(model, texts, 3)
    assert entered is not None
    high, low = (
        removal(opened.plan, dict.fromkeys(layers, torch.eye(HIDDEN)[:, :9]))
        for layers in ((3, 4), (2,))
    )
    below = model.module.get_submodule(opened.plan.weights("down_proj", (2,))[0].module)
    calls = list[Any]()
    for edit in (Edit(), high):
        with edited(model.module, opened.plan, edit):
            expected = log_probabilities(model, texts)
            calls.clear()
            with below.register_forward_hook(lambda *args: calls.append(args)):
                found = log_probabilities(model, texts, entered)
        assert not calls
        for one, other in zip(expected, found, strict=True):
            assert all(map(np.array_equal, one, other))
    changed = module_edits(opened.plan, high), module_edits(opened.plan, low)
    assert [lowest_layer(model.architecture, names) for names in changed] == [3, 2]
    assert lowest_layer(model.architecture, [*changed[0], "lm_head"]) == 0
    assert entering(model, texts, 0) is None


def test_a_missing_tensor_is_an_error_of_the_checkpoint(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama", torch.float32, "1GB"), tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    opened = Opened.of(folder)
    for load in (opened.resident, opened.streamed):
        with refused(
            CheckpointError,
            what="the checkpoint lacks 1 tensors that the model needs",
            found="no model.layers.2.self_attn.k_proj.weight",
        ):
            load()


def same(opened: Opened) -> None:
    """Log-probabilities and gradients are those of the resident model."""
    whole, streamed = opened.resident(), opened.streamed()
    assert difference(log_p(streamed), log_p(whole)) < ROUNDING
    modules = opened.modules(layers=(0, 3))
    a, b = (dict(causal_moments(m, modules, predicted(m))) for m in (streamed, whole))
    assert max(difference(a[n], b[n]) for n in b) < ROUNDING


@pytest.mark.parametrize(("kind", "variant"), VARIANTS)
def test_other_beginnings_of_names_are_found_too(
    kind: str, variant: dict[str, str], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Where transformers knows them; what it does not load is no matter of streaming."""
    folder = shutil.copytree(checkpoints(kind, torch.float32, "1GB"), tmp_path / "source")
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        ours = next((start for start in variant if name.startswith(start)), None)
        new = name if ours is None else variant[ours] + name.removeprefix(ours)
        tensors[new] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    opened = Opened.of(folder)
    try:
        opened.resident()
    except ConverterError as error:
        with refused(type(error)):
            opened.streamed()
    else:
        same(opened)


def test_fp8_is_streamed_as_the_numbers_that_it_stands_for(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = as_fp8(checkpoints("qwen3", torch.bfloat16), tmp_path / "fp8", BLOCKS)
    same(Opened.of(folder))


def test_pickles_are_streamed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    opened = Opened.of(as_pickles(checkpoints("llama"), tmp_path / "source", 1))
    assert opened.source.virtual_shards is not None
    same(opened)


def test_a_layer_that_does_not_fit_is_refused(checkpoints: Checkpoints) -> None:
    with refused(SourceError, what="not even one layer of the model fits ..."):
        Opened.of(checkpoints("llama")).streamed(1000)


def test_the_same_holds_in_bfloat16(checkpoints: Checkpoints) -> None:
    opened = Opened.of(checkpoints("llama", torch.bfloat16))
    opened.dtype = torch.bfloat16
    whole, streamed = opened.resident(), opened.streamed()
    found, expected = (activations(m, opened.modules()) for m in (streamed, whole))
    assert all(difference(found[key], expected[key]) < 1e-2 for key in expected)
    a, b = (dict(causal_moments(m, opened.modules(), predicted(m))) for m in (streamed, whole))
    assert all(difference(a[n], b[n]) < 1e-2 for n in ALL)


def test_positions_with_logits_are_few_where_the_vocabulary_is_large() -> None:
    class Wide:
        def __init__(self, rows: int) -> None:
            self.weight = torch.empty(rows, 1, device="meta")

        def get_input_embeddings(self) -> Any:
            return self

    assert [logit_positions(Wide(n)) for n in (400, 49152, 98304, 10**9)] == [1024, 1024, 512, 1]


# which way


def test_auto_streams_what_does_not_fit(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Opened.of(checkpoints("llama")).plan
    needed = plan.num_parameters * 4 + mode.margin(plan, torch.float32)

    def choose(
        asked: Literal["auto"] | mode.Mode = "auto", limit: int | None = None, spread: bool = False
    ) -> mode.Forward:
        return choose_forward(asked, plan, torch.float32, "cpu", limit, spread=spread)

    monkeypatch.setattr(mode, "available_memory", lambda: needed)
    assert choose().mode == "resident"
    assert choose(limit=needed - 1).mode == "streamed"
    assert choose(limit=10 * needed).budget == needed
    assert choose("resident", 1).mode == "resident"
    assert choose(limit=1, spread=True).mode == "resident"
    monkeypatch.setattr(mode, "available_memory", lambda: needed - 1)
    assert choose().mode == "streamed"
    assert "GB" in choose().reason
    assert "do not fit" in choose().reason
    with refused(OptionError, what="--forward streamed", expected="one device", found="..."):
        choose("streamed", spread=True)
    monkeypatch.setattr(mode, "available_memory", lambda: 10 * needed)
    monkeypatch.setattr(mode, "address_space", lambda: plan.num_parameters * 4)
    assert choose().mode == "streamed"  # the mapped shards count


def test_available_memory_honours_the_limit_of_the_address_space() -> None:
    code = "from converter.runtime.memory import available_memory; print(available_memory())"
    limit = 8_000_000

    def available(prefix: str) -> int:
        command = ["bash", "-c", f"{prefix} exec {sys.executable} -c '{code}'"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return int(subprocess.run(command, env=env, capture_output=True, check=True).stdout)

    free, limited = available(""), available(f"ulimit -v {limit};")
    assert limited < limit * 1024
    assert limited < free or free < limit * 1024
    assert limited > 0


def test_available_memory_is_the_least_of_all_limits(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (proc / "self/cgroup").write_text("4:memory,cpu:/a/b\n0::/x/y\n")
    assert memory.available_memory(proc, groups) == 8000 * 1024

    def write(folder: str, **files: str) -> None:
        (groups / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (groups / folder / name.replace("_", ".", 1)).write_text(text)

    write("x/y", memory_max="max\n", memory_current="1000\n")
    assert memory.available_memory(proc, groups) == 8000 * 1024
    write("x", memory_max="7000000\n", memory_current="1000000\n")
    write("x", memory_stat="anon 3\ninactive_file 200000\nactive_file 300000\n")
    assert memory.available_memory(proc, groups) == 6_500_000
    write("memory/a/b", memory_limit_in_bytes="5000000", memory_usage_in_bytes="1000000")
    assert memory.available_memory(proc, groups) == 4_000_000
    write("memory/a/b", memory_limit_in_bytes="5000000", memory_usage_in_bytes="6000000")
    assert memory.available_memory(proc, groups) == 0
    (proc / "self/cgroup").write_text("")
    assert memory.available_memory(proc, groups) == 8000 * 1024
    assert memory.available_memory(tmp_path / "none", groups) > 1 << 60


SIZES = {"4GB": 4 * 10**9, "512mb": 512 * 10**6, "1.5 GiB": 3 << 29, "1000": 1000, "2k": 2000}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4 apples", "much", "0", "1e9", "4GBB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with refused(OptionError, what="--memory-limit", expected="a size such as 4GB or 512MB"):
        Settings(memory_limit=text)  # type: ignore[arg-type]


# whole runs


@pytest.mark.slow
def test_a_conversion_can_be_streamed_from_its_texts_to_its_guard(
    planted: Path, cli: Cli, tmp_path: Path
) -> None:
    """With gradients and the choice of the rank, all of it a layer at a time."""
    args = ("--pairs", planted.parent / "pairs.jsonl", "--num-pairs", 120,
            "--guard-draws", 1, "--json")  # fmt: skip
    bases, manifests = {}, {}
    for way in ("resident", "streamed"):
        out = tmp_path / way
        result = cli("convert", planted, out, *args, "--forward", way, "--memory-limit", "50MB")
        assert result.exit_code == 0, result.stderr
        assert f"forward pass {way}: asked for" in result.stderr
        assert json.loads(result.stdout)["forward"] == {"mode": way, "reason": "asked for"}
        bases[way] = load_bases(out / EDIT_FILE)
        manifests[way] = json.loads((out / "gloss_manifest.json").read_text())
        assert manifests[way]["forward"]["mode"] == way
        assert manifests[way]["run"]["forward"] == way
        assert manifests[way]["activations"]["inputs"]["forward"] == way
        cli("verify", out, "--source", planted, code=0)
    assert bases["resident"].keys() == bases["streamed"].keys()
    for name, U in bases["resident"].items():
        # the model has one toxic direction; the others are noise, which rounding turns
        u, v = U[:, :1], bases["streamed"][name][:, :1]
        assert float((u @ u.T - v @ v.T).abs().max()) < 1e-4
    a, b = (manifests[way]["guard"] for way in ("resident", "streamed"))
    assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-5)
    change, other = (guard["edit"]["toxic_change"]["value"] for guard in (a, b))
    assert change == pytest.approx(other, rel=1e-3)
    assert (
        manifests["resident"]["activations"]["key"] != manifests["streamed"]["activations"]["key"]
    )
    again = cli("convert", planted, tmp_path / "again", *args, "--forward", "streamed",
                "--no-guard", "-o", "rank=2")  # fmt: skip
    assert "cache hit, no forward pass" in again.stderr
    assert json.loads(again.stdout)["forward"]["mode"] == "streamed"  # when they were taken
    assert "forward pass  streamed: asked for" in cli(
        "convert", planted, tmp_path / "people", *args[:-1], "--forward", "streamed",
        "--no-guard", "-o", "rank=2",
    ).stdout  # fmt: skip


def test_writing_needs_the_whole_model(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints("llama")
    what = "an evaluation writes continuations, for which the whole model must be in memory"
    for command in (("evaluate", source), ("convert", source, tmp_path / "out", "--evaluate")):
        result = cli(*command, "--forward", "streamed", code=2)
        assert result.stderr.count("\n") <= 2
        assert f"{what}: found --forward streamed; give --forward resident" in result.stderr
        result = cli(*command, "--memory-limit", "30MB", code=3, says=f"{what}: found")
        assert "do not fit in memory comfortably; give --forward resident" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plan_says_how_the_model_would_be_run(checkpoints: Checkpoints, cli: Cli) -> None:
    shown = cli("plan", checkpoints("llama"), "--memory-limit", "30MB")
    assert (
        "forward pass streamed: 0.0 GB of weights do not fit in memory comfortably" in shown.stdout
    )
    for kind in ("llama", "gpt2", "mixtral"):
        plans = {
            way: json.loads(cli("plan", checkpoints(kind), "--json", "--forward", way).stdout)
            for way in ("auto", "streamed")
        }
        assert plans["auto"]["forward"]["mode"] == "resident"
        opened = Opened.of(checkpoints(kind))
        weights = opened.streamed().weights
        assert plans["streamed"]["expected_peak_bytes"]["weights"] == max(
            weights.nbytes(part) for part in weights.parts if part[-1].isdigit()
        )
