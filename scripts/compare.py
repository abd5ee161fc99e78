"""The comparison: RPS beside pruning, smaller models and earlier parameter sharing, on the same work.

    python scripts/compare.py --preset quick                    # two cores, the main table in under 30 minutes
    python scripts/compare.py --preset full --device cuda       # a GPU, every cell
    python scripts/compare.py --studies stability learning-rate --tasks vit convnet

Runs are kept in OUTPUT_DIR/runs.jsonl under a hash of their settings: started again, the script goes on where it was,
and with other flags it runs only what is new. Tables (Markdown) and plots (PNG) go to OUTPUT_DIR, and with --docs also
into docs/comparison.md. Images are Fashion-MNIST of Debian's package dataset-fashion-mnist, or --image_dataset; text is
that of the running Python's documentation and standard library. Nothing is downloaded unless --image_dataset asks.
The parts are in studies/comparison/.
"""

import logging
import sys

from studies.comparison.cli import main

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
