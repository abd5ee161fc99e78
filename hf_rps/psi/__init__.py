"""The shared array psi: its owner, the passes that read it, the sink and the divisor of its gradient."""
