"""What all tests on a GPU use."""

from gpu_models import exact_products  # noqa: F401  a fixture
