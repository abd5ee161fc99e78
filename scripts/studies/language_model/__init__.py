"""The parts of compress_language_model.py: a language model under learned maps, distilled and fine-tuned."""
