"""Which methods there are, by name, without what their modules need: torch takes seconds."""

from converter.runtime.registry import Registry

METHODS = Registry(
    "gloss_convert.methods",
    "--method",
    {
        "fusion": "converter.methods.fusion:Method",
        "gloss": "converter.methods.gloss:Method",
        "gloss-paper": "converter.methods.gloss_paper:Method",
        "destein": "converter.methods.destein:Method",
        "model-surgery": "converter.methods.model_surgery:ModelSurgery",
        "profs": "converter.methods.baselines:Profs",
        "dinm": "converter.methods.dinm:Method",
        "random": "converter.methods.baselines:RandomSubspace",
    },
    ("title", "paper", "strength", "defaults", "footprint", "fit"),
)
"""Name -> a class like ``Method``."""

Layers = tuple[int, ...]

Factors = tuple[float, ...]
"""One for each layer of a model, from 0 to 1: how much of a subspace is taken out of it; empty for
1 in all of them."""

SEPARATOR = "+"
"""Between the names of several methods."""
