"""Checkpoints in FP8, and those in schemes that are refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter.checkpoints.names import EDIT_FILE
from converter.checkpoints.patch import merge
from converter.checkpoints.safetensors.header import TensorInfo, read_header
from converter.checkpoints.weights import read_scheme, stale_quantization
from converter.edits import apply
from converter.edits.base import Edit
from converter.edits.deltas import RemoveSubspace
from converter.edits.edit_file import load_bases
from converter.edits.editor import neighbour
from converter.edits.engine import Engine
from converter.edits.rounding_bounds import Stored, check_rounded
from converter.edits.storage import dequantize, grown, quantize
from converter.errors import CheckpointError
from converter.manifest import Manifest, Requantized
from converter.models.loading import load_language_model
from converter.outputs.base import WriteJob
from converter.outputs.checkpoint.write import Rewriting, users_of
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import HIDDEN, TINY_ARGS, Checkpoints, load, planned
from tests.fuzz import skeleton
from tests.test_formats import tensors_of

BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
ROWS = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
}  # fmt: skip
WHOLE = {"quant_method": "fp8", "activation_scheme": "static"}


def as_fp8(source: Path, folder: Path, scheme: dict[str, Any], *, apart: bool = False) -> Path:
    """The same checkpoint with the weights of its layers in FP8, by a few lines of our own."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    block = {id(BLOCKS): (16, 16), id(ROWS): (1, 10**6), id(WHOLE): (10**6, 10**6)}[id(scheme)]
    suffix = "weight_scale_inv" if scheme is BLOCKS else "weight_scale"
    weights: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in tensors_of(source).items():
        if "layers" not in name or tensor.ndim != 2:
            weights[name] = tensor
            continue
        rows = [
            torch.stack([part.abs().max() / 448 for part in torch.split(strip, block[1], 1)])
            for strip in torch.split(tensor.float(), block[0])
        ]
        scale = torch.stack(rows)
        whole = scale.repeat_interleave(min(block[0], len(tensor)), 0)[: len(tensor)]
        whole = whole.repeat_interleave(min(block[1], tensor.shape[1]), 1)[:, : tensor.shape[1]]
        weights[name] = (tensor / whole).to(torch.float8_e4m3fn)
        scale = scale.reshape(()) if scheme is WHOLE else scale
        scales[name.replace("weight", suffix)] = scale.bfloat16() if scheme is ROWS else scale
    if apart:
        save_file(weights, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
        save_file(scales, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
        weight_map = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
        weight_map |= dict.fromkeys(scales, "model-00002-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(weights | scales, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    return folder


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("scheme", [BLOCKS, ROWS, WHOLE], ids=["blocks", "rows", "whole"])
def test_fp8_weights_are_projected_and_stored_in_their_scheme(
    scheme: dict[str, Any], apart: bool, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = as_fp8(checkpoints("qwen3", torch.bfloat16), tmp_path / "fp8", scheme, apart=apart)
    out = tmp_path / "out"
    cli("convert", source, out, "--num-pairs", 32, *TINY_ARGS, code=0)
    cli("verify", out, "--source", source, code=0)  # each element is next to the projection's
    before, after = tensors_of(source), tensors_of(out)
    entries = {
        e["name"]: e for e in json.loads((out / "gloss_manifest.json").read_text())["edited"]
    }
    assert set(entries) == {f"model.layers.{n}.mlp.down_proj.weight" for n in (2, 3, 4)}
    scales = {entry["requantized"]["scales"] for entry in entries.values()}
    U = load_bases(out / EDIT_FILE)["U"]
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if name not in entries and name not in scales:
            assert torch.equal(after[name].float(), tensor.float())
    for name, entry in entries.items():
        fp8 = entry["requantized"]
        old, new = (dequantize(t[name], t[fp8["scales"]], fp8["block"]) for t in (before, after))
        left = (U.T @ new).norm() / (U.T @ old).norm()
        assert float(left) == pytest.approx(entry["measures"]["leakage"], rel=1e-3)
        assert left < 0.05
        exact = old - U @ (U.T @ old)
        assert float((new - exact).norm() / old.norm()) == pytest.approx(
            entry["rounding_error"], rel=1e-3
        )
        assert 0.01 < entry["rounding_error"] < 0.06  # three bits after the point


def test_a_forward_pass_runs_on_the_numbers_that_fp8_stands_for(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    plain = checkpoints("qwen3", torch.bfloat16)
    found, plan = planned(as_fp8(plain, tmp_path / "fp8", BLOCKS))
    model = load_language_model(found, plan, None, torch.float32, "cpu").module
    ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = load(plain).float()(ids).logits
    assert (model(ids).logits - expected).norm() < 0.05 * expected.norm()
    weights = dict(model.named_parameters())
    name = "model.layers.2.mlp.down_proj.weight"
    assert (weights[name] - tensors_of(plain)[name].float()).norm() < 0.05 * weights[name].norm()


def test_fp8_weights_that_keep_the_subspace_do_not_pass_as_edited(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is verified before it is in place."""

    def wrong(W: Tensor, scale: Tensor, block: Any, U: Tensor, tolerance: float) -> Any:
        return quantize(
            W + 0.05 * U @ torch.ones(U.shape[1], W.shape[1]), scale, block, U, tolerance
        )

    source = as_fp8(checkpoints("qwen3", torch.bfloat16), tmp_path / "fp8", BLOCKS)
    monkeypatch.setattr(apply, "quantize", wrong)
    args = ("--num-pairs", 32, "--method", "random", "-o", "rank=2", "-o", "layers=2-4")
    result = cli("convert", source, tmp_path / "out", *args, "--no-guard", code=8)
    assert "is not orthogonal to U" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_fp8_weight_elsewhere_than_next_to_the_projection_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q, scale = torch.randn(32, 32).to(torch.float8_e4m3fn), torch.full((2, 2), 0.5)
    save_file({"w": q, "s": scale}, tmp_path / "a", {"format": "pt"})
    (known,) = Manifest.from_json(skeleton.manifest()).edited
    requantized = Requantized(
        scales="s", shard="a", block=(16, 16), sha256_before="", sha256_after=""
    )
    entry = replace(known, name="w", shard="a", requantized=requantized)

    def stored(name: str) -> Stored:
        infos = read_header(tmp_path / name).tensors
        return Stored(lambda shard: (tmp_path / name).open("rb", buffering=0), entry, infos)

    def check(
        weight: Tensor, scale: Tensor
    ) -> tuple[tuple[int, int] | None, tuple[str, str | None]]:
        save_file({"w": weight, "s": scale}, tmp_path / "b", {"format": "pt"})
        with stored("b") as after, stored("a") as before:
            wrong, norms = check_rounded(after, before, delta, len(W), nearest=False)
            assert norms["W"] == pytest.approx(float(W.norm()))
            assert norms["P"] == pytest.approx(float((U.T @ W).norm()))
            return wrong, after.digests

    W = dequantize(q, scale, (16, 16))
    U = torch.linalg.qr(torch.randn(32, 2))[0]
    delta = RemoveSubspace(U)
    new, new_scale = quantize(W - U @ (U.T @ W), scale, (16, 16), U, 0.0)
    wrong, digests = check(new, new_scale)
    assert wrong is None
    far = new.clone()
    far[3, 5] = far[3, 5].float() * 1.5
    first, last = check(far, new_scale)[0] or (0, 0)
    assert first <= 3 < last
    other = check(new, new_scale * 2)[1]
    assert other[0] == digests[0]
    assert other[1] != digests[1]


def test_a_fetched_shard_is_kept_while_another_one_needs_its_scales(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = as_fp8(checkpoints("qwen3", torch.bfloat16), tmp_path / "fp8", BLOCKS, apart=True)
    source, plan = planned(folder)
    users = users_of(source, plan.targets)
    assert all(users[shard] == set(source.shards) for shard in source.shards)
    dropped: list[str] = []

    class Hub:
        def drop(self, shard: str) -> None:
            dropped.append(shard)

    hub: Any = Hub()
    job = WriteJob(
        source=hub, plan=plan, edit=Edit(), folder=tmp_path, engine=Engine(), keep_source=False
    )
    rewriting = Rewriting(job, users, None)
    rewriting.release_shard(source.shards[0])
    assert dropped == []
    rewriting.release_shard(source.shards[1])
    assert dropped == list(source.shards)


def test_a_second_edit_of_fp8_weights_passes_too(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    """Then there is nearly nothing along the subspace to begin with."""
    source = as_fp8(checkpoints("qwen3", torch.bfloat16), tmp_path / "fp8", BLOCKS)
    args = ("--method", "random", "-o", "rank=1", "-o", "layers=2-4", "--num-pairs", 32)
    for place, out in ((source, "a"), (tmp_path / "a", "b")):
        cli("convert", place, tmp_path / out, *args, "--no-guard", code=0)


def test_a_block_of_zeros_may_have_a_scale_of_zero() -> None:
    q, scale = quantize(torch.zeros(4, 4), torch.zeros(1, 1), (4, 4), torch.eye(4)[:, :1], 0.0)
    assert torch.equal(dequantize(q, scale, (4, 4)), torch.zeros(4, 4))


def test_rounding_to_nearest_would_undo_much_of_an_edit() -> None:
    torch.manual_seed(0)
    W, block = 0.02 * torch.randn(256, 512), (128, 128)
    scale = grown(W, torch.zeros(2, 4), block)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    W = dequantize((W / spread).to(torch.float8_e4m3fn), scale, block)
    U = torch.linalg.qr(torch.randn(256, 2))[0]
    exact = W - U @ (U.T @ W)
    nearest = (exact / spread).clamp(-448, 448).to(torch.float8_e4m3fn).float() * spread
    there = (U.T @ W).norm()
    ours = dequantize(*quantize(exact, scale, block, U, 1e-3 * float(there)), block)
    assert (U.T @ nearest).norm() > 0.04 * there
    assert (U.T @ ours).norm() < 1.001e-3 * there
    assert (ours - exact).norm() < 1.25 * (nearest - exact).norm()


def test_the_neighbour_is_the_next_value_on_the_other_side() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = torch.unique(codes.float()[~codes.float().isnan()])
    assert len(values) == 253  # two zeros, two that are no numbers
    for share in (0.25, 0.75):
        exact = values[:-1] + share * (values[1:] - values[:-1])
        q = exact.to(torch.float8_e4m3fn)
        expected = torch.where(q.float() == values[:-1], values[1:], values[:-1])
        assert torch.equal(neighbour(q, exact).float(), expected)
    q = values.to(torch.float8_e4m3fn)
    assert torch.equal(neighbour(q, values).float(), values)  # what is exact has none
    edge = torch.tensor([448.0, -448.0])
    assert torch.equal(neighbour(edge.to(q.dtype), edge * 1.01).float(), edge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_stay_unless_a_block_outgrows_them(dtype: torch.dtype) -> None:
    W = torch.ones(5, 7)
    W[4, 6] = 3.0
    old = torch.full((2, 2), 1 / 448).to(dtype).nextafter(torch.tensor(1.0, dtype=dtype))
    new = grown(W, old, (3, 4))
    assert new.dtype == dtype
    assert torch.equal(new.flatten()[:3], old.flatten()[:3])
    assert 3.0 <= float(new[1, 1]) * 448 < 3.05


UNKNOWN = "scheme compressed-tensors, unknown format"
REFUSED = [
    ("fp8", "scheme fp8"),
    ({"quant_method": "compressed-tensors", "config_groups": [1]}, UNKNOWN),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": 1}}, UNKNOWN),
    ({"quant_method": "gptq", "bits": 4}, "scheme gptq"),
    ({"quant_method": "awq"}, "scheme awq"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "scheme bitsandbytes"),
    ({"quant_method": "mxfp4"}, "scheme mxfp4"),
    ({"quant_method": "fp8", "weight_block_size": [0, 0]}, "a list of 2"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "a list of 1"),
    (
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4}}},
        },
        "scheme compressed-tensors, pack-quantized",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "found"), REFUSED)
def test_other_schemes_are_refused_by_name(config: Any, found: str) -> None:
    what, expected = "the checkpoint is quantized", None
    if "weight_block_size" in config:
        what, expected = "...: block size", "two positive integers"
    given = {"quantization_config": config}
    for place in (given, {"text_config": given}):
        with refused(CheckpointError, what=what, expected=expected, found=found):
            read_scheme(place)
    assert read_scheme({"text_config": {}}) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("rename", "stored in FP8 and cannot be read: expected two axes, and a tensor .*scale_inv"),
        ("shape", r"does not fit .*expected scales of shape \[2, 3\] .* found \[2, 2\]"),
    ],
)
def test_fp8_without_scales_that_fit_is_refused(
    change: str, says: str, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = as_fp8(checkpoints("qwen3", torch.bfloat16), tmp_path / "fp8", BLOCKS)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    assert tensors[name].shape == (HIDDEN // 16, 3)
    scale = tensors.pop(name)
    tensors[name if change == "shape" else "elsewhere"] = scale[:, :2].contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = cli("convert", source, tmp_path / "out", *TINY_ARGS, code=4)
    assert re.search(says, result.stderr), result.stderr


LEFT: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "fp8": {"quantization_config": BLOCKS},
    "compressed": {"compression_config": ROWS},
    "nested": {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    "nothing": {"quantization_config": {}},
}


@pytest.mark.parametrize("left", LEFT)
def test_what_a_config_says_of_a_quantization_that_is_gone_is_dropped(
    left: str, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    kind, mode = ("gemma3", "streamed") if left == "nested" else ("llama", "resident")
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(checkpoints(kind, torch.bfloat16), source)
    plain = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(merge(plain, LEFT[left])))
    args = ("convert", source, out, "--num-pairs", 32, "--forward", mode, *TINY_ARGS)
    result = cli(*args)
    assert result.exit_code == 0, result.stderr
    assert "warning: config.json names a quantization, but no tensor is quantized" in result.stderr
    assert json.loads((out / "config.json").read_text()) == plain
    patch = json.loads((out / "gloss_manifest.json").read_text())["edit"]["patches"]["config.json"]
    key = "compression_config" if left == "compressed" else "quantization_config"
    assert patch == ({"text_config": {key: None}} if left == "nested" else {key: None})
    for said in (cli("verify", out, "--source", source), cli("verify", out)):
        assert said.exit_code == 0, said.stderr
    if left in ("bitsandbytes", "nested"):
        again = cli("replay", out, tmp_path / "again", "--source", source)
        assert again.exit_code == 0, again.stderr
        assert (tmp_path / "again/config.json").read_bytes() == (out / "config.json").read_bytes()
        assert "is the result of this run already" in cli(*args).stderr
        planned = json.loads(cli("plan", source, "--json", *TINY_ARGS).stdout)
        assert planned["changed_files"] == ["config.json"]


def test_the_same_numbers_are_fitted_as_without_it(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    plain = checkpoints("llama", torch.bfloat16)
    source = shutil.copytree(plain, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | LEFT["bitsandbytes"]))
    for folder, out in ((plain, "a"), (source, "b")):
        assert cli("convert", folder, tmp_path / out, "--num-pairs", 32, *TINY_ARGS).exit_code == 0
    one, two = (tensors_of(tmp_path / out) for out in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("x.qweight", "F32"), ("x.weight_scale", "F32"), ("x.weight", "U8"), ("x.weight", "F8_E4M3")],
)
def test_it_is_believed_if_a_tensor_is_packed_or_has_scales(
    name: str, dtype: str, checkpoints: Checkpoints
) -> None:
    headers = {"x.safetensors": TensorInfo(name, dtype, (4,), 0, 4)}
    places = {info.name: (shard, info) for shard, info in headers.items()}
    assert stale_quantization(LEFT["fp8"], places) == {}
    dense = {"x.weight": ("x.safetensors", TensorInfo("x.weight", "BF16", (2,), 0, 4))}
    assert stale_quantization(LEFT["fp8"], dense) == {"quantization_config": None}
    assert stale_quantization({"quantization_config": None}, dense) == {}
