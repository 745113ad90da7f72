"""Folders as people have them: what is beside a model does not keep it from being read."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from converter.checkpoints.formats.gguf import check_header
from converter.checkpoints.names import is_plain
from converter.checkpoints.resolve import resolve
from converter.hub.repos import is_inside
from tests.builders.models import Checkpoints

BESIDE = (
    ".cache/huggingface/download/config.json.metadata", ".git/config", ".gitattributes",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "lost+found/#1",
    "model-Q4_K_M.gguf", "onnx/model.onnx", "optimizer.pt",
    "original/consolidated.00.pth", "original/params.json",
    "rng_state_0.pth", "training_args.bin",
)  # fmt: skip
"""What a folder may have that does not belong to the model."""

NAMES = (
    "assets/Screenshot at 3.00.00\u202fPM.png", "a file.txt", "a\u00a0b.txt", "e\u0301.txt",
    "\u5168\u89d2\u3000.md", "\U0001f469\u200d\U0001f4bb.txt", "\u0646\u200c\u0647.txt",
)  # fmt: skip
"""Names of files that do, with the spaces of macOS and Japan, and letters and emoji joined."""

SNAPSHOT = "models--someone--tiny/snapshots/c0ffee"


@pytest.fixture
def folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints("llama"), tmp_path / "tiny")


def as_snapshot(folder: Path, cache: Path) -> Path:
    """The same as the Hub's client keeps it: links to files that are named after digests."""
    snapshot, blobs = cache / SNAPSHOT, (cache / SNAPSHOT).parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_what_lies_beside_a_model_is_left_where_it_is(folder: Path) -> None:
    before = resolve(str(folder)).companions
    for name in (*BESIDE, *NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    source = resolve(str(folder))
    assert set(source.companions) == {*before, *NAMES}
    assert all(is_inside(name) and is_plain(name) for name in NAMES)


def test_the_cache_of_the_hubs_client_is_read_as_a_folder(folder: Path, tmp_path: Path) -> None:
    snapshot = as_snapshot(folder, tmp_path / "hub")
    assert resolve(str(snapshot)).headers()
    for name in ("tokenizer.json", min(p.name for p in folder.glob("*.safetensors"))):
        (folder / name).unlink()  # as older clients left a folder that they downloaded to
        (folder / name).symlink_to(snapshot / name)
    assert resolve(str(folder)).headers()


def test_a_config_may_hold_what_those_of_large_models_hold(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "attn_implementation": "flash_attention_2", "auto_map": {"AutoConfig": "a/b--x.Y"},
        "eos_token_id": [1, 2], "max_position_embeddings": 10_485_760, "n_routed_experts": None,
        "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 8192},
        "time_step_limit": [0.0, float("inf")], "vision_config": {"image_size": 896, "depth": 27},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2).replace("\n", "\r\n"))
    assert resolve(str(folder)).config == config


def test_a_gguf_file_may_say_how_many_parameters_it_has(tmp_path: Path) -> None:
    key = b"general.parameter_count"
    fields = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 10, 8_030_261_312)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + fields)
    check_header(tmp_path / "x.gguf")
