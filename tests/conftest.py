"""Eight CPU devices for every test, so that sharding is real; nothing else is shared."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
