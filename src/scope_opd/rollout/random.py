"""Counter-based randomness: the uniform behind a token is a function of what it is for, never of when it is drawn.

The uniform of (seed, step, prompt id, sample, position) comes from a SplitMix64 stream, one for each rollout:

    key  = BLAKE2b-64 of "seed/step/sample/prompt id"
    z    = key + (position + 1) * 0x9E3779B97F4A7C15                        mod 2^64
    z    = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;  z = z ^ (z >> 31)
    u    = ((z >> 11) + 0.5) / 2^53  rounded to float64, kept below 1

Any position can be had without those before it, so batches may be cut, reordered and resumed at will. The arithmetic
is that of 64-bit integers with wrap-around, in torch: the same bits on every device.

Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_BELOW_ONE = 1 - 2.0**-53


def _signed(value: int) -> int:
    """A 64-bit pattern as torch's int64 holds it."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def rollout_keys(seed: int, step: int, rollouts: Iterable[tuple[str, int]]) -> Tensor:
    """The stream of each rollout.

    Args:
        seed: the run's seed.
        step: the optimiser step.
        rollouts: (prompt id, sample index) pairs, R of them.

    Returns:
        I64[R] on the CPU.
    """
    keys = []
    for prompt_id, sample in rollouts:
        # The prompt's id comes last: it may hold any character, the numbers before it cannot hold a slash.
        text = f"{seed}/{step}/{sample}/{prompt_id}".encode("utf-8", "surrogatepass")
        keys.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True))
    return torch.tensor(keys, dtype=torch.int64)


def uniforms(keys: Tensor, start: int, count: int) -> Tensor:
    """Uniforms of positions ``start`` to ``start + count - 1``.

    Args:
        keys: I64[R] from ``rollout_keys``.
        start: the first position, >= 0.
        count: how many positions.

    Returns:
        F64[count, R], every value strictly between 0 and 1.
    """
    steps = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=keys.device) * _GAMMA
    z = keys[None, :] + steps[:, None]
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    z = z ^ _shift(z, 31)
    return ((_shift(z, 11).double() + 0.5) * 2.0**-53).clamp_(max=_BELOW_ONE)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
