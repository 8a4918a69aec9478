"""The cache folder: converted models, and compiled programs where a user asks for them to be kept."""

import os
from pathlib import Path

import jax


def cache_folder() -> Path:
    """Find the folder of converted models.

    Returns:
        `$MIJAX_CACHE`, or else `mijax` in `$XDG_CACHE_HOME`, by default in `~/.cache`; the folder need not exist.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mijax"
    return Path(os.environ.get("MIJAX_CACHE") or default).expanduser()


def compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keep the programs that JAX compiles in a folder, for later processes.

    This changes three settings of JAX for the process (which importing mijax never does): the folder, and that
    programs are kept however quickly they compiled and however small they are. By default JAX keeps nothing that
    compiles in under a second. Call the function before anything is compiled, as the experiments do.

    Args:
        folder: the folder; by default `compiled` beside the converted models, `$MIJAX_CACHE/compiled` or
            `~/.cache/mijax/compiled`.

    Returns:
        The folder, which is created.

    >>> compilation_cache("compiled")  # doctest: +SKIP
    PosixPath('compiled')
    """
    path = cache_folder() / "compiled" if folder is None else Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
