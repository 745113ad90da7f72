"""Checks of a conversion with calibration models, made while planning."""

from itertools import islice

from converter.calibration.given import check_given
from converter.calibration.pairs import load_prose
from converter.checkpoints.fusing import ALIGNMENT, CODE, own_name
from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.edits.base import Footprint
from converter.errors import OptionError
from converter.methods.base import Method
from converter.methods.together import parts_of
from converter.methods.workbench import TRAINING, TRAINING_HINT
from converter.models.loading import load_tokenizer
from converter.models.placement import choose_forward
from converter.models.resident import choose_device, choose_dtype
from converter.recipe import Recipe, Settings

_COMPARED = 20
"""Paragraphs that two tokenizers must split in the same way."""


def check_calibration(recipe: Recipe, source: Source, plan: Plan, footprint: Footprint) -> None:
    """Refuse a calibration model that does not fit, or that no method would use.

    Raises:
        OptionError: the method needs none, or tokenizer, class or sizes differ.
    """
    if recipe.calibration is None:
        return
    if CODE not in footprint.files:
        raise OptionError(
            "--calibration", expected="--method fusion -o form=paper", found=recipe.method
        )
    ours, theirs = load_tokenizer(source.folder), load_tokenizer(recipe.calibration)
    texts = list(islice(load_prose("builtin").paragraphs, _COMPARED))
    same = ours.get_vocab() == theirs.get_vocab()
    if not same or ours(texts)["input_ids"] != theirs(texts)["input_ids"]:
        raise OptionError(
            f"--calibration {recipe.calibration.name}: its tokenizer",
            expected=f"that of {source.name}, since one text is read by both models",
            found="one that gives other tokens",
            hint="train one from the model with gloss calibrate",
        )
    shapes = {own_name(n): shape for n, shape in footprint.created.items() if n != ALIGNMENT}
    depth = 1 + max(_layer(name) for name in shapes)
    check_given(recipe.calibration, plan, depth, shapes)


def _layer(name: str) -> int:
    """The layer in a tensor's name; -1 for a tensor outside the layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


def check_forward(recipe: Recipe, settings: Settings, plan: Plan, method: Method) -> None:
    """Refuse to stream a model whose calibration models are to be trained.

    Raises:
        OptionError, SourceError: it would be streamed, as asked for or because memory is short.
    """
    if not any(getattr(part, "trains", False) for part in parts_of(recipe.method, method).values()):
        return
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.forward_dtype, plan, device)
    spread = recipe.device == "map"
    if spread:
        raise OptionError(f"{TRAINING} the model must be on one device", found="--device map")
    given = recipe.forward, plan, dtype, device, settings.memory_limit
    choose_forward(*given, spread=spread).need_resident(TRAINING, TRAINING_HINT)
