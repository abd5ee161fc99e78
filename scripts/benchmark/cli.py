"""The command line of bench.py: what to measure and how, and the jobs that this makes."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
from pathlib import Path

import torch

from benchmark import costs, report
from benchmark.runner import DEFAULT_WORKS, WORKS, Job, measure, subjects
from benchmark.settings import Settings
from benchmark.subjects import FORMS, PEERS, missing
from hf_rps.config import DEFAULT_BITS
from hf_rps.mappings.codebook import BITS

PATHS = ("--fakeroast", "--rzlinear", "--output", "--plots")  # options whose values are this machine's own


def _positive(kind: type, most: float | None = None):
    """Parser of positive numbers, up to ``most``."""

    def parse(text: str):
        value = kind(text)
        if not value > 0 or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text} is not in (0, {'∞' if most is None else most}]")
        return value

    parse.__name__ = kind.__name__
    return parse


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """All options; ``description`` ends in a heading, under which the works are listed."""
    works = "\n".join(f"    {name:<12}{work.help} ({', '.join(work.models)})" for name, work in WORKS.items())
    result = argparse.ArgumentParser(
        description=(description or "Works:\n") + works, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    _add_what(result.add_argument_group("what to measure"))
    _add_how(result.add_argument_group("how"))
    _add_results(result.add_argument_group("results"))
    return result


def _add_what(group: argparse._ArgumentGroup) -> None:
    models = list(dict.fromkeys(model for work in WORKS.values() for model in work.models))
    group.add_argument("--only", nargs="+", choices=list(WORKS), default=list(DEFAULT_WORKS), metavar="WORK",
                      help=f"works; default: {' '.join(DEFAULT_WORKS)}")  # fmt: skip
    group.add_argument("--models", nargs="+", choices=models, metavar="MODEL",
                      help=f"any of {', '.join(models)}; default: each work's usual")  # fmt: skip
    group.add_argument("--ratios", type=_positive(float, 1), nargs="+", default=[0.1, 0.01],
                      help="stored numbers over weights of the compressed subjects")  # fmt: skip
    group.add_argument("--forms", nargs="*", choices=FORMS,
                      help="compressed forms (none: peers only), all at every ratio; default: views at every ratio "
                           "and, for stack, folded at every ratio, gather and cat at the first, as are peers, and "
                           "codebook")  # fmt: skip
    group.add_argument("--bits", type=int, nargs="+", choices=BITS, default=[DEFAULT_BITS],
                      help="of a code of the form codebook, which has no ratio")  # fmt: skip
    group.add_argument("--fakeroast", metavar="PATH", help="a checkout of FakeRoast, to be measured too (needs mmh3)")
    group.add_argument("--rzlinear", metavar="PATH", help="a checkout of RzLinear, to be measured too (needs CUDA)")
    group.add_argument("--tokens", type=_positive(int), nargs="+", default=[1, 8, 128, 512], help="of the layer stack")
    group.add_argument(
        "--step-tokens", type=_positive(int, 1024), nargs="+", default=[16, 512], help="of training steps"
    )
    group.add_argument("--prompt", type=_positive(int, 1024), default=512, help="tokens of prefill")
    group.add_argument("--batches", type=_positive(int), nargs="+", default=[1, 8, 64], help="batch sizes of decode")
    group.add_argument("--fused", action="store_true", help="use the fused AdamW in every subject")
    group.add_argument("--part", type=_positive(float, 1),
                      help="share of llama-1b's layers and vocabulary kept; default: 0.25 on cpu, else 1")  # fmt: skip


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where models live")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of models")
    group.add_argument("--threads", type=_positive(int), default=os.cpu_count(), help="threads of every subject")
    group.add_argument("--rounds", type=_positive(int), default=7, help="rounds of alternation; the median counts")
    group.add_argument("--seconds", type=_positive(float), default=0.5,
                     help="about how long each subject works in a round, at least one run")  # fmt: skip


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", type=Path, metavar="FILE", help="append every finished row to FILE, one JSON line each"
    )
    group.add_argument("--report", type=Path, nargs="+", metavar="FILE",
                     help="measure nothing; report the rows of these files, where later replace earlier")  # fmt: skip
    group.add_argument(
        "--costs", action="store_true", help="with --report: layer stacks beside the cost model's prediction"
    )
    group.add_argument("--plots", type=Path, metavar="FOLDER", help="also write plots (PNG) there")


def command_line(argv: list[str]) -> str:
    """The command with PATH in place of this machine's paths."""
    words = ["python", "scripts/bench.py"]
    for before, word in itertools.pairwise(["", *argv]):
        option, equals, _ = word.partition("=")
        shown = f"{option}=PATH" if equals and option in PATHS else word
        words.append("PATH" if before in PATHS else shown)
    return shlex.join(words)


def plan(arguments: argparse.Namespace) -> list[Job]:
    """The jobs that the arguments ask for: works and models that fit each other."""
    peers, jobs = [peer for peer in PEERS if getattr(arguments, peer)], []
    for work in arguments.only:
        chosen = subjects(work, arguments.forms, arguments.ratios, peers, arguments.bits)
        wanted = arguments.models or WORKS[work].default_models
        jobs += [Job(work, model, chosen) for model in wanted if model in WORKS[work].models and chosen]
    return jobs


def check(cli: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with an error where what is asked for can't be measured here."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        cli.error("--device cuda: torch finds no CUDA device here")
    if arguments.rzlinear and arguments.device != "cuda":
        cli.error("--rzlinear: the authors' code is Triton and runs on CUDA only; add --device cuda")
    for peer in PEERS:
        path = getattr(arguments, peer)
        reason = missing(peer, path) if path else None
        if reason:
            cli.error(f"--{peer}: {reason}")
    if arguments.output and not arguments.output.resolve().parent.is_dir():
        cli.error(f"--output: there is no folder {arguments.output.resolve().parent}")


def settings_of(arguments: argparse.Namespace, argv: list[str]) -> Settings:
    """What all measurements have in common."""
    return Settings(
        device=arguments.device, dtype=arguments.dtype, threads=arguments.threads,
        part=arguments.part or (0.25 if arguments.device == "cpu" else 1.0), rounds=arguments.rounds,
        seconds=arguments.seconds, tokens=tuple(arguments.tokens), step_tokens=tuple(arguments.step_tokens),
        prompt=arguments.prompt, batches=tuple(arguments.batches), fused=arguments.fused,
        fakeroast=arguments.fakeroast, rzlinear=arguments.rzlinear, command=command_line(argv),
    )  # fmt: skip


def main(argv: list[str] | None = None, description: str | None = None) -> None:
    """Measure, or report what was measured before; ``description`` is for --help."""
    cli, argv = parser(description), sys.argv[1:] if argv is None else argv
    arguments = cli.parse_args(argv)
    if arguments.report:
        try:
            rows = report.read(arguments.report)
        except (OSError, ValueError) as error:
            cli.error(f"--report: {error}")
        if arguments.costs:
            return print(costs.table(report.latest(rows)))
        return show(rows, arguments.plots)
    check(cli, arguments)
    jobs, settings = plan(arguments), settings_of(arguments, argv)
    if not jobs:
        cli.error("no work asked for knows any of the models and forms asked for")
    rows = []
    for job in jobs:
        for row in measure(job, settings):
            rows.append(row)
            print(report.progress(row), file=sys.stderr, flush=True)
            if arguments.output:
                report.append(row, arguments.output)
    return show(rows, arguments.plots)


def show(rows: list[dict], folder: Path | None) -> None:
    """Print the tables and write the plots if a folder is given."""
    print(report.tables(rows))
    if folder:
        for path in report.plots(rows, folder):
            print(path, file=sys.stderr)
