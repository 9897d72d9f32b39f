"""Eight CPU devices for every test, so that sharding is real; little else is shared."""

import os
import tempfile

import jax
import jax.numpy as jnp
import pytest

# Tests compile thousands of programs that run for milliseconds, so XLA is asked for quick compilations and not for quick
# programs; with JAX 0.10 a compilation takes a fifth of the time, with 0.12 half of it. XLA_FLAGS= make test compiles as for
# users. XLA ends a process that names a flag it does not know, and from 0.11 on there is no choice of emitters.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_include_full_tracebacks_in_locations", False)  # of every operation, which nobody reads here

# The tests of a process and the programs they start share what XLA compiled, however quickly; nothing else does.
COMPILED = tempfile.TemporaryDirectory(prefix="krl-compiled-")
for name, value in (
    ("jax_compilation_cache_dir", COMPILED.name),
    ("jax_persistent_cache_min_compile_time_secs", 0),
    ("jax_persistent_cache_min_entry_size_bytes", -1),
):
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_files():
    """A process may map 65,530 pieces of memory; XLA takes some for every program and crashes when there are none left."""
    yield
    jax.clear_caches()


@pytest.fixture
def double(monkeypatch):
    """All computation in float64, which no config asks for."""
    monkeypatch.setattr("krl.policy.config.DTYPES", ("float64",))
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    jax.clear_caches()
    with jax.enable_x64(True):
        yield
    jax.clear_caches()
