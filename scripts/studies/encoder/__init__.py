"""The parts of compress_encoder.py: a sentence encoder, compressed and distilled from itself."""
