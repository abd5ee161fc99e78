"""Maps that are learned from the weights they will stand for: codebooks and codes, layer by layer."""
