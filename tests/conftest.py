"""Eight CPU devices for every test, so that sharding is real; little else is shared."""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_files():
    """A process may map 65,530 pieces of memory; XLA takes some for every program and crashes when there are none left."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A file's tests and the programs they start share what XLA compiled; nothing outside the file does."""
    directory = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()  # jax asks once whether there is one
    yield
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
