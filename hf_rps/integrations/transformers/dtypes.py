"""The dtype in which transformers' loader puts each weight of a model, which the shared array must be able to hold.

A model is built on the meta device in the dtype that was asked for, but for modules with one of their own. Beside that
its class may name parameters that stay float32 where float16 is asked for (``_keep_in_fp32_modules``: T5's ``wo``), or
bfloat16, too (``_keep_in_fp32_modules_strict``). The loader casts a tensor to what that plan says and else to the dtype
of the parameter on the meta device: so the shared array, which no plan names, is loaded in the dtype that it has there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from hf_rps.layers.kinds import Candidate


def apply_dtype_plan(model: nn.Module, candidates: Iterable[Candidate]) -> None:
    """Give the weights of ``candidates``, on the meta device, the dtype in which transformers would load them.

    ``model`` is as from_pretrained has built it, before any weight is loaded.
    """
    plan = model._get_dtype_plan(model.config.dtype)
    for candidate in candidates:
        key = candidate.key
        # found anywhere in the name, as in transformers' core_model_loading
        dtypes = [dtype for pattern, dtype in plan.items() if re.search(pattern.replace("*", ".*"), key)]
        if dtypes:
            candidate.stored.data = candidate.stored.data.to(dtypes[0])
