"""Settings shared by all tests."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import settings

# What memplan remembers goes to a folder of the test run's own, also in its child processes.
os.environ["MEMPLAN_CACHE_DIR"] = tempfile.mkdtemp(prefix="memplan-tests-")

# The same examples on every run, and no deadline: a slow machine is not a broken law.
settings.register_profile("memplan", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("memplan")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu") is None:
        return
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
