"""The measurements behind the documentation: comparison, encoder, adapters, theory; and the demonstration."""
