"""How long a step takes at least, from the policy's sizes and what accelerators can do on paper."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from krl import policy
from krl.base.sharding import batch_devices

AnyMesh = Mesh | AbstractMesh


class Accelerator(NamedTuple):
    """What the maker says of one device."""

    memory_gb: float  # main memory, GB = 1e9 bytes
    flops: float  # a second, dense products of bfloat16
    bandwidth: float  # bytes a second of main memory
    links: float  # bytes a second that it sends to other devices, over all links of the fast network together


ACCELERATORS = {  # by `device_kind`; Google's and NVIDIA's pages of the chips, November 2026
    "TPU v4": Accelerator(32, 275e12, 1228e9, 300e9),
    "TPU v5 lite": Accelerator(16, 197e12, 819e9, 200e9),
    "TPU v5": Accelerator(95, 459e12, 2765e9, 600e9),
    "TPU v5p": Accelerator(95, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Accelerator(32, 918e12, 1600e9, 400e9),
    "NVIDIA H100 80GB HBM3": Accelerator(80, 989e12, 3350e9, 450e9),
    "NVIDIA H200": Accelerator(141, 989e12, 4800e9, 450e9),
}


class Work(NamedTuple):
    """What a part of a step asks of each device, by the sizes alone."""

    tflop: float  # of products of matrices; a multiplication and an addition are two
    moved: float  # GB of parameters, keys and values that main memory gives or takes; activations are left out
    sent: float  # GB to other devices

    def seconds(self, accelerator: Accelerator) -> "Seconds":
        """TFLOP, bytes and bytes sent, each over what a device does of it in a second."""
        return Seconds(
            self.tflop * 1e12 / accelerator.flops,
            self.moved * 1e9 / accelerator.bandwidth,
            self.sent * 1e9 / accelerator.links,
        )


class Seconds(NamedTuple):
    """How long something takes at least for each of the three things that a device does at the same time."""

    computing: float
    memory: float
    network: float

    @property
    def least(self) -> float:
        """The longest of the three: nothing is faster, and most is slower."""
        return max(self)

    @property
    def limit(self) -> str:
        """Which of the three that is."""
        return self._fields[self.index(self.least)]


def prefill_work(
    sizes: policy.PolicyConfig, mesh: AnyMesh, num_prompts: int, tokens: int, weights_gb: float, cache_gb: float
) -> Work:
    """Reading the prompts of a step.

    Args:
        sizes, mesh: of the policy; of decoding.
        num_prompts, tokens: M; of each that are read, P - 1.
        weights_gb, cache_gb: parameters for decoding and keys and values of all prompts, on each device, GB.
    """
    # Of the last layer a prompt needs keys and values and nothing that follows.
    flops = num_prompts * tokens * _forward(sizes, sizes.num_layers - 1, (tokens + 1) / 2)
    # Parameters are gathered along "fsdp", and each group of devices gets what the others have read.
    sent = weights_gb * (1 - 1 / mesh.shape.get("fsdp", 1)) + cache_gb * (1 - 1 / batch_devices(mesh))
    return Work(flops / mesh.size / 1e12, weights_gb + cache_gb, sent)


def decode_work(
    sizes: policy.PolicyConfig, mesh: AnyMesh, num_slots: int, steps: int, columns: int, read_gb: float
) -> Work:
    """Decoding, where every step reads the parameters and the caches of all slots, whole.

    Args:
        sizes, mesh: of the policy; of decoding.
        num_slots, steps, columns: S; decode steps; tokens that the cache of a slot has room for.
        read_gb: parameters, keys and values that each device reads in a step, GB.
    """
    flops = steps * num_slots * _forward(sizes, sizes.num_layers, columns, scored=1)
    sums = (2 * sizes.num_layers + 1) * _summed_gb(sizes, mesh, steps * num_slots)  # and one for the embeddings
    return Work(flops / mesh.size / 1e12, steps * read_gb, sums)


def update_work(
    sizes: policy.PolicyConfig, mesh: AnyMesh, micro_batches: int, micro_tokens: int, length: int, scorings: int
) -> Work:
    """The updates of a step: a forward and a backward pass of every micro-batch, and a forward pass for each scoring.

    Args:
        sizes, mesh: of the policy; of the update.
        micro_batches, micro_tokens: of the whole step; tokens in each, on all devices together.
        length: tokens of a prompt and its response.
        scorings: passes that compute log-probabilities alone: for the ratios of an importance cap, by the reference.
    """
    tokens, layers = micro_batches * micro_tokens, sizes.num_layers
    again = sizes.remat == "full"  # the backward pass computes layers again, but for the last product of each
    whole = sizes.lora is None  # frozen weights have no gradient; what adapters take is little
    passes = scorings + 1 + again + 1 + whole  # forward, and the backward pass, which has twice the products or as many
    a_token = passes * _forward(
        sizes, layers, (length + 1) / 2
    ) - again * 2 * layers * sizes.embed_size * sizes.mlp_size * _active(sizes)
    a_token += (scorings + 3 + whole) * _forward(sizes, 0, 0, 1)  # logits are computed again in any case

    units = sizes.experts.count if sizes.experts else 1
    matrices = layers * _layer(sizes, units) + (2 - sizes.tie_embeddings) * sizes.embed_size * sizes.vocab_size
    weights = matrices * _itemsize(sizes) / mesh.shape.get("model", 1) / 1e9
    # Along "fsdp" each scoring, forward and backward pass gathers the parameters, and one more adds up the gradients,
    # which "data" adds up, too. Along "model" a layer adds up activations twice in a pass.
    data, fsdp = (mesh.shape.get(name, 1) for name in ("data", "fsdp"))
    a_batch = weights * ((scorings + 2 + whole) * (1 - 1 / fsdp) + whole * 2 * (1 - 1 / data) / fsdp)
    sums = layers * (2 * (passes - 1) - again) * _summed_gb(sizes, mesh, tokens)
    return Work(tokens * a_token / mesh.size / 1e12, micro_batches * passes * weights, micro_batches * a_batch + sums)


def _active(sizes: policy.PolicyConfig) -> int:
    """Units of a layer that a token goes through."""
    return sizes.experts.active if sizes.experts else 1


def _layer(sizes: policy.PolicyConfig, units: int) -> int:
    """Parameters of a layer that are in products of matrices, with so many of its units."""
    attention = 2 * (sizes.num_heads + sizes.num_kv_heads) * sizes.head_size
    router = sizes.experts.count if sizes.experts else 0
    return sizes.embed_size * (attention + router + 3 * units * sizes.mlp_size)


def _forward(sizes: policy.PolicyConfig, layers: int, keys: float, scored: int = 0) -> float:
    """FLOPs of some layers on one token that sees so many keys, and of its logits if it is scored."""
    pairs = 2 * sizes.num_heads * sizes.head_size * keys
    return 2.0 * (layers * (_layer(sizes, _active(sizes)) + pairs) + scored * sizes.embed_size * sizes.vocab_size)


def _summed_gb(sizes: policy.PolicyConfig, mesh: AnyMesh, tokens: int) -> float:
    """GB that a device sends where "model" adds up activations of some tokens: twice all but its own share."""
    size = tokens / batch_devices(mesh) * sizes.embed_size * _itemsize(sizes) / 1e9
    return 2 * size * (1 - 1 / mesh.shape.get("model", 1))


def _itemsize(sizes: policy.PolicyConfig) -> int:
    return jnp.dtype(sizes.dtype).itemsize


class Layout(NamedTuple):
    """Decoding with the policy split over some devices."""

    split: int  # devices that share one copy of the policy and its caches
    fixed_gb: float  # of each device but for slots: parameters, optimiser, prompts' keys and values, temporaries
    slots: int  # that fit, on all devices together; 0 if none does
    seconds: float  # decoding a step's rollouts, by the bandwidth of main memory


def decode_layouts(
    *,
    devices: int,
    splits: list[int],
    accelerator: Accelerator,
    kept_gb: float,
    weights_gb: float,
    prompts_gb: float,
    slot_gb: float,
    room: float,
    num_rollouts: int,
    tokens: int,
) -> list[Layout]:
    """What decoding would take under every way to split the policy, by its parts.

    Args:
        devices: of the mesh.
        splits: over how many devices the policy may be split.
        accelerator: one of the devices.
        kept_gb: what a device holds however decoding is laid out, GB.
        weights_gb, prompts_gb: parameters in the compute dtype and keys and values of all prompts, whole, GB.
        slot_gb: keys and values of one slot, whole, GB.
        room: how many times its size a slot takes at the worst moment.
        num_rollouts: R.
        tokens: of every response.
    """
    found = []
    for split in splits:
        groups, fixed = devices // split, kept_gb + (weights_gb + prompts_gb) / split
        rows = -(-num_rollouts // groups)
        each = min(max(int((accelerator.memory_gb - fixed) / (slot_gb * room / split)), 0), rows)
        a_step = (weights_gb + each * slot_gb) / split * 1e9 / accelerator.bandwidth
        waves = -(-rows // each) if each else float("inf")
        found.append(Layout(split, fixed, each * groups, waves * tokens * a_step))
    return found
