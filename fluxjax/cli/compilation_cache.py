"""The folder in which compiled programs are kept from one run to the next."""

from pathlib import Path

from fluxjax.cache_folder import cache_folder


def default_cache_folder() -> Path | None:
    """Return where compiled programs are kept by default, or None for a user without a home."""
    folder = cache_folder()
    return None if folder is None else folder / "compiled"


def use_cache(folder: Path | None) -> None:
    """Keep every compiled program in a folder, if there is one."""
    import jax  # only here: the parser needs the other function, and must not import JAX

    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX keeps only programs that are large, or that compiled for a second or more.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
