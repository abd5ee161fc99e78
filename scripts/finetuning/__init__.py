"""The parts of finetune.py: arguments and data, the model and its loss, the loop, and what a run leaves behind."""
