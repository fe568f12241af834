import importlib.util
import os
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from small import CONFIG

from fluxjax import Flux, quantize
from fluxjax.cli import progress, xla_options
from fluxjax.cli.progress import Clock

OPTION = "xla_gpu_enable_triton_gemm"
SCHEDULE = "xla_cpu_scheduler_type"


@pytest.fixture
def plugin(monkeypatch):
    """Let JAX's CUDA plugin seem to be installed and used, and its jaxlib be of a version."""
    found = {"jax_cuda13_plugin": True}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found.get(name))
    monkeypatch.setattr(xla_options, "version", lambda name: "0.11.2")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    set_by_user(monkeypatch, "--xla_dump_to=x")
    return found


def set_by_user(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(xla_options, "_USERS_FLAGS", flags)


def network(format=None):
    """Return the shapes of a small transformer with weights in a format of `quantize`."""
    config = replace(CONFIG, width=128, heads=8, mlp_width=256, double_depth=1, single_depth=1)
    flux = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    return flux if format is None else eqx.filter_eval_shape(quantize, flux, format)


def test_products_are_left_to_cublas_where_there_is_a_cuda_plugin(plugin):
    xla_options.read_weights_in_place()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x --{OPTION}=false"


@pytest.mark.parametrize("choice", ["true", "false"])
def test_the_users_own_choice_stays(plugin, monkeypatch, choice):
    set_by_user(monkeypatch, f"--{OPTION}={choice}")
    xla_options.read_weights_in_place()
    assert os.environ["XLA_FLAGS"] == f"--{OPTION}={choice}"
    assert xla_options.compiler_options(network("int8")) == {}


@pytest.mark.parametrize("absent", ["plugin", "known version"])
def test_nothing_is_set_where_it_would_do_nothing_or_stop_xla(plugin, monkeypatch, absent):
    if absent == "plugin":
        plugin.clear()
    else:
        monkeypatch.setattr(xla_options, "version", lambda name: "0.12.0")
    xla_options.read_weights_in_place()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x"
    assert xla_options.compiler_options(network("int8")) == {}


@pytest.mark.parametrize("format", [None, "int8", "fp8", "int8-128", "nf4"])
def test_programs_with_int8_weights_keep_the_products_that_are_faster(plugin, format):
    xla_options.read_weights_in_place()
    options = xla_options.compiler_options((network(format), jnp.ones(128)))
    assert options == ({OPTION: True} if format == "int8" else {})


def test_programs_on_cpus_are_ordered_for_little_memory():
    def products(x):
        """Independent of one another, so that all of them could be in memory at once."""
        return sum(jnp.sum(jnp.sort(matrix @ matrix)) for matrix in x)

    lowered = jax.jit(products).lower(jnp.ones((8, 200, 200)))
    sizes = [
        lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes
        for options in ({}, xla_options.compiler_options(()))
    ]
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("reason", ["set by the user", "unknown version"])
def test_the_order_of_operations_on_cpus_is_left_to_xla(monkeypatch, reason):
    assert xla_options.compiler_options(()).keys() == {SCHEDULE}
    if reason == "set by the user":
        set_by_user(monkeypatch, f"--{SCHEDULE}=CPU_SCHEDULER_TYPE_DEFAULT")
    else:
        monkeypatch.setattr(xla_options, "version", lambda name: "0.13.0")
    assert xla_options.compiler_options(()) == {}


@pytest.mark.parametrize("jit", [jax.jit, eqx.filter_jit])
def test_the_clock_compiles_with_the_options_of_a_programs_inputs(monkeypatch, jit):
    def options_of(inputs):
        (x,), named = inputs
        return {} if x + named["y"] == 3 else {"an_unknown_option": True}

    monkeypatch.setattr(progress, "compiler_options", options_of)
    add = jit(lambda x, y: x + y)
    with Clock(1, 1, silent=True) as clock:
        assert clock.run("denoise", add, jnp.float32(1), y=jnp.float32(2)) == 3
        # XLA refuses it, so it has got the options. Another shape is another program.
        with pytest.raises(RuntimeError, match="an_unknown_option"):
            clock.run("denoise", add, jnp.ones(1), y=jnp.ones(1))
