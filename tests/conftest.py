"""Settings shared by all tests."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections import Counter

import pytest
from hypothesis import settings

# What memplan remembers goes to a folder of the test run's own, also in its child processes.
os.environ["MEMPLAN_CACHE_DIR"] = tempfile.mkdtemp(prefix="memplan-tests-")

# Tests run on all cores already: the threads of two workers' tiny matrices would spin while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run, and no deadline: a slow machine is not a broken law.
settings.register_profile("memplan", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("memplan")


LARGE_TABLE = 60
ONE_IN = 12
"""All of them take half an hour on two cores; a twelfth leaves room in the 25 minutes of CI."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of each large table of slow tests one in twelve, always the same, is for CI; the others are `exhaustive`."""

    def table(item: pytest.Item) -> str:
        return item.nodeid.partition("[")[0]

    sizes = Counter(table(item) for item in items)
    for item in items:
        in_large = item.get_closest_marker("slow") is not None and sizes[table(item)] > LARGE_TABLE
        if in_large and zlib.crc32(item.nodeid.encode()) % ONE_IN:
            item.add_marker(pytest.mark.exhaustive)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu") is None:
        return
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
