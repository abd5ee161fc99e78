"""The parts of compare.py: tasks, methods, training, studies and their tables and plots."""
