"""Fine-tune, train from scratch, or distil a transformers model, dense or compressed with RPS, on any dataset.

    python scripts/finetune.py --task text-classification --model_name_or_path bert-base-uncased \
        --dataset_name stanfordnlp/imdb --ratio 0.1 --output_dir outputs/imdb
    python scripts/finetune.py --task image-classification --dataset_name sklearn/digits --model_type vit \
        --config_overrides image_size=8,patch_size=2,num_channels=1,hidden_size=64,num_hidden_layers=4 \
        --output_dir outputs/digits
    python scripts/finetune.py --task causal-lm --model_name_or_path user/my-llm --mapping codebook --bits 3 \
        --teacher itself --train_file text.txt --output_dir outputs/small
    accelerate launch scripts/finetune.py config.yaml --seed 1       # a file of arguments, and changes to it
    accelerate launch --config_file scripts/configs/accelerate/ddp.yaml scripts/finetune.py config.yaml
    torchrun --nproc_per_node 2 scripts/finetune.py config.yaml      # data parallel, on a CPU too
    python scripts/finetune.py config.yaml --resume                  # go on after a kill, with any number of processes

Writes to the output folder: metrics.jsonl (the history), checkpoint-<step>/, compressed/ (with a learned map: the model
before the first step), model/ (model, tokenizer or image processor, and model card, for from_pretrained) and
results.json. The parts are in finetuning/: run.py is what happens in order, and only the lines between two marks in
models.py know RPS; the rest is plain accelerate.
"""

from finetuning.run import main

if __name__ == "__main__":
    main()
