import importlib.util
import os

import pytest

from fluxjax.cli import gpu_flags


@pytest.fixture
def plugin(monkeypatch):
    """Let JAX's CUDA plugin seem to be installed, and its jaxlib be of a version."""
    found = {"jax_cuda13_plugin": True}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found.get(name))
    monkeypatch.setattr(gpu_flags, "version", lambda name: "0.11.2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    return found


@pytest.mark.parametrize("quantize", [None, "fp8", "int8-128", "nf4"])
def test_products_are_left_to_cublas_where_there_is_a_cuda_plugin(plugin, quantize):
    gpu_flags.read_weights_in_place(quantize)
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x --xla_gpu_enable_triton_gemm=false"


def test_int8_keeps_the_products_that_are_faster(plugin):
    gpu_flags.read_weights_in_place("int8")
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x"


def test_the_users_own_choice_stays(plugin, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    gpu_flags.read_weights_in_place()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=true"


@pytest.mark.parametrize("absent", ["plugin", "known version"])
def test_nothing_is_set_where_it_would_do_nothing_or_stop_xla(plugin, monkeypatch, absent):
    if absent == "plugin":
        plugin.clear()
    else:
        monkeypatch.setattr(gpu_flags, "version", lambda name: "0.12.0")
    gpu_flags.read_weights_in_place()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x"
