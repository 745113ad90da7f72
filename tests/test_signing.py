"""Signatures: made with a private key, checked with the public one, and nothing slips through."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from converter.checkpoints.names import SIGNATURE
from converter.entrypoints.verify import verify
from converter.errors import OptionError
from converter.release.signing import load_public_key, load_signer
from tests.builders.errors import refused
from tests.builders.keys import write_key as write_key
from tests.builders.models import TINY_ARGS
from tests.test_verify import flip

pytest.importorskip("model_signing")

from cryptography.hazmat.primitives import serialization as keys
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from tests.builders.invoke import Cli
from tests.builders.models import Checkpoints


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_key(tmp_path_factory.mktemp("a place for keys"))


@pytest.fixture(scope="session")
def signed(
    converted: tuple[Path, Path], key: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The conversion, signed. Read only."""
    out = shutil.copytree(converted[1], tmp_path_factory.mktemp("signed") / "out")
    load_signer(key).sign(out, "tiny-gloss")
    return out


@pytest.fixture
def out(signed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(signed, tmp_path / "out")


def test_what_a_run_has_in_a_mount_point_is_not_signed(
    converted: tuple[Path, Path], key: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(converted[1], tmp_path / "out")
    holder = out / ".out.part"
    holder.mkdir()
    (holder / "lock").touch()
    load_signer(key).sign(out, "tiny-gloss", holder)
    shutil.rmtree(holder)
    assert load_public_key(key.with_suffix(".pub")).check(out) == []


def test_a_conversion_is_signed_and_the_signature_checked(
    checkpoints: Checkpoints, key: Path, cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = cli("convert", checkpoints("llama"), out, *TINY_ARGS, "--sign", key, code=0)
    fingerprint = hashlib.sha256(key.with_suffix(".pub").read_bytes()).hexdigest()
    assert fingerprint in result.stderr
    assert SIGNATURE not in (out / "SHA256SUMS").read_text()

    result = cli("verify", out, "--key", key.with_suffix(".pub"), code=0)
    assert f"signed by the key with sha256 {fingerprint}" in result.stdout
    result = cli("verify", out, "--key", key.with_suffix(".pub"), "--json")
    assert json.loads(result.stdout)["key_sha256"] == fingerprint
    cli("verify", out, code=0, says="model.sig was not checked; give --key")

    secret = key.read_text().splitlines()[1].encode()
    for path in out.rglob("*"):
        raw = path.read_bytes()
        assert secret not in raw
        assert str(key.parent).encode() not in raw
        assert key.parent.name.encode() not in raw


def test_the_packages_own_command_line_agrees(out: Path, key: Path) -> None:
    command = [
        sys.executable, "-m", "model_signing", "verify", "key", str(out),
        "--signature", str(out / SIGNATURE), "--public_key", str(key.with_suffix(".pub")),
    ]  # fmt: skip
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    flip(out / "config.json", 5)
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1


def test_every_changed_added_or_removed_file_is_found_and_named(out: Path, key: Path) -> None:
    public = load_public_key(key.with_suffix(".pub"))
    assert public.check(out) == []
    for path in sorted(out.iterdir()):
        if path.name == SIGNATURE:
            continue
        raw = path.read_bytes()
        flip(path, len(raw) // 2)
        assert public.check(out) == [f"{path.name}: differs since model.sig was made"]
        path.unlink()
        assert public.check(out) == [f"{path.name}: is missing since model.sig was made"]
        path.write_bytes(raw)
    for name in ("extra.py", ".hidden", "deep/er/file"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
        assert public.check(out) == [f"{name}: was added since model.sig was made"]
        (out / name).unlink()
    for name in (".gitattributes", ".cache/huggingface/x"):  # of git, and of the Hub's client
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    assert public.check(out) == []
    blob = (out / "config.json").rename(out.parent / "blob")  # as in the client's cache
    (out / "config.json").symlink_to(blob)
    assert public.check(out) == []
    assert verify(out) == []


def test_a_signature_of_nobody_of_another_or_damaged(
    out: Path, key: Path, cli: Cli, tmp_path: Path
) -> None:
    other = write_key(tmp_path, "other").with_suffix(".pub")
    result = cli("verify", out, "--key", other, code=8)
    assert "error: model.sig is not a signature of this key: Key mismatch" in result.stderr
    public = load_public_key(key.with_suffix(".pub"))
    bundle = json.loads((out / SIGNATURE).read_text())
    payload, envelope = bundle["dsseEnvelope"]["payload"], bundle["dsseEnvelope"]
    envelope["payload"] = ("A" if payload[0] != "A" else "B") + payload[1:]
    hint = {**bundle, "verificationMaterial": {"publicKey": {}, "tlogEntries": []}}
    empty = {**bundle, "dsseEnvelope": {**envelope, "signatures": []}}
    for text in ("", "{}", "[]", "\x00", json.dumps(bundle), json.dumps(hint), json.dumps(empty)):
        (out / SIGNATURE).write_text(text)
        (problem,) = public.check(out)
        assert problem.startswith("model.sig is not a signature of this key: ")
    (out / SIGNATURE).unlink()
    result = cli("verify", out, "--key", key.with_suffix(".pub"), code=8)
    assert "error: model.sig is missing; the folder is not signed" in result.stderr


def test_a_key_with_a_password(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = write_key(tmp_path, curve="SECP384R1", password="sesame")
    with refused(
        OptionError, what="--sign key.pem needs a password", hint="set GLOSS_SIGN_PASSWORD"
    ):
        load_signer(key)
    monkeypatch.setenv("GLOSS_SIGN_PASSWORD", "simsim")
    what = "--sign key.pem cannot be read or the password is wrong"
    with refused(OptionError, what=what) as caught:
        load_signer(key)
    assert "simsim" not in str(caught.value)
    what = "--sign plain.pem has no password, and GLOSS_SIGN_PASSWORD is set"
    with refused(OptionError, what=what):
        load_signer(write_key(tmp_path, "plain"))
    monkeypatch.setenv("GLOSS_SIGN_PASSWORD", "sesame")
    signer = load_signer(key)
    assert "sesame" not in repr(signer)
    signer.sign(out, "again")
    public = load_public_key(key.with_suffix(".pub"))
    assert public.fingerprint == signer.fingerprint
    assert public.check(out) == []
    assert '"name": "again"' in statement(out)


def statement(out: Path) -> str:
    import base64

    payload = json.loads((out / SIGNATURE).read_text())["dsseEnvelope"]["payload"]
    return base64.b64decode(payload).decode()


def test_what_is_no_key_is_said_before_any_work(
    checkpoints: Checkpoints, key: Path, cli: Cli, tmp_path: Path
) -> None:
    pem = keys.Encoding.PEM, keys.PrivateFormat.PKCS8, keys.NoEncryption()
    wrong = {
        "rsa": rsa.generate_private_key(65537, 2048).private_bytes(*pem),
        "ed25519": ed25519.Ed25519PrivateKey.generate().private_bytes(*pem),
        "text": b"no key",
        "empty": b"",
    }
    for name, raw in wrong.items():
        (tmp_path / name).write_bytes(raw)
    curve = write_key(tmp_path, "curve", "SECP256K1")
    source, out = checkpoints("llama"), tmp_path / "out"
    for path, says in (
        (tmp_path / "none", "--sign none cannot be read: found No such file"),
        (tmp_path, "cannot be read: found Is a directory"),
        (tmp_path / "rsa", "found RSAPrivateKey".replace("Private", "Public")),
        (tmp_path / "ed25519", "found Ed25519PublicKey"),
        (tmp_path / "text", "--sign text cannot be read: expected a private key in PEM"),
        (tmp_path / "empty", "--sign empty cannot be read: expected a private key in PEM"),
        (key.with_suffix(".pub"), "--sign key.pub cannot be read: expected a private key"),
        (curve, "found secp256k1"),
    ):
        result = cli("convert", source, out, *TINY_ARGS, "--sign", path, code=2, says=says)
        assert "reading the headers" not in result.stderr
        assert not out.exists()
    cli("convert", source, out, *TINY_ARGS, code=0)
    for path, says in (
        (tmp_path / "none", "--key none cannot be read: found No such file"),
        (key, "expected a public key in PEM, "),
        (curve.with_suffix(".pub"), "found secp256k1"),
    ):
        cli("verify", out, "--key", path, code=2, says=says.rstrip(", "))


def test_a_key_is_not_published_and_not_deleted(
    checkpoints: Checkpoints, key: Path, cli: Cli, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    shutil.copy(key, source / "mine.pem")
    args = ("convert", source, tmp_path / "out", *TINY_ARGS, "--sign")
    says = "--sign mine.pem lies in the source folder; what is there is copied"
    cli(*args, source / "mine.pem", code=2, says=says)
    (source / "link.pem").symlink_to(key)
    says = "link.pem is a link that leads out of the source"
    cli(*args, source / "link.pem", code=4, says=says)
    out = tmp_path / "full"
    cli("convert", checkpoints("llama"), out, *TINY_ARGS, code=0)
    shutil.copy(key, out / "mine.pem")
    args = ("--overwrite", "--sign", out / "mine.pem")
    result = cli("convert", checkpoints("llama"), out, *TINY_ARGS, *args, code=7)
    assert "contains the input mine.pem" in result.stderr


def test_without_the_package_it_is_one_sentence(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("signing", "verifying"):
        monkeypatch.setitem(sys.modules, f"model_signing.{module}", None)
    for load, option in ((load_signer, "--sign"), (load_public_key, "--key")):
        with refused(
            OptionError,
            what=f"{option} needs the package model-signing",
            hint="pip install 'gloss-convert[sign]'",
        ):
            load(key)


def test_nothing_imports_the_package_unless_a_key_is_given() -> None:
    program = (
        "import sys, converter.cli.main, converter.entrypoints.verify; "
        "assert not {'model_signing', 'cryptography', 'sigstore'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
