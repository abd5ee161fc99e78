"""The demonstration: a small ViT learns scikit-learn's digits twice, dense and at a tenth of its weights.

    python scripts/demo.py

Trains with finetune.py (through accelerate launch, one process on the CPU, the same recipe for both), loads each saved
model in a new process and compares its logits with those of the process that trained it, prints one table and draws
outputs/demo/learning_curves.png. Takes about two minutes on two cores and needs no network.
"""

from studies.demo import main

if __name__ == "__main__":
    main(__doc__.split("\n\n", maxsplit=1)[0])
