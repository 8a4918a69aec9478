"""The folder of what is made once: converted models, and compiled programs where a user asks for that."""

import os
from pathlib import Path

import jax


def cache_folder() -> Path:
    """Where converted models are kept: `$MIJAX_CACHE`, or `mijax` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mijax"
    return Path(os.environ.get("MIJAX_CACHE") or default).expanduser()


def compilation_cache(folder: str | os.PathLike | None = None) -> Path:
    """Keep what JAX compiles in a folder, for later processes; by default beside the converted models.

    The folder is `$MIJAX_CACHE/compiled`, or `~/.cache/mijax/compiled`. This sets three settings of JAX for the process
    (which importing mijax never does): the folder, and that programs are kept however quickly they
    compiled and however small they are, where JAX by default keeps nothing that compiles in under a second. Call it before
    anything is compiled, as the experiments do: `mijax.compilation_cache()`.
    """
    path = cache_folder() / "compiled" if folder is None else Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
