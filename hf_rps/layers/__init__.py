"""The layers of a compressed model, and the kinds of layers that they stand in for."""
