"""Train a compressed image classifier with transformers.Trainer: two lines are ours, the rest is as ever.

    python scripts/examples/trainer.py outputs/trainer

scikit-learn's digits, 1,797 real images of 8x8 pixels, so that nothing is downloaded. Resuming
(``trainer.train(resume_from_checkpoint=True)``), load_best_model_at_end, bf16 and several GPUs work as with any model.
"""

import sys

from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import hf_rps

set_seed(0)
output_dir = sys.argv[1] if len(sys.argv) > 1 else "outputs/trainer"
digits = load_digits()
rows = Dataset.from_dict({"pixel_values": digits.images[:, None] / 8 - 1, "labels": digits.target}).with_format("torch")
data = rows.train_test_split(450, seed=0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes)
model = ViTForImageClassification(config)
model = hf_rps.get_rps_model(model, hf_rps.RPSConfig(ratio=0.1, grad_scaling="norm"))
arguments = TrainingArguments(output_dir, num_train_epochs=8, learning_rate=2e-3, per_device_train_batch_size=32,
                              eval_strategy="epoch", save_strategy="epoch", save_total_limit=1,
                              load_best_model_at_end=True, report_to="none")  # fmt: skip


def accuracy(output):
    return {"accuracy": (output.predictions.argmax(-1) == output.label_ids).mean()}


trainer = Trainer(model, arguments, train_dataset=data["train"], eval_dataset=data["test"], compute_metrics=accuracy)
trainer.train()
print(trainer.evaluate())
trainer.save_model(f"{output_dir}/model")  # small; ViTForImageClassification.from_pretrained reads it
