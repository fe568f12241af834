"""Parity with the reference implementations on torch; skipped where they are not installed."""

import importlib.util
from types import SimpleNamespace

import pytest

needed = ("torch", "diffusers", "transformers", "peft", "lycoris")
missing = [name for name in needed if importlib.util.find_spec(name) is None]


class Absent(pytest.Module):
    """A module whose imports are missing: skipped before it is imported."""

    def collect(self):
        pytest.skip(
            f"{', '.join(missing)} not installed: pip install fluxjax[parity]",
            allow_module_level=True,
        )


def pytest_pycollect_makemodule(module_path, parent):
    return Absent.from_parent(parent, path=module_path) if missing else None


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """Make matmuls as on a platform.

    On GPUs matmuls of bfloat16 are rounded to it before a bias is added, however few the rows.
    """
    monkeypatch.setattr("fluxjax.nets.weight._MANY_ROWS", 0)
    monkeypatch.setattr(
        "fluxjax.nets.weight.default_device", lambda: SimpleNamespace(platform=request.param)
    )
