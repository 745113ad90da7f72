"""Read and rewrite files of the safetensors format."""
