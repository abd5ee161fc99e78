"""Arguments of finetune.py: one dataclass per concern, read from flags or from one YAML or JSON file, and checked."""
