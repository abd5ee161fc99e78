"""A walk through a model on a few inputs, each layer calibrated on what the compressed ones before it give out.

An input of a layer counts the more, the more the model's output depends on what the layer makes of it: by the root of
the mean square of the gradient there, from one backward pass of the dense model. (SmolLM2-135M at 4 bits: perplexity
1.10 of dense without, 1.06 to 1.07 with it, 1.07 with the mean square itself.) 'GuidedQuant: large language model
quantization via exploiting end loss guidance' (ICML 2025) has such weights for groups of rows.

Layers lie in blocks (those that a number in their name tells). A block that is done is not run again: its outputs are
kept, and given back in its place, so that each further pass costs the block that is looked at and what joins blocks.
The model is not changed for longer than a block takes: learned weights stand in for its parameters, which come back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_rps.layers.kinds import Candidate
from hf_rps.learning.batches import moved
from hf_rps.mappings.weight_map import sharing_group
from hf_rps.tied import readers_of


class _Stop(Exception):
    """Ends a pass in which all is seen that was looked for."""


class Inputs(NamedTuple):
    """Of a layer, each counted as it matters: the mean of ``x x^T`` (cols, cols), x being an input as the compressed
    layers before it give it out, and of ``d x^T``, d being the dense model's own there; None where that is not known.
    """

    hessian: Tensor
    cross: Tensor | None = None


class Walk:
    """A model, its blocks in the order in which they run, and the inputs to run it on.

    Args:
        model: In evaluation mode while :meth:`learn` runs.
        candidates: By target, the weights to learn.
        batches: See :func:`hf_rps.learning.batches.batches_of`.
        seed: Of what stands for the model's loss: labels drawn from its own predictions.
    """

    def __init__(self, model: nn.Module, candidates: Mapping[str, Candidate], batches: Sequence, seed: int = 0):
        self.model, self.batches, self.seed = model, batches, seed
        self.device = next(iter(candidates.values())).stored.device
        self.by_module = {candidate.module: (name, candidate) for name, candidate in candidates.items()}
        # by table, a head that multiplies with the same parameter
        self.heads = {
            candidates[target].module: reader.module
            for target, readers in readers_of(model, candidates).items()
            for reader in readers.values()
            if reader.kind is not None and reader.kind.multiplies
        }
        # of those that do more than that (convolutions) the inputs are not looked at
        self.multiplying = [c.module for c in candidates.values() if c.kind.multiplies] + [*self.heads.values()]
        self.units: dict[nn.Module, list[nn.Module]] = {}  # by block, the layers in it
        modules = dict(model.named_modules())
        for candidate in candidates.values():
            block = sharing_group(candidate.name, "block")
            unit = modules[block] if block else candidate.module
            self.units.setdefault(unit, []).append(candidate.module)
        self._mask: Tensor | None = None
        # of the blocks that are done, compressed and dense: by batch, of every call
        self._outputs: dict[nn.Module, list[list]] = {}
        self._dense_outputs: dict[nn.Module, list[list]] = {}
        self._calls: dict[nn.Module, int] = {}
        self._counts: dict[nn.Module, list[Tensor]] = {}  # by batch, how much each input counts

    # ---- passes

    def _run(self, batch) -> Any:
        """One pass, up to the end or to where a hook stops it; what the model returns, if it does."""
        batch = moved(batch, self.device)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._calls = {}
        with contextlib.suppress(_Stop):
            if isinstance(batch, Mapping):
                return self.model(**batch)
            return self.model(*batch) if isinstance(batch, (tuple, list)) else self.model(batch)

    def rows(self, x: Tensor) -> Tensor:
        """Inputs, or outputs, (..., cols) as (tokens, cols), float32, without those of padding."""
        if self._mask is not None and x.shape[:2] == self._mask.shape:
            x = x[self._mask]
        return x.reshape(-1, x.shape[-1]).float()

    @contextlib.contextmanager
    def _replaying(self, outputs: dict[nn.Module, list[list]], index: int) -> Iterator[None]:
        """Blocks that are done give back what they gave out for batch ``index``."""
        forwards = {unit: unit.__dict__.get("forward") for unit in outputs}

        def replay(unit):
            def forward(*args, **kwargs):
                call = self._calls[unit] = self._calls.get(unit, -1) + 1
                return outputs[unit][index][call]

            return forward

        for unit in forwards:
            unit.__dict__["forward"] = replay(unit)
        try:
            yield
        finally:
            for unit, forward in forwards.items():
                del unit.__dict__["forward"]
                if forward is not None:
                    unit.__dict__["forward"] = forward

    def _order(self) -> dict[nn.Module, tuple[int, int | None]]:
        """Put blocks and layers in the order in which a first pass runs them.

        Returns:
            By layer: how often it ran, and a number that layers with the very same input have in common.
        """
        seen: dict[nn.Module, tuple[int, int | None]] = dict.fromkeys(self.by_module, (0, None))
        inputs: list[Tensor] = []  # kept, so that none takes another's place in memory
        started: list[nn.Module] = []
        order: dict[nn.Module, int] = {}

        def look(module, args, kwargs):
            if module in self.units and module not in started:
                started.append(module)
            if module in self.by_module:
                x = _input(args, kwargs)
                same = next((i for i, other in enumerate(inputs) if other is x), None)
                if same is None:
                    same = len(inputs)
                    inputs.append(x)
                order.setdefault(module, len(order))
                seen[module] = (seen[module][0] + 1, same)

        with _hooks({*self.units, *self.by_module}, look):
            self._run(self.batches[0])
        units = started + [unit for unit in self.units if unit not in started]
        self.units = {unit: sorted(self.units[unit], key=lambda m: order.get(m, len(order))) for unit in units}
        return seen

    @torch.enable_grad()
    def _find_counts(self) -> None:
        """How much each input of each layer counts, by a backward pass for each batch."""
        if not self.multiplying:
            return
        frozen = {p: p.requires_grad for p in self.model.parameters()}
        random = torch.Generator().manual_seed(self.seed)
        found: dict[nn.Module, list[Tensor]] = {}

        def watch(module, args, kwargs, output):
            if not torch.is_grad_enabled():  # in a node of the model's own (Reformer): all inputs count the same
                return None
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()  # models may write to it
            place = len(found.setdefault(module, []))
            found[module].append(output.new_zeros(0, dtype=torch.float32))

            def note(gradient):
                found[module][place] = self.rows(gradient).square().mean(1)

            output.register_hook(note)
            return output

        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for batch in self.batches:
                found.clear()
                with _hooks(self.multiplying, watch, after=True):
                    loss = _surrogate(self._run(batch), self._mask, random)
                    if loss is not None and loss.requires_grad:
                        loss.backward()
                for module in self.multiplying:
                    self._counts.setdefault(module, []).append(torch.cat(found.get(module) or [torch.zeros(0)]).sqrt())
        finally:
            for parameter, requires_grad in frozen.items():
                parameter.requires_grad_(requires_grad)

    # ---- learning

    @torch.no_grad()
    def learn(self, learn: Callable[[str, Candidate, Inputs | None], Tensor]) -> None:
        """Call ``learn(target, candidate, inputs)`` for every weight; it returns what the weight becomes."""
        training, config = self.model.training, getattr(self.model, "config", None)
        cached = getattr(config, "use_cache", None)
        self.model.eval()
        if cached is not None:
            config.use_cache = False
        try:
            seen = self._order()
            self._find_counts()
            with tqdm(total=len(self.by_module), desc="learning codebooks", unit="layer", leave=False) as bar:
                for unit, layers in self.units.items():
                    self._learn_unit(unit, layers, seen, learn, bar)
        finally:
            self.model.train(training)
            if cached is not None:
                config.use_cache = cached
            self._outputs.clear()
            self._dense_outputs.clear()
            self._counts.clear()

    def _learn_unit(self, unit, layers, seen, learn, bar) -> None:
        once = all(seen[layer][0] == 1 for layer in layers)
        stages: dict[int | None, list[nn.Module]] = {}
        for layer in layers:
            stages.setdefault(seen[layer][1], []).append(layer)
        kept: dict[nn.Module, Tensor] = {}  # dense weights of the layers that are learned
        try:
            for stage in stages.values():
                inputs = self._inputs(stage, once, kept) | self._inputs_of_heads(stage)
                for layer in stage:
                    name, candidate = self.by_module[layer]
                    weight = learn(name, candidate, inputs.get(layer))
                    kept[layer] = candidate.stored.data
                    candidate.stored.data = torch.empty_like(kept[layer], memory_format=torch.contiguous_format)
                    candidate.weight.copy_(weight)  # a view, in which the kind has its matrix
                    bar.update()
            if once:
                self._keep_outputs(unit, self._outputs)
                with self._dense(kept):
                    self._keep_outputs(unit, self._dense_outputs)
        finally:
            for layer, weight in kept.items():
                self.by_module[layer][1].stored.data = weight

    def _inputs_of_heads(self, layers: list[nn.Module]) -> dict[nn.Module, Inputs]:
        """By table among ``layers``, the inputs of a head that reads it, too, as the model has them now.

        As a table it is asked for its rows, to which every column counts the same. Either use gets half.
        """
        found = {}
        for table in (layer for layer in layers if layer in self.heads):
            head = self.heads[table]
            inputs = self._inputs([head], once=False, kept={}).get(head)
            if inputs is not None:
                hessian = inputs.hessian / inputs.hessian.diagonal().mean()
                found[table] = Inputs(hessian + torch.eye(len(hessian), device=hessian.device))
        return found

    @contextlib.contextmanager
    def _dense(self, kept: dict[nn.Module, Tensor]) -> Iterator[None]:
        """Layers that are learned have the dense weights again that are ``kept``."""
        learned = {layer: self.by_module[layer][1].stored.data for layer in kept}
        try:
            for layer, weight in kept.items():
                self.by_module[layer][1].stored.data = weight
            yield
        finally:
            for layer, weight in learned.items():
                self.by_module[layer][1].stored.data = weight

    def _inputs(self, layers: list[nn.Module], once: bool, kept: dict[nn.Module, Tensor]) -> dict[nn.Module, Inputs]:
        """Over all batches, by layer that multiplies. With ``once`` all of them have the very same input."""
        layers = [layer for layer in layers if layer in self.multiplying]
        if not layers:
            return {}
        sums: dict[nn.Module, Tensor] = {}
        crossed: dict[nn.Module, Tensor] = {}
        totals = dict.fromkeys(layers, 0.0)
        for index in range(len(self.batches)):
            found = self._inputs_of(layers[:1] if once else layers, index, once, self._outputs)
            dense = {}
            if once:
                with self._dense(kept):
                    dense = self._inputs_of(layers[:1], index, once, self._dense_outputs)
            for layer in layers:
                x, d = (rows.get(layers[0] if once else layer) for rows in (found, dense))
                if x is None:
                    continue
                counts = self._counts[layer][index].to(x.device)
                if len(counts) != len(x) or not bool(counts.any()):  # routed otherwise than in the dense model
                    counts = x.new_ones(len(x))
                weighted = x * counts[:, None]
                sums[layer] = sums.get(layer, 0.0) + weighted.t() @ x
                if d is not None and len(d) == len(x):
                    crossed[layer] = crossed.get(layer, 0.0) + d.t() @ weighted
                totals[layer] += counts.sum().item()
        return {
            layer: Inputs(total / totals[layer], crossed[layer] / totals[layer] if layer in crossed else None)
            for layer, total in sums.items()
        }

    def _inputs_of(
        self, layers: list[nn.Module], index: int, once: bool, outputs: dict[nn.Module, list[list]]
    ) -> dict[nn.Module, Tensor]:
        """Inputs (any, cols) of ``layers`` in batch ``index``, after blocks that are done and gave ``outputs``."""
        inputs: dict[nn.Module, list[Tensor]] = {}

        def look(module, args, kwargs):
            inputs.setdefault(module, []).append(self.rows(_input(args, kwargs)))
            if once:
                raise _Stop

        with _hooks(layers, look), self._replaying(outputs, index):
            self._run(self.batches[index])
        return {layer: torch.cat(rows) for layer, rows in inputs.items() if any(map(len, rows))}

    def _keep_outputs(self, unit: nn.Module, kept: dict[nn.Module, list[list]]) -> None:
        outputs: list[list] = []

        def keep(module, args, kwargs, output):
            outputs[-1].append(output)
            raise _Stop

        for index, batch in enumerate(self.batches):
            outputs.append([])
            handle = unit.register_forward_hook(keep, with_kwargs=True)
            try:
                with self._replaying(kept, index):
                    self._run(batch)
            finally:
                handle.remove()
        kept[unit] = outputs


def _surrogate(output: Any, mask: Tensor | None, random: torch.Generator) -> Tensor | None:
    """A scalar whose gradient tells how the model's output depends on its layers; None where it has no such output.

    Of logits the log-probability of labels that the model draws itself, so that squares of gradients are the Fisher
    information; of other outputs a random projection, as squares are then those of the output's own derivative.
    """
    tensor = getattr(output, "logits", None)
    is_logits = isinstance(tensor, Tensor)
    if not is_logits:
        values = [output] if isinstance(output, Tensor) else list(getattr(output, "values", lambda: output or ())())
        tensor = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1), None)
    if tensor is None:
        return None
    if mask is not None and tensor.shape[:2] == mask.shape:
        tensor = tensor[mask]
    tensor = tensor.float().flatten(0, -2)
    if is_logits:
        logarithms = tensor.log_softmax(-1)
        drawn = torch.multinomial(logarithms.detach().exp().cpu(), 1, generator=random)
        return logarithms.gather(1, drawn.to(tensor.device)).sum()
    return (tensor * torch.randn(tensor.shape, generator=random).to(tensor)).sum()


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


@contextlib.contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable, after: bool = False) -> Iterator[None]:
    register = nn.Module.register_forward_hook if after else nn.Module.register_forward_pre_hook
    handles = [register(module, hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
