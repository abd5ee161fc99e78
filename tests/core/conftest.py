"""A network of each kind of layer, by each way in which its weights may be read."""

import pytest
import torch
from networks import KINDS, Network
from triton_cases import fresh, weight_map  # noqa: F401  fixtures
from ways import read


def ways(options):
    """How the weights of such a network may be read: views of psi, or made for a product."""
    indexed = options.get("mapping", "fold") != "fold" or options.get("sign") == "element"
    return ["made"] if indexed or options["kind"] == "convolution" else ["views", "made"]


@pytest.fixture(params=[(kind, way) for kind, options in KINDS.items() for way in ways(options)], ids=", ".join)
def network(request):
    kind, way = request.param
    torch.manual_seed(0)
    return read(Network(**KINDS[kind]), way)
