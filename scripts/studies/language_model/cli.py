"""The command line of compress_language_model.py: all stages, one after the other."""

from __future__ import annotations

import torch
import transformers
from transformers.hf_argparser import HfArgumentParser

from studies.language_model.arguments import Arguments
from studies.language_model.report import report
from studies.language_model.rows import CODEBOOK
from studies.language_model.study import Study


def main() -> None:
    """Run what is not there yet, and print the tables."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    study, rows = Study(arguments), arguments.parsed_rows
    trained = [row for row in rows if row.method != "dense"]
    for stage in arguments.stages:
        if stage == "untrained":
            for row in rows:
                study.untrained(row)
        elif stage == "rates":
            for row in trained:
                for rate in arguments.grid:
                    study.rate(row, rate)
        elif stage == "distilled":
            for row in trained:
                study.distilled(row)
        elif stage == "arithmetic":
            for row in (row for row in trained if row.method == CODEBOOK):
                study.arithmetic(row)
        elif stage == "finetuned":
            for method in arguments.methods:
                study.finetuned(method)
        else:
            print(report(study))
