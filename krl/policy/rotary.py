"""Rotary positions (Su et al., arXiv 2104.09864), and how they are stretched beyond the length of the pre-training."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = float(np.finfo(np.float32).max)  # of a number that computes with others in float32


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched; "turns" are those of a frequency over the pre-training's length.

    "linear" divides all by the factor. "llama3" and "yarn" (Peng et al., arXiv 2309.00071) divide those of few turns
    and keep those of many; between the two the division fades in with the turns for llama3, with the frequency's
    number for YaRN. "longrope" divides every frequency by a number of its own (Ding et al., arXiv 2402.13753).
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0  # fewer turns than this are divided
    high_frequency_factor: float = 4.0  # and more than this are kept
    original_length: int = 8192  # positions of the pre-training
    whole: bool = True  # yarn: the two bounds are rounded outwards to whole numbers of frequencies
    divisors: tuple[float, ...] = ()  # longrope: of the r / 2 frequencies
    magnitude: float = 1.0  # cos and sin are multiplied by it

    def __post_init__(self) -> None:
        for name in ("factor", "low_frequency_factor", "high_frequency_factor", "original_length", "magnitude"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < LARGEST:
                raise ValueError(f"{name} {value!r} of rope_scaling must be a number above 0")
        if any(type(value) not in (int, float) or not 0 < value < LARGEST for value in self.divisors):
            raise ValueError(f"divisors {self.divisors} of rope_scaling must be numbers above 0")
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if low >= high:
            raise ValueError(f"low_frequency_factor {low} of rope_scaling must be below high_frequency_factor {high}")


class Rotations(NamedTuple):
    """What is rotated by positions, of one layer or of several."""

    frequencies: np.ndarray | jax.Array  # [..., r / 2] float32, radians per position, of the first r numbers of a head
    magnitude: np.ndarray | jax.Array | None  # [...] float32, of cos and sin; None if it is 1 in all layers


def frequencies(size: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """(the frequencies of r = size rotated numbers, [r / 2] float64 in radians per position; their magnitude)."""
    plain = theta ** (-2 * np.arange(size // 2) / size)
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "longrope":
        return plain / np.array(scaling.divisors), scaling.magnitude
    kept: np.ndarray | float = 0.0
    if scaling.kind == "llama3":
        turns, low = scaling.original_length * plain / (2 * np.pi), scaling.low_frequency_factor
        kept = np.clip((turns - low) / (scaling.high_frequency_factor - low), 0, 1)
    elif scaling.kind == "yarn":
        first, last = (
            size * math.log(scaling.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in (scaling.high_frequency_factor, scaling.low_frequency_factor)
        )
        if scaling.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        last = last if last != first else first + 0.001
        kept = 1 - np.clip((np.arange(size // 2) - first) / (last - first), 0, 1)
    return plain * (kept + (1 - kept) / scaling.factor), scaling.magnitude


def rotate(x: jax.Array, positions: jax.Array, rotations: Rotations) -> jax.Array:
    """Rotate the halves of the first r numbers of each head, [B, T, H, Q], by positions [B, T]; float32 inside."""
    size = 2 * rotations.frequencies.shape[-1]
    angles = positions[:, :, None, None].astype(jnp.float32) * rotations.frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rotations.magnitude is not None:
        cos, sin = cos * rotations.magnitude, sin * rotations.magnitude
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if size == x.shape[-1] else jnp.concatenate([rotated, x[..., size:]], axis=-1)
