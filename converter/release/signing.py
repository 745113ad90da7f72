"""OpenSSF model signatures: they prove who signed a folder, and that it has not changed since.

``model.sig`` is a Sigstore bundle around the sha256 of every file, made with an elliptic-curve key
by the package model-signing, which nothing imports unless a key is given. Its own command line can
check it, too: ``model_signing verify key FOLDER --signature FOLDER/model.sig --public_key
PUBLIC.pem``.
"""

import base64
import hashlib
import io
import json
import os
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from converter.checkpoints.names import SIGNATURE
from converter.errors import OptionError
from converter.outputs.base import file_entry

_PASSWORD = "GLOSS_SIGN_PASSWORD"  # noqa: S105 - the name of the variable that holds it
"""Environment variable with the password of a private key; others could see an option."""

_IGNORED = (SIGNATURE, ".cache")
"""Not signed: the signature itself, and files that the Hub's client leaves in a download folder.
The package leaves out Git's own files.
"""

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
"""The curves of keys that the package can use."""

_INSTALL = "pip install 'gloss-convert[sign]'"
_MAKE = "openssl ecparam -name prime256v1 -genkey -noout -out KEY makes one"


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key, read and checked.

    Attributes:
        path: of the key; recorded nowhere.
        fingerprint: sha256 of the public key in PEM, as ``sha256sum PUBLIC.pem`` prints it.
    """

    path: Path
    fingerprint: str
    _config: Any = field(repr=False)

    def keep_out_of(self, source: str) -> None:
        """Raise OptionError if the key lies in a source folder, whose files are published."""
        folder = Path(source)
        places = {self.path.absolute(), self.path.resolve()}
        if folder.is_dir() and any(place.is_relative_to(folder.resolve()) for place in places):
            raise OptionError(
                f"--sign {self.path.name} lies in the source folder",
                hint="what is there is copied into the output; keep the key elsewhere",
            )

    def sign(self, folder: Path, name: str, beside: Path | None = None) -> None:
        """Sign every file of a folder under a name for the model; ``model.sig`` is written.

        In a folder that is already in its place, it is written to a folder ``beside`` first, on the
        same disk.

        Raises:
            OSError: the folder cannot be read or written.
        """
        part, hashing = (beside or folder) / SIGNATURE, _Hashing(name)
        if beside and beside.parent.samefile(folder):  # a mount point, which has it within
            hashing.add_ignored_paths(model_path=folder, paths=[beside.name])
        self._config.set_hashing_config(hashing).sign(folder, part)
        file_entry(part)
        part.replace(folder / SIGNATURE)


def load_signer(path: Path) -> Signer:
    """Read a private key.

    Raises:
        OptionError: the package is missing, or this is not a key that it can sign with.
    """
    option = f"--sign {path.name}"
    signing, keys = _package("model_signing.signing", "--sign"), _keys()
    password = os.fsencode(os.environ.get(_PASSWORD, "")) or None
    raw = _read(option, path)
    try:
        key = keys.load_pem_private_key(raw, password)
    except TypeError as error:  # the one thing that it says so
        raise OptionError(
            f"{option} has no password, and {_PASSWORD} is set"
            if password
            else f"{option} needs a password",
            hint=f"unset {_PASSWORD}" if password else f"set {_PASSWORD}",
        ) from error
    except Exception as error:  # of several kinds; what they say may quote the file
        wrong = " or the password is wrong" if password else ""
        raise OptionError(
            f"{option} cannot be read{wrong}", expected="a private key in PEM", hint=_MAKE
        ) from error
    fingerprint = _fingerprint(option, key.public_key())
    config = signing.Config().use_elliptic_key_signer(private_key=path, password=password)
    return Signer(path, fingerprint, config)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key, read and checked; ``fingerprint`` as in ``Signer``."""

    fingerprint: str
    _config: Any = field(repr=False)

    def check(self, folder: Path) -> list[str]:
        """The differences between a folder and the signed files, a sentence each."""
        if not (folder / SIGNATURE).is_file():
            return [f"{SIGNATURE} is missing; the folder is not signed"]
        hashing = _Hashing(folder.name)
        try:
            with redirect_stdout(io.StringIO()):  # the package prints advice
                self._config.set_hashing_config(hashing).verify(folder, folder / SIGNATURE)
        except Exception as error:  # a third party's reader on a file that may be damaged
            said = " ".join(str(error).split())[:200] or type(error).__name__
            if hashing.found is not None:  # the signature is theirs, so the folder is not
                return _differences(folder / SIGNATURE, hashing.found) or [f"{SIGNATURE}: {said}"]
            return [f"{SIGNATURE} is not a signature of this key: {said}"]
        return [] if _is_canonical(folder / SIGNATURE) else [f"{SIGNATURE} was altered"]


def load_public_key(path: Path) -> PublicKey:
    """Read a public key.

    Raises:
        OptionError: the package is missing, or this is not a key that it can check with.
    """
    option = f"--key {path.name}"
    verifying, keys = _package("model_signing.verifying", "--key"), _keys()
    raw = _read(option, path)
    try:
        key = keys.load_pem_public_key(raw)
    except Exception as error:  # of several kinds
        raise OptionError(
            f"{option} cannot be read",
            expected="a public key in PEM",
            hint="openssl pkey -in KEY -pubout writes that of a private key",
        ) from error
    fingerprint = _fingerprint(option, key)
    return PublicKey(fingerprint, verifying.Config().use_elliptic_key_verifier(public_key=path))


class _Hashing:
    """A hashing configuration for the package, whose own would name the model after its folder.

    Attributes:
        found: file name -> sha256, once they have been computed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.found: dict[str, str] | None = None
        hashing = import_module("model_signing.hashing")
        self.config = hashing.Config().set_ignored_paths(paths=_IGNORED).set_allow_symlinks(True)

    def add_ignored_paths(self, **given: Any) -> None:
        """Also leave out the files that the signature leaves out."""
        self.config.add_ignored_paths(**given)

    def hash(self, folder: Path, **more: Any) -> Any:
        """The digests of a folder's files."""
        manifest = import_module("model_signing.manifest")
        hashed = self.config.hash(folder, **more)
        entries = list(hashed.resource_descriptors())
        self.found = {entry.identifier: entry.digest.digest_hex for entry in entries}
        items = [
            manifest.FileManifestItem(path=PurePosixPath(entry.identifier), digest=entry.digest)
            for entry in entries
        ]
        kind = manifest.SerializationType.from_args(hashed.serialization_type)
        return manifest.Manifest(self.name, items, kind)


def _is_canonical(signature: Path) -> bool:
    """Whether the base64 of a valid signature is the only spelling of its bytes.

    Decoders ignore the last bits of the last character, so other texts decode to the same bytes.
    """
    envelope = json.loads(signature.read_text("utf-8"))["dsseEnvelope"]
    texts = [envelope["payload"], *(entry["sig"] for entry in envelope["signatures"])]
    return all(base64.b64encode(base64.b64decode(text)).decode() == text for text in texts)


def _differences(signature: Path, found: dict[str, str]) -> list[str]:
    """The files that differ from a signature that is known to be valid."""
    bundle = json.loads(signature.read_text("utf-8"))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    resources = statement.get("predicate", {}).get("resources", [])
    signed = {entry["name"]: entry["digest"] for entry in resources}
    return [
        f"{name}: "
        + ("was added" if name not in signed else "is missing" if name not in found else "differs")
        + f" since {SIGNATURE} was made"
        for name in sorted(signed.keys() | found)
        if signed.get(name) != found.get(name)
    ]


def _package(module: str, option: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise OptionError(
            f"{option} needs the package model-signing", found=str(error), hint=_INSTALL
        ) from error


def _keys() -> Any:
    return import_module("cryptography.hazmat.primitives.serialization")


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OptionError(f"{option} cannot be read", found=error.strerror) from error


def _fingerprint(option: str, key: Any) -> str:
    """The sha256 of a public key in PEM.

    Raises:
        OptionError: it is of a kind that the package does not take.
    """
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__.lstrip("_"))
    if curve not in _CURVES:
        raise OptionError(
            option, expected=f"a key on the curve {', '.join(_CURVES)}", found=curve, hint=_MAKE
        )
    keys = _keys()
    form = keys.Encoding.PEM, keys.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(*form)).hexdigest()
