"""The methods that are compared: from a dense model and a budget to the model that is trained, and what it stores.

A budget is a compression c of the n targeted weights. Everybody may store n / c numbers for them: RPS so many slots,
pruning so many weights, a factorisation so many entries; smaller dense models as many numbers in all as RPS stores in
all. Bytes count what must be stored besides: a pruned model's mask or indices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_rps import RPSConfig, get_rps_model
from hf_rps.initial import initial_std
from hf_rps.mappings.base import Target
from hf_rps.mappings.weight_map import INIT_EXPONENT, WeightMap
from hf_rps.targets import find_targets
from studies.comparison.tasks import TASKS, Data, make_config
from studies.comparison.training import Run, score, train
from studies.methods import BudgetError
from studies.methods.at_start import prune_at_start
from studies.methods.input_folds import FORMS, form
from studies.methods.lottery_ticket import densities, global_magnitude_masks, rewind
from studies.methods.low_rank import get_low_rank_model
from studies.methods.magnitude import sparse_bytes
from studies.methods.smaller import smaller_config

REWIND_TO = 0.1  # of the steps; Frankle et al. (ICML 2020) rewind to between 1 % and 10 %
_SCORING_ROWS = 512  # training rows that SNIP and GraSP look at
_VALUE_BYTES = 4


class Stored(NamedTuple):
    """What a model stores: numbers, and the bytes of all that it needs."""

    numbers: int
    bytes: int


class Dense(NamedTuple):
    """What is to be compressed: n targeted weights, and the numbers of all else."""

    model: nn.Module
    n: int
    rest: int

    def stored(self, kept: int, size: int | None = None) -> Stored:
        """With ``kept`` numbers in the place of the n, which take ``size`` bytes."""
        size = _VALUE_BYTES * kept if size is None else size
        return Stored(self.rest + kept, _VALUE_BYTES * self.rest + size)


def dense_model(run: Run, data: Data) -> Dense:
    """The task's model with the weights of the run's seed."""
    torch.manual_seed(run.seed)
    model = TASKS[run.task].build(make_config(run.task, dict(run.model), data))
    n = sum(candidate.module.weight.numel() for candidate in find_targets(model, RPSConfig()))
    return Dense(model, n, sum(parameter.numel() for parameter in model.parameters()) - n)


# ---- one model per budget

Built = tuple[nn.Module, Stored]
Builder = Callable[[Dense, float, Run, Data], Built]


def _unchanged(dense: Dense, compression: float, run: Run, data: Data) -> Built:
    return dense.model, dense.stored(dense.n)


def _rps(**fields) -> Builder:
    """RPS with ``fields`` of its config other than the defaults."""

    def build(dense: Dense, compression: float, run: Run, data: Data) -> Built:
        fold = fields.get("input_fold", 1)
        if fold != "full" and fold > compression:
            raise BudgetError(f"a fold of {fold} leaves fewer weights than {compression:g}x stores")
        std = run.init_std
        if std is None and run.init_exponent != INIT_EXPONENT:  # else the library's own default is what is asked for
            candidates = find_targets(dense.model, RPSConfig())
            targets = [Target(c.name, *c.weight.shape, std=initial_std(c.weight)) for c in candidates]
            std = WeightMap(targets, ratio=1 / compression, std_exponent=run.init_exponent).init_std
        settings = {"grad_scaling": "norm" if run.optimizer == "adamw" else "projection"} | fields
        model = get_rps_model(dense.model, RPSConfig(ratio=1 / compression, seed=run.seed, init_std=std, **settings))
        return model, dense.stored(sum(p.numel() for p in model.parameters()) - dense.rest)

    return build


def _form(name: str) -> Builder:
    """RPS with all of the compression by folding inputs, in another form than the library's."""

    def build(dense: Dense, compression: float, run: Run, data: Data) -> Built:
        with form(name):
            return _rps(input_fold="full")(dense, compression, run, data)

    return build


def _pruned(method: str) -> Builder:
    def build(dense: Dense, compression: float, run: Run, data: Data) -> Built:
        rows = {name: tensor[:_SCORING_ROWS].split(run.batch_size) for name, tensor in data.train.items()}
        batches = [dict(zip(rows, batch, strict=True)) for batch in zip(*rows.values(), strict=True)]
        kept = round(dense.n / compression)
        prune_at_start(
            dense.model, method, kept, batches=batches, inputs=TASKS[run.task].synflow_inputs(dense.model.config),
            generator=torch.Generator().manual_seed(run.seed),
        )  # fmt: skip
        return dense.model, dense.stored(kept, sparse_bytes(kept, dense.n))

    return build


def _smaller(how: str) -> Builder:
    def build(dense: Dense, compression: float, run: Run, data: Data) -> Built:
        build = TASKS[run.task].build
        config = smaller_config(build, dense.model.config, dense.rest + round(dense.n / compression), how)
        torch.manual_seed(run.seed)
        model = build(config)
        numbers = sum(parameter.numel() for parameter in model.parameters())
        return model, Stored(numbers, _VALUE_BYTES * numbers)

    return build


def _low_rank(dense: Dense, compression: float, run: Run, data: Data) -> Built:
    model = get_low_rank_model(dense.model, 1 / compression)
    return model, dense.stored(sum(p.numel() for p in model.parameters()) - dense.rest)


# ---- a chain of models, each from the one before


def _lottery_tickets(run: Run, data: Data, device: torch.device) -> list[dict]:
    """Lottery-ticket rewinding: every round prunes a fifth of what is left, by the size of the trained weights."""
    start, dense = time.perf_counter(), dense_model(run, data)
    model = dense.model.to(device)
    first_step = max(1, round(REWIND_TO * run.steps))
    early: dict[str, torch.Tensor] = {}

    def remember(step: int, loss: torch.Tensor) -> None:
        if step == first_step and not early:
            early.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    finite = train(model, run, data.train, on_step=remember)
    masks, results, trainings = None, [], 1
    for density in densities(run.compressions):
        if not early:
            break  # diverged before there was anything to rewind to
        masks = global_magnitude_masks(model, round(density * dense.n), within=masks) if finite else masks
        rewind(model, early, masks)
        finite = finite and train(model, run, data.train, first_step)
        trainings += 1
        for compression in run.compressions:
            if math.isclose(density * compression, 1):
                kept = round(density * dense.n)
                results.append(_result(compression, dense.stored(kept, sparse_bytes(kept, dense.n)))
                               | score(model, run, data, finite) | {"trainings": trainings})  # fmt: skip
    for compression in run.compressions[len(results) :]:
        stored = dense.stored(round(dense.n / compression), sparse_bytes(round(dense.n / compression), dense.n))
        results.append(_result(compression, stored) | score(model, run, data, False) | {"trainings": trainings})
    seconds = round(time.perf_counter() - start, 2)
    return [result | {"seconds": seconds} for result in results]


def _result(compression: float, stored: Stored) -> dict:
    return {"compression": compression, "numbers": stored.numbers, "bytes": stored.bytes}


def _flops(model: nn.Module, data: Data, device: torch.device) -> int:
    row = {name: tensor[:1].to(device) for name, tensor in data.test.items()}
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(**row)
    return counter.get_total_flops()


# ---- all of them


class Method(NamedTuple):
    """A row of the tables.

    Attributes:
        title: For tables and plots.
        build: None for lottery tickets, whose budgets come out of one chain of trainings.
        init_exponent: That of C = RMS(sigma) * c^-init_exponent, or None for methods without a shared array.
        kind: "dense", "rps" (ours), "fold" (ours, of folded inputs), "mapping" (earlier sharing), "start" (pruning at
            the start), "tickets", "smaller", "form" (of folding inputs; not in the main table).
        dense_at_1: Whether the method at compression 1 is the dense model by construction, so that it need not run.
    """

    title: str
    build: Builder | None
    kind: str
    dense_at_1: bool = True
    init_exponent: float | None = None


_HASHED = {"sign": "element", "init_weights": False}
METHODS = {
    "dense": Method("dense", _unchanged, "dense"),
    "rps": Method("RPS", _rps(), "rps", False, INIT_EXPONENT),
    "rps-element": Method("RPS, a sign per weight", _rps(sign="element"), "rps", False, INIT_EXPONENT),
    "rps-module": Method("RPS, shared per module", _rps(sharing="module"), "rps", False, INIT_EXPONENT),
    **{
        f"fold-{fold}": Method(f"RPS, input fold {fold}", _rps(input_fold=fold), "fold", False, INIT_EXPONENT)
        for fold in (2, 4, 8, "full")
    },
    "roast-scaled": Method(
        "ROAST mapping, gradient scaling", _rps(mapping="roast", **_HASHED), "mapping", False, INIT_EXPONENT
    ),
    "roast": Method("ROAST", _rps(mapping="roast", grad_scaling="none", **_HASHED), "mapping", False, 0.0),
    "hashednets": Method(
        "HashedNets mapping", _rps(mapping="hash", grad_scaling="none", **_HASHED), "mapping", False, 0.0
    ),
    "random": Method("random pruning", _pruned("random"), "start"),
    "magnitude": Method("MAG", _pruned("magnitude"), "start"),
    "snip": Method("SNIP", _pruned("snip"), "start"),
    "grasp": Method("GraSP", _pruned("grasp"), "start"),
    "synflow": Method("SynFlow", _pruned("synflow"), "start"),
    "ltr": Method("lottery tickets, rewound", None, "tickets"),
    "width": Method("smaller dense, width", _smaller("width"), "smaller"),
    "depth": Method("smaller dense, depth", _smaller("depth"), "smaller"),
    "low-rank": Method("low-rank factors", _low_rank, "smaller", False),
    **{f"form-{name}": Method(FORMS[name].title, _form(name), "form", False, INIT_EXPONENT) for name in FORMS},
}  # fmt: skip


def execute(run: Run, data: Data, device: torch.device) -> list[dict]:
    """Train and score ``run``: a result for each of its compressions.

    A result has "compression", "numbers", "bytes", "flops" (of a forward pass of one row, by torch's counter),
    "validation", "test", "seconds" and, if the loss stopped being finite, "diverged". A budget that the method can't
    reach has "unreachable" with the reason instead of scores.
    """
    method = METHODS[run.method]
    if method.build is None:
        return _lottery_tickets(run, data, device)
    start, (compression,) = time.perf_counter(), run.compressions
    dense = dense_model(run, data)
    try:
        model, stored = method.build(dense, compression, run, data)
    except BudgetError as error:
        return [{"compression": compression, "unreachable": str(error)}]
    model = model.to(device)
    losses: list[torch.Tensor] = []
    finite = train(model, run, data.train, on_step=lambda step, loss: losses.append(loss))
    tail = torch.stack(losses[-max(1, len(losses) // 10) :]).mean().item()
    result = _result(compression, stored) | {"flops": _flops(model, data, device)} | score(model, run, data, finite)
    return [result | {"train_loss": tail, "seconds": round(time.perf_counter() - start, 2)}]
