"""Programs that a process compiles once for all runs of the same config, as in a notebook."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

KEPT = 16  # programs that are kept
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}  # all products to YNNPACK


@functools.lru_cache(KEPT)
def for_this_backend(update: Callable, *arguments: Any, **options: Any) -> Callable:
    """An update compiled with what is fastest where it runs; donates its state.

    On a CPU matrix products go to the library that computes them fastest; elsewhere nothing is special.

    Args:
        update: `policy_update` or `supervised_update`.
        arguments, options: what stays the same from step to step, hashable; the state and what follows are left.
    """
    on_cpu = jax.default_backend() == "cpu" and _accepted(_CPU_OPTIONS)
    bound = functools.partial(update, *arguments, **options)
    return jax.jit(bound, donate_argnums=0, compiler_options=_CPU_OPTIONS if on_cpu else None)


def _accepted(options: dict[str, str]) -> bool:
    """Whether this version of XLA knows these options, which are experimental."""
    try:
        jax.jit(jnp.negative, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return False
    return True
