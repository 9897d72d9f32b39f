"""How long programs take at least, from what accelerators can do on paper, and which settings fit their memory."""

from typing import NamedTuple

from krl.plan.hlo import Cost


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


class Seconds(NamedTuple):
    """How long a program takes at least for each of the three things that it does at the same time."""

    computing: float
    memory: float
    network: float

    @property
    def least(self) -> float:
        """The longest of the three: no program is faster, and most are slower."""
        return max(self)


def seconds(cost: Cost, accelerator: Accelerator) -> Seconds:
    """FLOPs over FLOPs a second, bytes over bandwidth, bytes sent over the bandwidth of all links."""
    return Seconds(cost.flops / accelerator.flops, cost.bytes / accelerator.bandwidth, cost.sent / accelerator.links)


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
