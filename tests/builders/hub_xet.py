"""What hf_xet's local storage knows: the name that it gives to a file with a certain sha256.

It keeps records of 48 bytes in shard files (https://github.com/huggingface/xet-core, mdb_shard):
after a header of 48 bytes comes, for each file, its name (32 bytes), flags and the number n of its
parts; n parts; n checks, if a flag says so; and a record with its sha256, if another says so. A
name of ones ends the list.
"""

import struct
from pathlib import Path

RECORD = 48
CHECKS, METADATA = 1 << 31, 1 << 30


def words(data: bytes) -> str:
    """Hex digits of a name: four little-endian numbers of 64 bits."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def names_in(shard: bytes) -> dict[str, str]:
    """sha256 -> name, of the files that a shard file lists."""
    found, place = {}, RECORD
    while shard[place : place + 32].strip(b"\xff"):
        name, flags, count = struct.unpack_from("<32sII", shard, place)
        place += RECORD * (1 + count + (count if flags & CHECKS else 0))
        if flags & METADATA:
            found[words(shard[place : place + 32])] = words(name)
            place += RECORD
    return found


def xet_hash_of(storage: Path, sha256: str) -> str | None:
    """The name of a file in the storage, or None."""
    for path in storage.rglob("*.mdb"):
        names = names_in(path.read_bytes())
        if sha256 in names:
            return names[sha256]
    return None
