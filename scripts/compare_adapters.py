"""Adapters at equal budgets: RPS (mode="delta") beside LoRA, VeRA and UniLoRA of PEFT, on a real encoder and real text.

    python scripts/compare_adapters.py --model_name_or_path MiniLM_FOLDER [--data_dir /usr/share/games/fortunes]

The task: tell the topic of a saying of Debian's `fortunes` (one file per topic, entries separated by lines of one %).
The encoder is frozen; an adapter and a linear head on the mean of the last hidden states are trained, the head the same
way for everyone and outside the budget. Every method's learning rate is picked from one grid on the validation split
with one seed; the test accuracy is the mean over the seeds. Runs are kept, one JSON line each, in
OUTPUT_DIR/runs.jsonl, and are not run again; OUTPUT_DIR/table.md is written at the end.
"""

from studies.adapters import main

if __name__ == "__main__":
    main()
