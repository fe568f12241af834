from jaxtyping import install_import_hook

# Imported before the hook: `fluxjax.shapes`, which this imports, holds the hook's type checker, and
# the decorator of public functions is tested as users have it.
import fluxjax.arguments

# Users' programs check the public functions; the tests check every function's shapes and types.
install_import_hook("fluxjax", "fluxjax.shapes.checked")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

import fluxjax  # noqa: E402

# Every cast in the package is written out: an implicit promotion is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# For what is sharded; everything else stays on the first.
jax.config.update("jax_num_cpu_devices", 8)
# Most of the tests' time is compilation, and without optimizations it takes a third less. Processes
# that tests start compile as users do.
jax.config.update("jax_disable_most_optimizations", True)
hypothesis.settings.register_profile("untimed", deadline=None, max_examples=25)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny() -> fluxjax.Models:
    """The model that ships with the package, in float32."""
    return fluxjax.load_models("tiny", dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def _programs_are_let_go_of():
    """Drop compiled programs after each module.

    XLA:CPU maps some pages for each program, and a process can have only 65,530 maps.
    """
    yield
    jax.clear_caches()
