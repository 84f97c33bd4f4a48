"""A browser for all tests of this folder."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SWITCHES = ("--no-sandbox", "--disable-gpu")
"""For machines where tests run as root, and have no screen."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window, the one of the system: nothing is downloaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = [path for path in map(shutil.which, NAMES) if path]
    if not found:
        pytest.skip(f"no Chromium is installed: none of {', '.join(NAMES)} is on the PATH")
    with playwright.sync_playwright() as started:
        try:
            chromium = started.chromium.launch(executable_path=found[0], args=list(SWITCHES))
        except playwright.Error as fault:  # the stand-in for a snap, for example
            pytest.skip(f"{found[0]} does not start: {fault.message.splitlines()[0]}")
        yield chromium
        chromium.close()
