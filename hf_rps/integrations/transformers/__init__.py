"""transformers: its checkpoints (a quantization method called rps), and the marks on a compressed model."""
