import os
from pathlib import Path

from jaxtyping import install_import_hook

# Imported before the hook: `fluxjax.shapes`, which this imports, holds the hook's type checker, and
# the decorator of public functions is tested as users have it.
import fluxjax.arguments

# Users' programs check the public functions; the tests check every function's shapes and types.
install_import_hook("fluxjax", "fluxjax.shapes.checked")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxlib.version  # noqa: E402
import pytest  # noqa: E402

import fluxjax  # noqa: E402

# Every cast in the package is written out: an implicit promotion is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# For what is sharded; everything else stays on the first.
jax.config.update("jax_num_cpu_devices", 8)
# Most of the time is spent compiling programs that run for a moment. Both of these halve it.
jax.config.update("jax_disable_most_optimizations", True)
# Fused loops by LLVM directly, in one module, in this process and in those that tests start. XLA
# exits at a flag that it does not know, and a later version may drop these.
if jaxlib.version.__version_info__ < (0, 12):
    _flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flags}".strip()
hypothesis.settings.register_profile("untimed", deadline=None, max_examples=25)
hypothesis.settings.load_profile("untimed")


TESTS = Path(__file__).parent
WHOLE_PROGRAMS = {
    TESTS / name
    for name in (
        "cli",
        "devices/test_processes.py",
        "generate/test_tiny.py",
        "generate/test_tiny_regions.py",
        "test_docs.py",
        "tools/test_probe_run.py",
    )
}
"""What runs whole commands, pages and models, minutes in all: only with --programs, as CI does."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--programs",
        action="store_true",
        help="run the tests of whole programs, and only these; they are left out otherwise",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out whole programs, or all others, except what the command line names itself."""
    if collection_path.is_dir():
        return None
    named = {Path(word.split("::")[0]).absolute() for word in config.args}
    if collection_path in named or collection_path.parent in named - {TESTS}:
        return None
    is_program = not WHOLE_PROGRAMS.isdisjoint({collection_path, *collection_path.parents})
    if is_program != config.getoption("--programs"):
        return True
    return None


@pytest.fixture(scope="session")
def tiny() -> fluxjax.Models:
    """The model that ships with the package, in float32."""
    return fluxjax.load_models("tiny", dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def _free_compiled_programs():
    """XLA:CPU maps memory for each compiled program, and a process may have 65,530 maps."""
    yield
    jax.clear_caches()
