"""The command line of compress_encoder.py: all stages, one after the other."""

from __future__ import annotations

import torch
import transformers
from transformers.hf_argparser import HfArgumentParser

from studies.encoder.arguments import Arguments
from studies.encoder.report import report
from studies.encoder.stages import Study


def main() -> None:
    """Run what is not there yet, write the report after each run, and print the table."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.jobs)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    study = Study(arguments)
    study.prepare()
    done, table = [], ""
    for run, results in study.train_all(study.pick_rates()):
        if results:
            done.append(run)
            table = report(study, done)
    print(table)
