"""The parts of compare.py: tasks, methods, training, and a file for each study with its runs, table and plot."""
