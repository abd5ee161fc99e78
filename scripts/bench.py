"""Time and memory of compressed models beside the dense model, on the same work, as ratios from one run.

    python scripts/bench.py                                             # the usual works, on two cores in some minutes
    python scripts/bench.py --only step --models llama-1b --ratios 0.1 --output rows.jsonl
    python scripts/bench.py --only stack --fakeroast ../FakeRoast       # beside the authors' code
    python scripts/bench.py --device cuda --dtype bfloat16
    python scripts/bench.py --only decode prefill --models llama-1b --forms codebook --bits 4 3     # a learned map
    python scripts/bench.py --report rows.jsonl --plots plots           # tables and plots of saved rows

Every subject (the dense model; views: ours; folded: ours with folded inputs; codebook: ours with a learned map; gather:
ours with an index and a sign per weight; cat: ours, every weight made whole; the authors' FakeRoast and RzLinear;
adapters) works in a process of its own. The dense model stays for a work, the others come one at a time beside it, and
the two run in strict alternation. A time ratio is the median over rounds of (subject / dense) in the same round, with
quartiles; memory is the peak over what the process held before it built the model. A subject that fails is reported
with its error, and the run goes on.

Works:
"""

from benchmark.cli import main

if __name__ == "__main__":
    main(description=__doc__)
