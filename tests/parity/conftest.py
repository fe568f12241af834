"""Parity with the reference implementations on torch; skipped where they are not installed."""

import importlib.util

import pytest

needed = ("torch", "diffusers", "transformers", "peft")
missing = [name for name in needed if importlib.util.find_spec(name) is None]


class Absent(pytest.Module):
    """A module whose imports are missing: skipped before it is imported."""

    def collect(self):
        pytest.skip(f"{', '.join(missing)} not installed: pip install fluxjax[parity]", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return Absent.from_parent(parent, path=module_path) if missing else None
