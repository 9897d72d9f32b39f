"""Sampling: counts to slots, slots to responses."""

from krl.rollout.sampler import Watch, generate, slots_in_memory
from krl.rollout.slots import make_slots
from krl.rollout.stop import Ends, find_ends

__all__ = ["Ends", "Watch", "find_ends", "generate", "make_slots", "slots_in_memory"]
