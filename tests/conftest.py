import gc
import os
import re
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Set up checks and JAX, except in the process that only gives tests to its workers."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    _set_up()


def _set_up() -> None:
    from jaxtyping import install_import_hook
    from type_checks import use_lazy_checks

    # Imported before the hook: `fluxjax.shapes`, which this imports, holds the hook's type checker,
    # and the decorator of public functions is tested as users have it.
    import fluxjax.arguments  # noqa: F401

    # Users' programs check the public functions; the tests check every function's shapes and types.
    use_lazy_checks()
    install_import_hook("fluxjax", "fluxjax.shapes.checked")

    import hypothesis
    import jax
    import jaxlib.version

    # Every cast in the package is written out: an implicit promotion is an error.
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    # Programs carry no lines of Python: a twentieth of the time of lowering and compiling.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    # For what is sharded; everything else stays on the first.
    jax.config.update("jax_num_cpu_devices", 8)
    # Most of the time is spent compiling programs that run for a moment. Both of these halve it.
    jax.config.update("jax_disable_most_optimizations", True)
    # Fused loops by LLVM directly, in one module, in this process and in those that tests start.
    # XLA exits at a flag that it does not know: 0.11 has no other emitters than the new ones.
    flags = "--xla_cpu_parallel_codegen_split_count=1"
    if jaxlib.version.__version_info__ < (0, 11):
        flags += " --xla_cpu_use_fusion_emitters=false"
    if jaxlib.version.__version_info__ < (0, 12):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    hypothesis.settings.register_profile("untimed", deadline=None, max_examples=25)
    hypothesis.settings.load_profile("untimed")


TESTS = Path(__file__).parent
WHOLE_PROGRAMS = {
    TESTS / name
    for name in (
        "cli",
        "devices/test_processes.py",
        "generate/test_draw_chroma.py",
        "generate/test_image_to_image.py",
        "generate/test_text_to_image.py",
        "generate/test_tiny.py",
        "generate/test_tiny_regions.py",
        "lora/test_lora_commands.py",
        "test_docs.py",
        "tools/test_probe_run.py",
        "train/test_checkpoints.py",
        # A network on eight simulated devices is compiled for minutes in all.
        "devices/test_packed_on_meshes.py",
        "devices/test_prompts_on_meshes.py",
        "devices/test_restoration.py",
        "devices/test_shard.py",
        "devices/test_vae_rows.py",
        "devices/test_vae_strips.py",
        "train/test_mesh_step.py",
    )
}
"""What draws and trains from end to end, or on meshes: minutes in all, only with --programs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--programs",
        action="store_true",
        help="run the tests of whole programs and of networks on meshes, and only these",
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


def pytest_collection_finish() -> None:
    """Search for unreachable objects rarely, and only among what the tests make.

    Each search visits all objects, and modules, checkers and tests stay to the end anyway.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)


@pytest.fixture(scope="session")
def tiny():
    """The model that ships with the package, in float32."""
    import fluxjax

    return fluxjax.load_models("tiny", dtype="float32")


MEMORY_MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000
"""XLA:CPU maps memory for each compiled program, and a process may have 65,530 maps."""
REPLACES_PARTS = re.compile("monkeypatch|mock|monitoring|platform|(affine|implementations) import")
"""In modules that replace what programs are made of, or count the programs that are compiled."""


@pytest.fixture(scope="module", autouse=True)
def _free_compiled_programs(request: pytest.FixtureRequest):
    """Keep programs for the next module, which often needs the same, where nothing is replaced."""
    import jax

    apart = REPLACES_PARTS.search(request.path.read_text()) is not None
    if apart:
        jax.clear_caches()
    yield
    if apart or _has_many_maps():
        jax.clear_caches()


def _has_many_maps() -> bool:
    return not MEMORY_MAPS.exists() or MEMORY_MAPS.read_bytes().count(b"\n") > MOST_MAPS
