"""Randomness that depends on what is drawn for, and on nothing else.

Masks and negatives are counter-based: a hash of (seed, global step, soma_joinid, ...), so that they
are the same whatever the lane, the packing and the number of ranks, and nothing random has to be
saved. The hash is splitmix64's finaliser (Steele et al. 2014; passes BigCrush), on int64 tensors
whose multiplication wraps as uint64's does.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15


def _int64(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift: int64's own keeps the sign


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (any shape)."""
    x = x + _int64(GOLDEN)
    x = (x ^ _shift(x, 30)) * _int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _int64(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def key(seed: int, step: int, purpose: int, *more: int) -> int:
    """One int64 key for all draws of one purpose in one global step (and of what `more` numbers)."""
    parts = torch.tensor([seed, step, purpose, *more], dtype=torch.int64)
    mixed = mix(parts[0])
    for part in parts[1:]:
        mixed = mix(mixed ^ part)
    return int(mixed)


def hashed(key: int, *counters: Tensor) -> Tensor:
    """64 hashed bits (int64) of the key and one or more broadcastable int64 counters."""
    bits = mix(counters[0] ^ key)
    for counter in counters[1:]:
        bits = mix(bits ^ counter)
    return bits


def uniform(bits: Tensor) -> Tensor:
    """float64 in (0, 1), never 0, from hashed bits."""
    return (_shift(bits, 11).double() + 0.5) * 2.0**-53


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise (float64): argmax of logits + gumbel draws from their softmax."""
    return -(-uniform(bits).log()).log()
