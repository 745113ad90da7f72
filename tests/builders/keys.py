"""Keys to sign with."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization as keys
from cryptography.hazmat.primitives.asymmetric import ec


def write_key(
    folder: Path, name: str = "key", curve: str = "SECP256R1", password: str = ""
) -> Path:
    """A private key and, beside it, its public one, named ``.pub``."""
    key = ec.generate_private_key(getattr(ec, curve)())
    hidden = keys.BestAvailableEncryption(password.encode()) if password else keys.NoEncryption()
    pem = keys.Encoding.PEM
    path = folder / f"{name}.pem"
    path.write_bytes(key.private_bytes(pem, keys.PrivateFormat.PKCS8, hidden))
    public = key.public_key().public_bytes(pem, keys.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path
