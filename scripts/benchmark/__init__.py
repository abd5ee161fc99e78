"""The parts of bench.py: what is measured (models, subjects, works), how (processes, runner), and the report."""
