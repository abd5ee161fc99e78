"""Bindings to the Hugging Face libraries."""
