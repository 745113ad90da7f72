"""Packages that only some features need: whether they are installed, without importing them."""

from importlib.util import find_spec

from converter.errors import OptionError

_BROUGHT_BY = {
    "accelerate": ("accelerate", "gguf"),
    "detoxify": ("detoxify", "detoxify"),
    "gguf": ("gguf", "gguf"),
    "lm_eval": ("lm-eval", "ability"),
    "matplotlib": ("matplotlib", "plot"),
    "model_signing": ("model-signing", "sign"),
    "nltk": ("nltk", "eval"),
    "optuna": ("optuna", "search"),
    "ray": ("ray", "ray"),
    "profanity_check": ("alt-profanity-check", "eval"),
}
"""Module -> the package that it is of, and the extra that brings it."""


def need(what: str, module: str) -> None:
    """Raise OptionError if a package is missing that an option, named as ``what``, needs."""
    try:
        missing = find_spec(module) is None
    except ValueError:  # it was imported, and does not say from where
        missing = False
    if missing:
        package, extra = _BROUGHT_BY[module]
        hint = f"pip install 'gloss-convert[{extra}]'"
        raise OptionError(f"{what} needs the package {package}", hint=hint)
