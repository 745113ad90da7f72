"""The models of transformers by ``model_type``, read from its files, since an import takes seconds.

``configuration_auto.py`` and ``auto_mappings.py`` name the configs, ``modeling_auto.py`` has a list
of types and classes for each auto class. ``tests/test_doors.py`` compares with an import.
"""

import ast
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""The auto classes of transformers that load a model which continues text."""

LISTS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}
"""Auto class -> its list in ``modeling_auto.py``."""


def version() -> str:
    """The version of transformers."""
    return version_of("transformers")


def knows(model_type: str) -> bool:
    """Whether transformers has a config class for a ``model_type``."""
    return model_type in config_types()


def config_types() -> dict[str, str]:
    """``model_type`` -> name of its config class, of all that transformers knows."""
    known = _read("auto_mappings.py")["CONFIG_MAPPING_NAMES"]
    return known | _read("configuration_auto.py").get("CONFIG_MAPPING_NAMES", {})


def model_types(auto_class: str) -> dict[str, str]:
    """``model_type`` -> name of the class that an auto class loads it with."""
    return dict(_read("modeling_auto.py")[LISTS[auto_class]])


def continues_text(model_type: str) -> bool:
    """Whether an auto class of language models knows the config class of a ``model_type``."""
    configs = config_types()
    known = {configs.get(each) for auto in AUTO_CLASSES for each in model_types(auto)}
    return configs.get(model_type) in known - {None}


def lists_of(model_type: str) -> set[str]:
    """The lists of ``modeling_auto.py`` that have a ``model_type``, such as
    ``MODEL_FOR_CTC_MAPPING_NAMES``."""
    return {name for name, types in _read("modeling_auto.py").items() if model_type in types}


@cache
def _read(name: str) -> dict[str, dict[str, str]]:
    """Name of a list in a file of the auto classes -> its entries, later additions included."""
    spec = find_spec("transformers")
    assert spec is not None  # it is a dependency
    assert spec.origin is not None
    path = Path(spec.origin).parent / "models/auto" / name
    found: dict[str, dict[str, str]] = {}
    for line in ast.parse(path.read_text("utf-8")).body:
        value = line.value if isinstance(line, ast.Assign | ast.Expr) else None
        if not isinstance(value, ast.Call):
            continue
        place = value.func.value if isinstance(value.func, ast.Attribute) else None  # NAME.update
        if isinstance(line, ast.Assign):
            place = line.targets[0]
        if isinstance(place, ast.Name):
            entries = found.setdefault(place.id, {})
            for given in (*value.args, *(keyword.value for keyword in value.keywords)):
                entries |= _entries(given, found)
    return {name: entries for name, entries in found.items() if entries}


def _entries(value: ast.expr, known: dict[str, dict[str, str]]) -> dict[str, str]:
    """The entries of an expression: pairs of texts, a dict of them, or another list."""
    if isinstance(value, ast.Dict):
        pairs = (_texts([key, item]) for key, item in zip(value.keys, value.values, strict=True))
        return dict(filter(None, pairs))
    found: dict[str, str] = {}
    for part in value.elts if isinstance(value, ast.List) else ():
        if isinstance(part, ast.Tuple):
            found |= dict(filter(None, [_texts(part.elts)]))  # a few have several classes
        elif isinstance(part, ast.Starred):
            names = (node.id for node in ast.walk(part) if isinstance(node, ast.Name))
            for name in names:
                found |= known.get(name, {})
    return found


def _texts(parts: Sequence[ast.expr | None]) -> tuple[str, str] | None:
    """Two literal texts, or None."""
    texts = [str(part.value) for part in parts if isinstance(part, ast.Constant)]
    return (texts[0], texts[1]) if len(texts) == len(parts) == 2 else None
