"""The layers of RPS adapters: a linear layer whose weight an adapter replaces, or one to which it adds."""

from __future__ import annotations

from functools import cached_property

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from hf_rps import internals
from hf_rps.initial import all_finite
from hf_rps.integrations.peft.bank import RPSTunerLayer
from hf_rps.layers.base import refuse_data_parallel
from hf_rps.layers.kinds import kind_of
from hf_rps.layers.stand_in import WeightStandIn
from hf_rps.mappings.input_fold import FoldedMatrix
from hf_rps.psi.weight import SharedWeight, compute_dtype, takes_plain_path

_FEW_TOKENS = 32  # below, two products are cheaper than building the sum of base weight and delta (measured)


class AdapterLinear(nn.Module, RPSTunerLayer):
    """A linear layer (or Conv1D) with the shared weights of any number of adapters; base class of both modes.

    Args:
        base_layer: The layer that it wraps.

    Input (..., in_features), output (..., out_features).
    """

    other_param_names = ("shared",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.kind = kind_of(base_layer)
        self.out_features, self.in_features = self.kind.features(base_layer)
        self.shared: dict[str, SharedWeight] = {}  # by adapter
        self.merged_adapters: list[str] = []
        self.training = base_layer.training

    def _get_available_adapters(self) -> set[str]:
        return set(self.shared)

    def _active(self) -> list[SharedWeight]:
        return [self.shared[name] for name in self.active_adapters if name in self.shared]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _replicate_for_data_parallel(self):
        refuse_data_parallel()


def _check_finite(weight: Tensor, adapter_name: str) -> None:
    if not all_finite(weight):
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")


class DeltaLinear(AdapterLinear):
    """y = x (W0 + sum of the active adapters' W)^T + b, W0 and b being those of the base layer, which may be quantised.

    Args:
        base_layer: The layer that it wraps.
        quantization: What PEFT's quantization backends ask for; see ``peft.utils.get_quantization_kwargs``.
    """

    def __init__(self, base_layer: nn.Module, **quantization):
        super().__init__(base_layer)
        self.quantization_backend = resolve_quantization_backend(base_layer, **quantization)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self._active()
        if len(active) == 1 and not args and not kwargs and self._can_fuse(x, active[0]):
            return self._fused(x, active[0])
        y = self.base_layer(x, *args, **kwargs)
        if active and self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for shared in active:
            dtype = compute_dtype(x)
            y = y + shared.linear(x, None, dtype).to(y.dtype)
        return y

    def _can_fuse(self, x: Tensor, shared: SharedWeight) -> bool:
        """True where the sum of weights can and should be built.

        It can where the base layer does nothing but a product with its frozen float32 weight (in half precision a small
        delta would be lost in the sum), and it should where there are enough tokens.
        """
        base = self.base_layer
        weight, bias = base.weight, base.bias
        return (
            not takes_plain_path()
            and not isinstance(shared.matrix, FoldedMatrix)  # whose own product costs less than the sum
            and self.quantization_backend is None
            and x.numel() >= _FEW_TOKENS * self.in_features
            and self._base_is_plain
            and not internals.is_hooked(base)
            and weight.dtype in (torch.float32, torch.float64)
            and not weight.requires_grad
            and weight.device == x.device
            and (bias is None or bias.dtype == weight.dtype)
            and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
        )

    @cached_property
    def _base_is_plain(self) -> bool:
        """True where the base layer computes nothing but the product with its weight; it may have to be tried out."""
        return self.kind.can_share(self.base_layer)

    def _fused(self, x: Tensor, shared: SharedWeight) -> Tensor:
        weight = self.kind.matrix(self.base_layer.weight)
        return shared.added_linear(x.to(compute_dtype(x)), weight, self.base_layer.bias)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The change that an adapter makes, as the base layer stores its weight and in the array's dtype."""
        return self.kind.stored(self.shared[adapter_name].dense())

    @property
    def weight(self) -> Tensor:
        """The weight in use, for models that read it directly: the sum, made when it is used."""
        weight = super().weight
        active = [] if self.disable_adapters or self.merged else self._active()
        if not active or self.quantization_backend is not None:
            return weight
        return WeightStandIn.of(
            lambda: weight + sum(self.kind.stored(s.materialise(weight.device, weight.dtype)) for s in active),
            weight.shape,
            like=weight,
        )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weights to the base weight, which loses precision if that is quantised.

        Raises:
            ValueError: ``safe_merge`` is set and an adapter holds values that are not finite; nothing is merged then.
            TypeError: The base weight is quantised in a way that can't be changed.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.shared:
                continue
            total = self._sum(name, 1)
            if safe_merge:
                _check_finite(self.shared[name].source.psi, name)
                _check_finite(total, name)
            self.set_base_weight(total)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged adapters' weights again."""
        while self.merged_adapters:
            self.set_base_weight(self._sum(self.merged_adapters[-1], -1))
            self.merged_adapters.pop()

    def _sum(self, adapter_name: str, sign: int) -> Tensor:
        """Base weight plus (or minus) the adapter's, in the base weight's dtype."""
        weight = self.get_base_weight()
        return (weight + sign * self.get_delta_weight(adapter_name).to(weight.device)).to(weight.dtype)


class ReplaceLinear(AdapterLinear):
    """y = x W^T + b with the active adapter's W; b is the base layer's, whose own weight is freed.

    The weight is freed once every adapter of the model replaces it. Until then, layers that the active adapter does not
    replace use it.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.weight_dtype = base_layer.weight.dtype
        self._unmerged_weight: nn.Parameter | None = None

    def free_base(self) -> None:
        """Let go of the dense weight."""
        self.base_layer.register_parameter("weight", None)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        active = [] if self.merged and not self.disable_adapters else self._active()
        if self.disable_adapters and self.shared:
            raise ValueError(
                "the weights of this model are replaced by RPS adapters (mode='replace'), so there is no model without "
                "them to run; load the base model separately, or use mode='delta'"
            )
        if len(active) > 1:
            names = [name for name in self.active_adapters if name in self.shared]
            raise ValueError(f"only one RPS adapter can replace a weight at a time, got {names}; choose by set_adapter")
        if active:
            return active[0].linear(x, self.base_layer.bias, compute_dtype(x))
        if self.base_layer.weight is None:
            raise ValueError(
                f"the dense weight of this layer was freed (mode='replace'), and of its adapters {sorted(self.shared)} "
                f"none is active; activate one with set_adapter, or load one"
            )
        return self.base_layer(x, *args, **kwargs)

    @property
    def weight(self) -> Tensor | None:
        """The weight in use, made when it is used; None if there is none."""
        active = self._active()
        if self.merged or len(active) != 1:
            return self.base_layer.weight
        blank = torch.empty(self.out_features, self.in_features, device="meta")
        return WeightStandIn.of(
            lambda: self.kind.stored(active[0].dense()), self.kind.stored(blank).shape, like=active[0].source.psi
        )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the adapter's weight the base layer's own. Of several adapters the last one's stays.

        Raises:
            ValueError: ``safe_merge`` is set and an adapter holds values that are not finite. It is not merged then.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.shared:
                continue
            shared = self.shared[name]
            if safe_merge:
                _check_finite(shared.source.psi, name)
            weight = self.kind.stored(shared.dense()).to(self.weight_dtype).contiguous()
            if not self.merged:
                self._unmerged_weight = self.base_layer.weight
            self.base_layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the layer back as it was before :meth:`merge`."""
        if self.merged:
            self.merged_adapters.clear()
            self.base_layer.register_parameter("weight", self._unmerged_weight)
            self._unmerged_weight = None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer with the adapter's weight, for PEFT's merge_and_unload."""
        if not merge:
            raise ValueError(
                "the dense weights were freed when they were replaced (mode='replace'), so there is nothing to unload "
                "to; merge_and_unload() gives a plain model with the adapter's weights"
            )
        if not self.merged:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer
