"""Sampling: counts to slots, slots to responses."""

from krl.rollout.sampler import generate
from krl.rollout.slots import make_slots

__all__ = ["generate", "make_slots"]
