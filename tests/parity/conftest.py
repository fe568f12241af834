"""Parity with the reference implementations on torch; skipped where they are not installed."""

import importlib.util

import pytest

needed = ("torch", "diffusers", "transformers")
missing = [name for name in needed if importlib.util.find_spec(name) is None]


def pytest_collection_modifyitems(items):
    if missing:
        for item in items:
            if "parity" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=f"{', '.join(missing)} not installed: pip install fluxjax[parity]"))
