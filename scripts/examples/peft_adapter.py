"""Fine-tune a causal language model with an RPS adapter: PEFT and Trainer as ever, only the config is ours.

    python scripts/examples/peft_adapter.py --model_name_or_path gpt2 --train_file book.txt --output_dir outputs/book

Trains the adapter, saves it, loads it onto the base model again, merges it, and saves the merged model.
"""

import argparse

from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from hf_rps import RPSConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="the base model: a folder or a Hub name")
    parser.add_argument("--train_file", required=True, help="a text file")
    parser.add_argument("--output_dir", required=True, help="gets adapter/ and merged/")
    parser.add_argument("--mode", default="delta", choices=["delta", "replace"])
    parser.add_argument("--ratio", type=float, default=0.001, help="trained numbers over targeted weights")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--block_size", type=int, default=128, help="tokens of a training example, at most")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    text = load_dataset("text", data_files=arguments.train_file, split="train").filter(lambda row: row["text"].strip())
    data = text.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=arguments.block_size), remove_columns="text"
    )

    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path)
    model = get_peft_model(
        model, RPSConfig(ratio=arguments.ratio, mode=arguments.mode, grad_scaling="norm", task_type="CAUSAL_LM")
    )
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        TrainingArguments(
            arguments.output_dir,
            max_steps=arguments.max_steps,
            learning_rate=arguments.learning_rate,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        data,
    )
    trainer.train()
    model.save_pretrained(f"{arguments.output_dir}/adapter")

    model = AutoPeftModelForCausalLM.from_pretrained(f"{arguments.output_dir}/adapter")
    merged = model.merge_and_unload()  # a plain transformers model
    merged.save_pretrained(f"{arguments.output_dir}/merged")
    tokenizer.save_pretrained(f"{arguments.output_dir}/merged")


if __name__ == "__main__":
    main()
