"""Sampling: counts to slots, slots to responses."""

from krl.rollout.sampler import Watch, generate, slots_in_memory
from krl.rollout.slots import make_slots

__all__ = ["Watch", "generate", "make_slots", "slots_in_memory"]
