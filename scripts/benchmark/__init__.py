"""The parts of bench.py: its command line; models, subjects and works; processes and the runner; the report."""
