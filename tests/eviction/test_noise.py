"""Random numbers keyed by what they are for."""

import math

import pytest
import torch

from attnzoo.eviction import noise
from tests.eviction import noise as slow


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("name", ["uniform", "gumbel", "normal"])
def test_a_number_is_that_of_its_parts(name, seed):
    heads, positions = torch.arange(3)[:, None], torch.tensor([-1, 0, 1, 5, 10**9])
    found = getattr(noise, name)(seed, torch.tensor(2), heads, positions.int())
    assert found.dtype == torch.float64
    for head, row in enumerate(found.tolist()):
        for position, number in zip(positions.tolist(), row, strict=True):
            expected = getattr(slow, name)(seed, 2, head, position & slow.MASK64)
            assert math.isclose(number, expected, rel_tol=1e-9, abs_tol=1e-9)


def test_the_distributions_are_those_they_are_named_for():
    """Mean and spread of many numbers; a Gumbel's are 0.5772 and pi over the root of 6."""
    many = torch.arange(40000)
    for name, mean, spread in (("uniform", 0.5, 12**-0.5), ("normal", 0.0, 1.0), ("gumbel", 0.57722, math.pi / 6**0.5)):
        numbers = getattr(noise, name)(3, many)
        assert numbers.isfinite().all()
        assert abs(numbers.mean().item() - mean) < 5 * spread / 200, name
        assert abs(numbers.std().item() / spread - 1) < 0.03, name
