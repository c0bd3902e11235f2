"""Compiled programs on disk, so that a second process does not wait for XLA."""

import os
from pathlib import Path

import jax


def default_cache() -> Path:
    """Where the command line keeps compiled programs: `jquant/xla` in XDG_CACHE_HOME, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jquant" / "xla"


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keeps every program that XLA compiles from now on in a folder, and takes from there what is in it.

    This sets JAX's own persistent cache, for the whole process, with no lower limit of time or size: the programs of
    jquant are many and small. JAX names a file by the program, its versions and the device, so that the folder may be
    shared and kept through upgrades. It grows without a limit: delete it when it is too large. Programs that call
    back to the host (tables inside jit) are compiled each time.

    Args:
      folder: made if it is not there. None: `jquant/xla` in the user's cache folder.

    Returns:
      The folder.

    Raises:
      OSError: the folder cannot be made or written.

    Source:
      https://docs.jax.dev/en/latest/persistent_compilation_cache.html

    Example:
      >>> jq.use_compilation_cache("build/xla")  # doctest: +SKIP
      PosixPath('build/xla')
    """
    from jax.experimental.compilation_cache import compilation_cache

    path = default_cache() if folder is None else Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"the folder {path} for compiled programs cannot be written; name another one")
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # a process that has compiled before has already decided to go without
    return path
