"""Whole conversions of tiny models."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from converter.calibration.statistics import Activations, save_activations
from converter.checkpoints.names import EDIT_FILE
from converter.checkpoints.safetensors.header import read_header
from converter.edits.base import Edit
from converter.edits.deltas import AddLowRank
from converter.edits.edit_file import load_bases
from converter.edits.engine import Engine
from converter.entrypoints.convert import convert
from converter.entrypoints.verify import verify
from converter.errors import DestinationError, OptionError
from converter.models import loading
from converter.models.edited import edited
from converter.outputs import claim as staging
from converter.outputs.base import WriteJob
from converter.outputs.checkpoint.write import write_checkpoint
from converter.outputs.claim import claimed
from converter.release.recording import read_recording
from converter.runtime.cache import using_cache
from tests.builders.edits import removal
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import (
    HIDDEN,
    LAYERS,
    NORM_AFTER,
    OTHER_LAYOUTS,
    TINY,
    TINY_ARGS,
    TINY_MODELS,
    Checkpoints,
    load,
    planned,
    tiny_args,
    tiny_recipe,
)
from tests.test_formats import tensors_of


def test_an_empty_edit_reproduces_every_file_byte_for_byte(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source, plan = planned(checkpoints("llama", torch.bfloat16))
    (tmp_path / "out").mkdir()
    job = WriteJob(source=source, plan=plan, edit=Edit(), folder=tmp_path / "out", engine=Engine())
    write_checkpoint(job)
    ours = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*"))
    assert len(source.shards) > 2
    assert len(ours) == len(source.shards) + len(source.companions) + 1  # the index
    for name in ours:
        assert (tmp_path / "out" / name).read_bytes() == (source.folder / name).read_bytes()


def test_headers_names_and_small_files_are_those_of_the_source(
    converted: tuple[Path, Path],
) -> None:
    source, out = converted
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            end = read_header(path).data_start
            assert (out / path.name).read_bytes()[:end] == path.read_bytes()[:end]
        elif path.name != "README.md":
            assert (out / path.name).read_bytes() == path.read_bytes()
    new = {p.name for p in out.iterdir()} - {p.name for p in source.iterdir()}
    assert new == {"gloss_manifest.json", "gloss_edit.tensors", "SHA256SUMS"}


@pytest.mark.parametrize("kind", sorted(TINY_MODELS | OTHER_LAYOUTS))
def test_editing_weights_is_projecting_ffn_outputs(
    kind: str, checkpoints: Checkpoints, tmp_path: Path, shared_cache: Path
) -> None:
    source, out = checkpoints(kind), tmp_path / "out"
    convert(tiny_recipe(source), out)
    bases = load_bases(out / EDIT_FILE)
    layers = (2, 3, 4)
    U = {layer: bases["U" if "U" in bases else f"U.{layer}"] for layer in layers}
    assert all(basis.shape == (HIDDEN, 4) for basis in U.values())
    ids = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    original = load(source)
    plain = original(ids).logits
    _, plan = planned(source)

    edit = read_recording(out).edit(plan) if plan.post_norms else removal(plan, U)
    with edited(original, plan, edit):
        hooked = original(ids).logits
    assert torch.equal(original(ids).logits, plain)  # the hooks are gone
    result = load(out)
    added: list[Tensor] = []
    for layer in layers:
        (site,) = plan.architecture.sites(layer)
        result.get_submodule(site).register_forward_hook(
            lambda module, args, f: added.append((f[0] if isinstance(f, tuple) else f).clone())
        )
    written = result(ids).logits
    assert torch.allclose(written, hooked, atol=2e-6)
    if not plan.post_norms:  # see the test of those below
        for f, basis in zip(added, U.values(), strict=True):
            assert (f @ basis).abs().amax() < 1e-5 * f.abs().amax()
    assert (plain - hooked).abs().amax() > 50 * (written - hooked).abs().amax()


UNPROTECTED = {"rank": "1", "candidates": "mean", "protect_shared": "0", "protect_own": "0"}
"""Options with which GloSS finds what ``save_planted`` has planted."""


def save_planted(path: Path) -> tuple[Tensor, Tensor]:
    """Activations whose sides differ by a unit vector (D,), and noise (2, L, N, D) on both."""
    d = torch.nn.functional.normalize(torch.randn(HIDDEN), dim=0)
    x = 0.01 * torch.randn(2, LAYERS, 40, HIDDEN)
    toxic, neutral = ({n: side[n] for n in range(LAYERS)} for side in (x[0] + d, x[1]))
    save_activations(Activations(toxic, neutral, None, {}), path)
    return d, x


@pytest.mark.parametrize("kind", sorted(NORM_AFTER))
def test_nothing_is_left_along_the_subspace_after_a_norm(
    kind: str, checkpoints: Checkpoints, tmp_path: Path, shared_cache: Path
) -> None:
    """What counts is what reaches the residual stream; W projected along U itself leaves most."""
    source, out = checkpoints(kind), tmp_path / "out"
    seen = tmp_path / "seen.safetensors"
    d, x = save_planted(seen)
    convert(tiny_recipe(source, options=TINY | UNPROTECTED, activations=seen), out)
    assert not verify(out)
    stacked = torch.stack([x[0, n].mean(0) + d - x[1, n].mean(0) for n in (2, 3, 4)])
    u = torch.linalg.svd(torch.nn.functional.normalize(stacked))[2][0]  # what GloSS makes of it
    ids = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(0))

    def along(model: Any) -> float:
        """The largest component along u of what layers 2 to 4 add to the residual stream."""
        found: list[float] = []
        handles = [
            model.get_submodule(plan.architecture.sites(n)[0]).register_forward_hook(
                lambda module, args, f: found.append(float((f.detach() @ u).abs().max()))
            )
            for n in (2, 3, 4)
        ]
        model(ids)
        for handle in handles:
            handle.remove()
        return max(found)

    _, plan = planned(source)
    original = load(source)
    whole = along(original)
    naive = removal(plan, dict.fromkeys((2, 3, 4), u[:, None]))
    with edited(original, plan, naive):
        left = along(original)
    assert along(load(out)) < 1e-5 * whole
    assert left > 0.1 * whole


def test_a_planted_direction_is_removed_from_what_layers_write(
    checkpoints: Checkpoints, tmp_path: Path, shared_cache: Path
) -> None:
    """From given activations: no forward pass, and nothing of the truth is left."""
    source, out = checkpoints("llama"), tmp_path / "out"
    seen = tmp_path / "seen.safetensors"
    d, _ = save_planted(seen)
    convert(tiny_recipe(source, options=TINY | UNPROTECTED, activations=seen), out)
    U = load_file(out / EDIT_FILE)["U"]
    assert float(U[:, 0] @ d) > 0.99
    model = load(out)
    for layer in (2, 3, 4):
        f = model.get_submodule(f"model.layers.{layer}.mlp")(torch.randn(1, 9, HIDDEN)).detach()
        assert float((f @ U).abs().max()) < 1e-6 * float(f.norm())


def test_two_runs_give_the_same_bytes(tmp_path: Path, converted: tuple[Path, Path]) -> None:
    source, first = converted
    with using_cache(tmp_path / "another cache"):
        convert(tiny_recipe(source, num_pairs=64), tmp_path / "second")
    names = {p.name for p in first.iterdir()}
    assert names == {p.name for p in (tmp_path / "second").iterdir()}
    for name in names - {"gloss_manifest.json", "README.md", "SHA256SUMS"}:
        assert (tmp_path / "second" / name).read_bytes() == (first / name).read_bytes()
    manifests = [
        json.loads((f / "gloss_manifest.json").read_text()) for f in (first, tmp_path / "second")
    ]
    assert manifests[0].pop("measurements") != manifests[1].pop("measurements")
    assert manifests[0] == manifests[1]


def test_the_manifest_holds_no_path_and_no_user(converted: tuple[Path, Path]) -> None:
    source, out = converted
    text = (out / "gloss_manifest.json").read_text()
    assert str(source.parent) not in text
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text


def test_a_second_run_with_another_rank_does_not_run_the_model(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints("llama")
    args = ("convert", source, "--num-pairs", 40)
    first = cli(*args, tmp_path / "a", *TINY_ARGS)
    assert "cache miss, running the model" in first.stderr

    def no_model(*args: object) -> nn.Module:
        raise AssertionError("the model was run")

    monkeypatch.setattr(loading, "load_model", no_model)
    second = cli(*args, tmp_path / "b", *tiny_args(rank=2, alpha=0.0), code=0)
    assert "cache hit, no forward pass" in second.stderr
    assert json.loads((tmp_path / "b/gloss_manifest.json").read_text())["edit"]["rank"] == 2


def test_profs_edits_each_layer_with_its_own_basis(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    args = ("--method", "profs", "-o", "rank=2", "--no-guard", "--json")
    result = cli("convert", checkpoints("gpt2"), tmp_path / "out", *args, code=0)
    assert json.loads(result.stdout)["layers"] == [2, 3, 4, 5]
    bases = load_file(tmp_path / "out" / EDIT_FILE)
    assert {n for n in bases if n.startswith("U.")} == {"U.2", "U.3", "U.4", "U.5"}
    cli("verify", tmp_path / "out", "--source", checkpoints("gpt2"), code=0)


def test_a_renamed_expert_stops_the_run_before_anything_is_written(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoints("mixtral", torch.float32, "1GB"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.3.block_sparse_moe.experts.1.w2.weight"
    tensors[name.replace("w2", "down")] = tensors.pop(name)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    cli("convert", source, tmp_path / "out", *TINY_ARGS, code=4, says=f"tensor {name} is missing")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_biases_of_experts_cannot_be_kept(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    """What a mixture gives has them weighted by the router: the guard could not see the edit."""
    args = (tmp_path / "out", *TINY_ARGS, "-o", "bias=keep")
    refused = cli("convert", checkpoints("gpt_oss"), *args, code=2)
    assert "-o bias=keep: expected bias=project" in refused.stderr


def test_only_subspaces_of_experts_can_be_examined(checkpoints: Checkpoints) -> None:
    """A module of the running model is a whole mixture: what one expert reads is not known."""
    folder = checkpoints("mixtral")
    _, plan = planned(folder)
    weight = plan.weights("down_proj", [2])[0].info
    height, width = weight.shape
    edit = Edit({weight.name: AddLowRank(torch.ones(height, 1), torch.ones(1, width))})
    edit.check(plan)  # it could be written
    what, found = f"the edit of tensor {weight.name}", "add-low-rank, ..."
    with refused(OptionError, what=what, found=found), edited(load(folder), plan, edit):
        pass


def test_buffers_that_the_model_does_not_know_are_copied(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    """As in the original GPT-2, which stores its attention masks."""
    source = shutil.copytree(checkpoints("gpt2", torch.float32, "1GB"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 8, 8) for n in range(LAYERS)}
    save_file(tensors | masks, source / "model.safetensors", {"format": "pt"})
    cli("convert", source, tmp_path / "out", *TINY_ARGS, code=0)
    assert set(masks) <= set(tensors_of(tmp_path / "out"))
    cli("verify", tmp_path / "out", "--source", source, code=0)


CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM

Path(__file__).with_name("executed").touch()


class Marked(LlamaForCausalLM):
    pass
"""


def test_code_of_a_source_is_executed_when_it_is_trusted(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it is not: ``test_hostile.py``."""
    source = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_marked.Marked"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_marked.py").write_text(CODE)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    out = tmp_path / "out"
    cli("convert", source, out, "--num-pairs", 32, *TINY_ARGS, "--trust-remote-code", code=0)
    assert (out / "modeling_marked.py").read_text() == CODE
    assert list(tmp_path.rglob("executed"))


def test_a_dry_run_prints_the_plan_and_touches_nothing(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOSS_CACHE_DIR", str(tmp_path / "cache"))
    source = checkpoints("llama", torch.bfloat16)
    for args in (("convert", source, tmp_path / "out", "--dry-run"), ("plan", source)):
        result = cli(*args, "--json", code=0)
        plan = json.loads(result.stdout)
        assert plan["edited_tensors"] == [
            f"model.layers.{layer}.mlp.down_proj.{part}"
            for layer in (1, 2, 3, 4)
            for part in ("weight", "bias")
        ]
        assert plan["bytes_to_write"] == sum(p.stat().st_size for p in source.glob("*.safetensors"))
        assert list(tmp_path.iterdir()) == []
    cli("convert", source, source, "--dry-run", code=7)
    cli("convert", source, tmp_path / "out", "--dry-run", "--pairs", "nowhere.tsv", code=5)
    text = cli("plan", source).stdout
    assert "8 tensors to edit" in text
    assert "peak memory about" in text


def test_overwrite_replaces_a_checkpoint_and_nothing_else(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    out, args = tmp_path / "out", ("convert", checkpoints("llama"), *TINY_ARGS)
    out.mkdir()  # an empty folder is fine
    cli(*args, out, code=0)
    (out / "leftover.json").write_text("{}")
    refused = cli(*args, out, code=7, says="is not empty")
    assert "leftover.json: is not in the manifest; choose another, or give --ov" in refused.stderr
    refused = cli(*args, out, "--seed", 1, code=7)
    assert "is not empty; choose another, or give --overwrite" in refused.stderr
    cli(*args, out, "--overwrite", code=0)
    assert not (out / "leftover.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for name, content in (("photos", ("a.jpg",)), ("code", ("config.json", "a.py")),
                          ("clone", ("config.json", "a.safetensors", ".git"))):  # fmt: skip
        precious = tmp_path / name
        precious.mkdir()
        for file in content:
            (precious / file).write_text("{}")
        cli(*args, precious, "--overwrite", code=7, says="is neither empty nor a checkpoint")
        assert sorted(p.name for p in precious.iterdir()) == sorted(content)


def test_a_source_behind_links_is_not_overwritten(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    real = shutil.copytree(checkpoints("llama"), tmp_path / "real")
    (tmp_path / "links").mkdir()
    for path in real.iterdir():
        if path.suffix == ".safetensors":
            (tmp_path / "links" / path.name).symlink_to(path)
        else:
            shutil.copy(path, tmp_path / "links")
    result = cli("convert", tmp_path / "links", real, *TINY_ARGS, "--overwrite", code=7)
    assert "contains the input" in result.stderr


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("mounted", [True, False])
def test_what_was_there_comes_back_if_the_last_step_fails(
    error: BaseException, mounted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that cannot exchange two folders, and on a mount point."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "new" or (self.parent.name == "new" and self.name == "weights"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(staging, "_exchanged", lambda one, other: False)
    if mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)

    def convert() -> None:
        with claimed(out, True) as claim, claim.staged(True) as part:
            for name in ("a", "weights", "config.json"):
                (part / name).write_text("new")

    says = refused(DestinationError, what=f"destination {out} cannot be written", found="no")
    with says if isinstance(error, OSError) else pytest.raises(KeyboardInterrupt):
        convert()
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("config.json", "old")]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_mount_point_is_filled_in_place(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume of a container can be neither renamed nor replaced."""
    out, args = tmp_path / "out", ("convert", checkpoints("llama"), *TINY_ARGS)
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    inode = out.stat().st_ino
    cli(*args, out, code=0)
    (out / "leftover.json").write_text("{}")
    (out / "folder").mkdir()
    cli(*args, out, code=7)
    cli(*args, out, "--overwrite", code=0)
    cli("verify", out, code=0)
    assert out.stat().st_ino == inode


def test_output_files_have_the_usual_permissions(converted: tuple[Path, Path]) -> None:
    _, out = converted
    umask = os.umask(0)
    os.umask(umask)
    for path in (out, *out.iterdir()):
        usual = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == usual & ~umask, path.name
