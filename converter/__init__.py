"""gloss-convert: make a language model less toxic by editing its checkpoint.

The command line (``converter.cli``) is the public interface; ``converter.entrypoints.convert``
is the same job as one Python call.
"""

__version__ = "0.1.0"
