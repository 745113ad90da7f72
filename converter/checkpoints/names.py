"""The names of files that make up a checkpoint and its record."""

SINGLE = "model.safetensors"


INDEX = "model.safetensors.index.json"


CARD = "README.md"


MANIFEST = "gloss_manifest.json"


SUMS = "SHA256SUMS"


SIGNATURE = "model.sig"
