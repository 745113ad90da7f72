"""A calibration model given in a folder."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from msgspec import ValidationError

from converter.calibration.calibration_models import Calibration
from converter.calibration.pairs import Pairs
from converter.checkpoints.names import CALIBRATION
from converter.checkpoints.plan import Plan, locate_tensors
from converter.checkpoints.resolve import resolve
from converter.checkpoints.source import Source
from converter.errors import OptionError
from converter.manifest import CalibrationRecord, parse_calibration
from converter.runtime import progress, strict_json
from converter.runtime.files import read_file

_FREE = ("_name_or_path", "architectures", "dtype", "layer_types", "no_rope_layers",
         "num_hidden_layers", "tie_word_embeddings", "torch_dtype", "transformers_version",
         "use_cache")  # fmt: skip
"""Keys of a config in which a calibration model may differ."""


def check_given(folder: Path, plan: Plan, depth: int, shapes: dict[str, tuple[int, ...]]) -> Source:
    """Refuse, from its headers, a calibration model that does not match the model's first layers.

    Args:
        folder: of the calibration model.
        plan: of the model.
        depth: required number of layers.
        shapes: required shapes of its tensors, by their names in the model.

    Raises:
        OptionError: its class, depth or sizes differ.
    """
    given = resolve(str(folder))
    found, label = given.config.get("num_hidden_layers"), f"--calibration {folder.name}"
    if found != depth:
        raise OptionError(
            f"{label}: layers", expected=f"{depth}, the depth of the method", found=str(found),
            hint=f"give -o depth={found}",
        )  # fmt: skip
    keys = (plan.config.keys() | given.config.keys()) - {*_FREE}
    unlike = [key for key in sorted(keys) if plan.config.get(key) != given.config.get(key)]
    if unlike:
        raise OptionError(
            f"{label}: {unlike[0]}", expected=f"{plan.config.get(unlike[0])}, as of the model",
            found=str(given.config.get(unlike[0]))[:80],
            hint="train one from the model with gloss calibrate",
        )  # fmt: skip
    tensors = locate_tensors(given.weight_map, given.headers())
    for name, shape in shapes.items():
        if name not in tensors or tensors[name][1].shape != shape:
            raise OptionError(
                f"{label}: tensor {name}", expected=f"one of shape {list(shape)}",
                found=str(list(tensors[name][1].shape)) if name in tensors else "none",
            )  # fmt: skip
    return given


def given_calibration(folder: Path, names: Collection[str], pairs: Pairs) -> Calibration:
    """The tensors of a calibration model that passed ``check_given``, and its record.

    Warns if it may have been trained on held-out texts.
    """
    given, record = resolve(str(folder)), calibration_record(folder)
    tensors = locate_tensors(given.weight_map, given.headers())
    if record is None:
        progress.warn(f"{folder.name} does not say what it was trained on; held-out texts may be")
    elif record.pairs.sha256 != pairs.sha256:
        progress.warn(
            f"{folder.name} was trained on other pairs than those of this fit, so what is measured "
            "may not be held out of it; give it the same --pairs, --num-pairs and --seed"
        )
    about: dict[str, Any] = {"name": folder.name, "files": given.digests()}
    if record is not None:
        about |= {"losses": list(record.losses), "tokens": record.tokens}
    return Calibration({name: given.read(*tensors[name]).float() for name in names}, about)


def calibration_record(folder: Path) -> CalibrationRecord | None:
    """How a calibration model was trained; None if there is no such file.

    Raises OptionError if the file is not a record.
    """
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    try:
        return parse_calibration(strict_json.parse(read_file(path)))
    except (OSError, ValueError, ValidationError) as error:
        raise OptionError(f"{folder.name}/{CALIBRATION} is no record", found=str(error)) from error
