"""The images the pipelines run in: their locked dependencies, and the digests under which a registry has them."""
