"""Optional packages: check that they are installed, without importing them."""

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
    "s3fs": ("s3fs", "s3"),
    "profanity_check": ("alt-profanity-check", "eval"),
}
"""Module -> its package, and the extra that installs it."""


def need(what: str, module: str) -> None:
    """Raise OptionError if a package is missing that an option, named as ``what``, needs."""
    try:
        missing = find_spec(module) is None
    except ValueError:  # an imported module without a spec
        missing = False
    if missing:
        package, extra = _BROUGHT_BY[module]
        hint = f"pip install 'gloss-convert[{extra}]'"
        raise OptionError(f"{what} needs the package {package}", hint=hint)
