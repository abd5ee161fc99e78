"""How much each targeted weight matters, by the methods that prune a network before it is trained.

Every function returns, by module name, the score of each weight in the shape of ``module.weight``; the weights with the
largest scores stay (:func:`studies.methods.masks.keep_largest`). Scoring leaves parameters, their gradients, buffers,
train or eval mode and torch's generators as they were: it runs on tensors put in the parameters' place for one pass.

They are compared with each other in 'Pruning neural networks at initialization: why are we missing the mark?' (Frankle,
Dziugaite, Roy, Carbin, ICLR 2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from hf_rps import RPSConfig
from studies.methods.masks import targeted_weights
from studies.methods.positive import norms_without_statistics


def random_scores(
    model: nn.Module, config: RPSConfig | None = None, *, generator: torch.Generator
) -> dict[str, Tensor]:
    """Uniform numbers in [0, 1), drawn from ``generator`` on its device."""
    return {
        name: torch.rand(weight.shape, generator=generator, device=generator.device).to(weight.device)
        for name, weight in targeted_weights(model, config).items()
    }


def magnitude_scores(model: nn.Module, config: RPSConfig | None = None) -> dict[str, Tensor]:
    """|w|: 'Learning both weights and connections for efficient neural networks' (Han et al., NeurIPS 2015)."""
    return {name: weight.detach().abs() for name, weight in targeted_weights(model, config).items()}


def snip_scores(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], config: RPSConfig | None = None
) -> dict[str, Tensor]:
    """|w · dL/dw|, how much the loss changes as a weight is scaled, for the gradient averaged over ``batches``.

    Source: 'SNIP: single-shot network pruning based on connection sensitivity' (Lee, Ajanthan, Torr, ICLR 2019),
    equations 4 to 6 without the normalisation, which changes no order. Dropout is off; BatchNorm takes the batch's
    statistics, as in training.

    Args:
        model: A dense model.
        batches: Keyword arguments of the model's calls, labels included, on its device.
        config: Chooses the weights, as for RPS.

    Raises:
        ValueError: There is no batch, or the model returns no loss for one.
    """
    weights = _leaves(model, config)
    with _scoring(model, batch_statistics=True):
        gradients = _mean(_gradients(_loss(model, weights, batch), weights) for batch in batches)
    return {name: (w * g).abs().detach() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def grasp_scores(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], config: RPSConfig | None = None
) -> dict[str, Tensor]:
    """w · Hg, for the gradient g and the Hessian H of the loss in the targeted weights, averaged over ``batches``.

    To first order, -w · Hg is how much the gradient's norm, ½ ‖g‖², grows when a weight is removed. Source: 'Picking
    winning tickets before training by preserving gradient flow' (GraSP; Wang, Zhang, Grosse, ICLR 2020), equation 8 and
    algorithm 1, which removes the weights where -w · Hg is largest. Its temperature of 200, which divides the logits,
    is left out: a transformers model computes its loss by itself. Dropout and BatchNorm as in :func:`snip_scores`.

    Args:
        model: A dense model, with attention that can be differentiated twice ("sdpa" or "eager").
        batches: As in :func:`snip_scores`; they are gone through twice and held in memory.
        config: Chooses the weights, as for RPS.

    Raises:
        ValueError: There is no batch, or the model returns no loss for one.
    """
    weights, batches = _leaves(model, config), list(batches)

    def product(batch: dict[str, Tensor]) -> list[Tensor]:
        of_batch = _gradients(_loss(model, weights, batch), weights, create_graph=True)
        return _gradients(sum((g * b).sum() for g, b in zip(mean, of_batch, strict=True)), weights)

    with _scoring(model, batch_statistics=True), sdpa_kernel(SDPBackend.MATH):  # no other kernel has second derivatives
        mean = _mean(_gradients(_loss(model, weights, batch), weights) for batch in batches)
        products = _mean(product(batch) for batch in batches)
    return {name: (w * hg).detach() for (name, w), hg in zip(weights.items(), products, strict=True)}


def synflow_scores(
    model: nn.Module,
    inputs: dict[str, Tensor],
    config: RPSConfig | None = None,
    *,
    masks: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """|w · dR/dw|, for R the sum of the outputs of the model with all parameters replaced by their absolute values.

    Source: 'Pruning neural networks without any data by iteratively conserving synaptic flow' (SynFlow; Tanaka, Kunin,
    Yamins, Ganguli, NeurIPS 2020), equation 3. Computed in float64, since R is a product over all layers, in eval mode;
    norms are replaced by |γ| · x + |β| (:func:`norms_without_statistics`). What is not linear in between (softmax,
    tanh) stays: where it saturates, the weights before it score nothing.

    Args:
        model: A dense model.
        inputs: Keyword arguments of one call, ones by the paper, on the model's device: ``{"pixel_values": ones}`` or
            ``{"inputs_embeds": ones}``. R sums their ``logits``, or the first output of a model without.
        config: Chooses the weights, as for RPS.
        masks: Weights that are pruned already, False, count as zero and score zero; by default none is.

    Returns:
        Scores in float64.

    Raises:
        ValueError: All scores are zero.
    """
    weights = {
        name: (weight.detach().double().abs() * (1 if masks is None else masks[name])).requires_grad_()
        for name, weight in targeted_weights(model, config).items()
    }
    parameters = {name: parameter.detach().double().abs() for name, parameter in model.named_parameters()}
    with _scoring(model, batch_statistics=False), norms_without_statistics(model):
        output = _call(model, parameters | _by_parameter(weights), {k: _as_double(v) for k, v in inputs.items()})
        if not isinstance(output, Tensor):
            output = output["logits"] if "logits" in output else output[0]
        gradients = _gradients(output.sum(), weights)
    scores = {name: (w * g).abs().detach() for (name, w), g in zip(weights.items(), gradients, strict=True)}
    if masks is None and not any(score.any() for score in scores.values()):
        raise ValueError(
            f"every SynFlow score of this {type(model).__name__} is zero: its outputs don't depend on the targeted "
            f"weights for inputs {sorted(inputs)}, or an activation (tanh, softmax) saturates; take another method"
        )
    return scores


def _leaves(model: nn.Module, config: RPSConfig | None) -> dict[str, Tensor]:
    """The targeted weights as leaves of their own, so that no gradient reaches the model's parameters."""
    return {name: weight.detach().requires_grad_() for name, weight in targeted_weights(model, config).items()}


def _by_parameter(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.weight": weight for name, weight in weights.items()}


def _as_double(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _call(model: nn.Module, parameters: dict[str, Tensor], inputs: dict[str, Tensor]):
    """One pass with ``parameters`` in place of the model's, and copies of its buffers, in the parameters' dtype."""
    dtype = next(iter(parameters.values())).dtype
    buffers = {
        name: buffer.to(dtype if buffer.is_floating_point() else buffer.dtype, copy=True)
        for name, buffer in model.named_buffers()
    }
    return functional_call(model, buffers | parameters, kwargs=inputs)


def _loss(model: nn.Module, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    loss = getattr(_call(model, _by_parameter(weights), batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returns no loss for a batch of {sorted(batch)}; give it labels, under the name "
            f"that the model's forward expects"
        )
    return loss


def _gradients(of: Tensor, weights: dict[str, Tensor], create_graph: bool = False) -> list[Tensor]:
    """Of each weight, zeros for those that ``of`` does not depend on."""
    leaves = list(weights.values())
    return torch.autograd.grad(of, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _mean(lists: Iterable[list[Tensor]]) -> list[Tensor]:
    """The mean over batches of each weight's tensor."""
    total, count = None, 0
    for tensors in lists:
        total = tensors if total is None else [a + b for a, b in zip(total, tensors, strict=True)]
        count += 1
    if total is None:
        raise ValueError("batches is empty; give at least one batch of inputs and labels to score the weights on")
    return [tensor / count for tensor in total]


@contextmanager
def _scoring(model: nn.Module, batch_statistics: bool) -> Iterator[None]:
    """Eval mode, but BatchNorm in train mode where ``batch_statistics`` asks for it; modes and generators come back.

    Eval mode module by module, rather than without the dropout layers: many models call dropout as a function.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            for module in modes:
                module.training = batch_statistics and isinstance(module, _BatchNorm)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
