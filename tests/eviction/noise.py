"""The random numbers of `attnzoo.eviction.noise`, in whole numbers of Python."""

import math
from statistics import NormalDist

MASK64 = 2**64 - 1


def splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def hashed(seed: int, *parts: int) -> int:
    key = seed
    for part in parts:
        key = splitmix(splitmix(key) ^ part)
    return key


def uniform(seed: int, *parts: int) -> float:
    return (hashed(seed, *parts) & (2**53 - 1)) / 2**53


def inside(seed: int, *parts: int) -> float:
    return ((hashed(seed, *parts) & (2**52 - 1)) + 0.5) / 2**52


def gumbel(seed: int, *parts: int) -> float:
    return -math.log(-math.log(inside(seed, *parts)))


def normal(seed: int, *parts: int) -> float:
    return NormalDist().inv_cdf(inside(seed, *parts))
