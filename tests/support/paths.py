"""Folders of the repository, and the environment in which another process imports what tests do."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
FIXTURES = ROOT / "tests" / "fixtures"
SUPPORT = ROOT / "tests" / "support"


def environment(**variables: str) -> dict[str, str]:
    """This process's environment and ``variables``, for a process that finds tests/support and scripts as pytest does.

    pytest does by ``pythonpath`` in pyproject.toml.
    """
    folders = [str(SUPPORT), str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))} | variables
