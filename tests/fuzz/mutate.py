"""Changes to inputs that keep them well-formed, so that the fuzzer gets behind the parser.

Every change is a function of a seed, as libFuzzer wants it.
"""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64,
    10**9, 10**30, -(2**63), 0.5, -0.0, 1e300, float("nan"), float("inf"), float("-inf"), "", " ",
    ".",
    "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:\\x", "x\x00y", "\x1b[2J", "a\nb", "\u202e",
    "\ud800", "\ufeff", "README.md", "config.json", "CONFIG.JSON", "model.safetensors",
    "gloss_manifest.json", "U", "U.0", "[", "(", "F32", "BF16", "F4", "F8_E4M3", "I64", "BOOL",
    "C64", "X" * 300, "0" * 64, "adapter", "checkpoint", "demo", "builtin", [], {}, [[]], [0], [1],
    [-1], [2**62, 2], [2**32, 2**32, 2**32], [4, 0], [0, 4], {"": ""}, {"a": None}, {"name": {}},
)  # fmt: skip

Mutate = Callable[[bytes, int], bytes]


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with every key in it."""
    found: list[tuple[Any, Any]] = []
    left = [tree]
    while left:
        node = left.pop()
        for key in keys_of(node):
            found.append((node, key))
            left.append(node[key])
    return found


def change(tree: Any, dice: random.Random) -> Any:
    """One value of a JSON value replaced, removed, moved or doubled."""
    found = places(tree)
    if not found:
        return dice.choice(HOSTILE)
    node, key = dice.choice(found)
    what = dice.randrange(8)
    if what == 0:
        del node[key]
    elif what == 1:
        other, there = dice.choice(found)
        node[key] = json.loads(json.dumps(other[there])) if there in keys_of(other) else None
    elif what == 2 and isinstance(node, dict):
        name = dice.choice(HOSTILE)
        node[name if isinstance(name, str) else str(name)] = node[key]
    elif what == 3 and isinstance(node, list):
        node.insert(key, node[key])
    elif what == 4 and type(node[key]) is int:
        node[key] += dice.choice((-8, -4, -2, -1, 1, 2, 4, 8, 16))
    elif what == 5 and isinstance(node[key], str) and node[key]:
        at = dice.randrange(len(node[key]))
        node[key] = node[key][:at] + chr(dice.randrange(256)) + node[key][at + 1 :]
    else:
        node[key] = json.loads(json.dumps(dice.choice(HOSTILE)))
    return tree


def keys_of(node: Any) -> list[Any]:
    """The keys of an object or a list; none of anything else."""
    if isinstance(node, dict):
        return list(node)
    return list(range(len(node))) if isinstance(node, list) else []


def change_json(data: bytes, size: int, seed: int, plain: Mutate) -> bytes:
    """A few such changes; of what is no JSON, or now and then, a change of bytes."""
    dice = random.Random(seed)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return plain(data, size)
    if dice.random() < 0.1:
        return plain(data, size)
    try:
        for _ in range(dice.choice((1, 1, 2, 3))):
            tree = change(tree, dice)
        text = json.dumps(tree)
    except (RecursionError, ValueError):
        return plain(data, size)
    if dice.random() < 0.05:  # a key twice
        text = text.replace("{", '{"shape": [], "a": 1, "a": 2, ' if len(text) > 2 else "{", 1)
    return text.encode("utf-8", "surrogatepass")[:size]


def change_safetensors(data: bytes, size: int, seed: int, plain: Mutate) -> bytes:
    """A change of the header whose length is then right again, or of the bytes behind it."""
    dice = random.Random(seed)
    end = 8 + int.from_bytes(data[:8], "little")
    if dice.random() < 0.1 or not 8 < end <= len(data):
        return plain(data, size)
    header, rest = data[8:end], data[end:]
    if dice.random() < 0.2:
        rest = plain(rest or b"\0", max(size - end, 1))
    else:
        header = change_json(header, size, dice.getrandbits(32), plain)
    return (struct.pack("<Q", len(header)) + header + rest)[:size]
