"""How a budget for all swapped layers is shared out: the swap asks here for the policy of each layer.

- ``uniform``: the same number of entries for each key/value head.
- ``pyramid``: less from layer to layer, in equal steps. Cai et al., PyramidKV, https://arxiv.org/abs/2406.02069

      b_last = b / 20,    b_first = 2 b - b_last        (b: the mean, which is what ``uniform`` gives to each layer)

- ``measured``: most to the layers whose output loses most, by a profile of the model; see `attnzoo.eviction.profile`.
- ``adaptive``: the same for each layer, whose heads share it; see `attnzoo.eviction.ragged`.

Bytes become entries here. They count what `attnzoo.kv_bytes` calls held, in the swapped layers together, per row of a
batch, in the dtype that the model has at the swap: keys, values, positions and what the policy keeps from call to call.

Differs from the paper: PyramidKV gives each layer the last few tokens beside its budget; here they count in it, and a
layer gets at least one entry more than `sink` and `recent` that the user gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnzoo.errors import OptionError
from attnzoo.eviction.layer_data import ModelIdentity
from attnzoo.eviction.layer_profile import Profile
from attnzoo.eviction.policy import Policy
from attnzoo.eviction.ragged import store_for
from attnzoo.units import parse_bytes

TAPER = 20  # PyramidKV's beta: how many times less than the mean the last layer gets
FLOOR = 10  # of a measured budget, no layer gets less than one part in so many of the mean
DIGITS = 10_000  # shares are cut to so many parts
AMPLE = 2**31 - 1  # entries: a stand-in where a policy must have a number


@dataclass(frozen=True)
class LayerShape:
    """What a layer keeps of a token.

    Attributes
    ----------
    index
        The layer's place in the cache.
    heads, kv_heads
        Query heads and key/value heads.
    key_width, value_width
        Numbers in a key and in a value of one head.
    dtype
        That of keys and values.
    model
        Which model it is part of.
    """

    index: int
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    model: ModelIdentity | None = None

    def bytes_held(self, policy: Policy) -> tuple[int, int]:
        """Bytes that the layer holds per row whatever the budget, and per entry in each of its key/value heads.

        A store is asked, on PyTorch's meta device.
        """
        kind = "adaptive" if policy.budgets == "adaptive" else "uniform"
        store = store_for(policy.changed(budget=AMPLE, budgets=kind, profile=None), self.index)
        q = torch.empty(1, self.heads, 1, self.key_width, dtype=self.dtype, device="meta")
        k, v = (q.new_empty(1, self.kv_heads, 1, width) for width in (self.key_width, self.value_width))
        store.start(q, k, v, None, None)
        fixed = store.bytes().held
        store.append(k, v, [1])
        return fixed, store.bytes().held - fixed


def share_out(policy: Policy, layers: Sequence[LayerShape | None]) -> list[Policy]:
    """Give each layer its policy, whose budget is a number.

    Parameters
    ----------
    policy
        What the user asked for.
    layers
        The swapped layers, first to last; None where a layer's shape could not be told before the swap.

    Returns
    -------
    list of Policy
        One per layer: with ``budgets="uniform"``, or ``"adaptive"`` where `policy` has that.

    Raises
    ------
    OptionError
        If the bytes are too few, or shapes that are needed are not known, or the profile is of another model.
    """
    if not policy.by_layer:
        return [policy] * len(layers)
    shapes = [layer for layer in layers if layer is not None]
    if len(shapes) < len(layers):
        if isinstance(policy.budget, str) or policy.budgets == "measured":
            asked = f"budget={policy.budget!r}" if isinstance(policy.budget, str) else "budgets='measured'"
            raise OptionError(
                f"{asked} needs the shapes of keys and values, which could not be told before the swap, as no copy of "
                "the model without weights could be built and called; give budget in entries, and other budgets"
            )
        fixed, costs = 0, [1] * len(layers)
    else:
        held = [shape.bytes_held(policy) for shape in shapes]
        fixed, costs = sum(always for always, _ in held), [entry for _, entry in held]
    total: float  # entries times their cost
    total = _entry_bytes(policy, fixed, costs) if isinstance(policy.budget, str) else policy.budget * sum(costs)
    mean = total / sum(costs)
    if policy.budgets == "pyramid":
        amounts = _pyramid(policy, mean, costs)
    elif policy.budgets == "measured":
        amounts = _measured(policy, mean, costs, shapes)
    else:
        amounts = [mean] * len(layers)
    budgets: Sequence[int | float]
    if isinstance(policy.budget, float):
        budgets = [max(int(amount * DIGITS), 1) / DIGITS for amount in amounts]
    else:
        budgets = (
            _whole(amounts, costs, total) if policy.budgets in ("pyramid", "measured") else list(map(int, amounts))
        )
    kind = "adaptive" if policy.budgets == "adaptive" else "uniform"
    return [policy.changed(budget=budget, budgets=kind, profile=None) for budget in budgets]


def ample(options: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Give options under which a policy evicts nothing of `tokens` tokens, in a store of the same kind."""
    by_layer = {"pyramid", "measured"}
    kept = {key: value for key, value in options.items() if key != "profile"}
    kept = {key: value for key, value in kept.items() if not (key == "budgets" and value in by_layer)}
    return {**kept, "budget": max(tokens, (options.get("sink") or 0) + (options.get("recent") or 0))}


def _entry_bytes(policy: Policy, fixed: int, costs: Sequence[int]) -> int:
    """How many of the bytes of `policy` are left for entries; refuse what does not do for a block."""
    assert isinstance(policy.budget, str)
    total = parse_bytes("budget", policy.budget) - fixed
    least = max(policy.every, policy.pinned, 1)
    if total < least * sum(costs):
        needed = -(-(fixed + least * sum(costs)) // 1000)
        why = f"sink + recent = {policy.pinned}" if policy.pinned > policy.every else f"a block of {policy.every}"
        raise OptionError(
            f"budget={policy.budget!r} is {max(total, 0) // sum(costs)} entries per key/value head in {len(costs)} "
            f"layers, too few for {why}: give at least '{needed} kB', or a smaller block_size"
        )
    return total


def _least(policy: Policy, mean: float, part: int) -> float:
    """The least that a layer gets: one in `part` of the mean, and something beside what is protected."""
    pinned = 0.0 if isinstance(policy.budget, float) else policy.pinned + 1.0
    return min(mean, max(mean / part, pinned))


def _pyramid(policy: Policy, mean: float, costs: Sequence[int]) -> list[float]:
    """Amounts that fall in equal steps and cost together what the mean would."""
    steps = len(costs) - 1
    if not steps:
        return [mean]
    slope = [(steps - layer) / steps for layer in range(steps + 1)]  # 1 to 0
    whole, sloped = sum(costs), sum(cost * t for cost, t in zip(costs, slope, strict=True))
    last = _least(policy, mean, TAPER)
    rise = (mean - last) * whole / sloped
    if isinstance(policy.budget, float) and last + rise > 1:  # a share cannot be more than all: a flatter pyramid
        last = (mean * whole - sloped) / (whole - sloped)
        rise = 1 - last
    return [min(last + rise * t, 1.0) if isinstance(policy.budget, float) else last + rise * t for t in slope]


def _measured(policy: Policy, mean: float, costs: Sequence[int], shapes: Sequence[LayerShape]) -> list[float]:
    """Amounts by the profile; entries are a share of the text that it was made on."""
    profile = Profile.of(policy.profile)
    profile.check(shapes)
    tokens = 1 if isinstance(policy.budget, float) else profile.tokens
    if mean >= tokens > 1:
        raise OptionError(
            f"the profile was made on {tokens} tokens, all of which a mean budget of {int(mean)} entries keeps; make "
            "one on a text as long as those it is for (--tokens)"
        )
    least = _least(policy, mean, FLOOR)
    shares = profile.share_out(mean / tokens, costs, [shape.index for shape in shapes], least / tokens)
    return [share * tokens for share in shares]


def _whole(amounts: Sequence[float], costs: Sequence[int], total: float) -> list[int]:
    """Amounts as whole numbers that cost no more than `total`: what rounding down leaves goes to the largest parts."""
    whole = [max(1, int(amount + 1e-9)) for amount in amounts]
    left = total - sum(n * cost for n, cost in zip(whole, costs, strict=True))
    for layer in sorted(range(len(whole)), key=lambda layer: (whole[layer] - amounts[layer], layer)):
        if costs[layer] <= left and amounts[layer] > whole[layer]:
            whole[layer] += 1
            left -= costs[layer]
    return whole
