"""RPS as a PEFT method: the tuner and its parts."""
