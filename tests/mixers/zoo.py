"""Every registered mixer, in every configuration that has a contract of its own: what the contract tests run over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo import create_attention, describe, list_attentions
from attnzoo.mixers.channel_mixing import CHANNEL_MIXINGS
from attnzoo.mixers.padre import OUTPUTS
from attnzoo.mixers.token_mixing import TOKEN_MIXINGS
from attnzoo.registry import REQUIRED, Capabilities

DIM, HEADS, HEIGHT, WIDTH, PREFIX = 6, 2, 3, 4, 2
TOKENS = PREFIX + HEIGHT * WIDTH
ARGS: dict[str, Any] = {"grid": (HEIGHT, WIDTH), "prefix": PREFIX}


@dataclass(frozen=True)
class Case:
    """A mixer and its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def fixed(self) -> bool:
        """Whether it is for one number of tokens."""
        return "tokens" in self.options

    @property
    def able(self) -> Capabilities:
        return describe(self.name).given(self.options).capabilities

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The mixer, all of its parameters moved from where they start, for much hides behind zeros."""
        torch.manual_seed(0)
        mixer = create_attention(self.name, DIM, HEADS, **self.options).to(dtype)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return mixer


def _cases() -> list[Case]:
    cases = []
    for name in list_attentions("mixer"):
        needs = describe(name).options.get("tokens") is REQUIRED
        cases.append(Case(name, {"tokens": TOKENS} if needs else {}))
        if "bidirectional" in describe(name).options:
            cases.append(Case(name, {"bidirectional": False}))
    cases.append(Case("power", {"power": 4, "bidirectional": False, "gate": True}))
    cases.append(Case("poly_attention", {"order": 2}))
    for tokens in TOKEN_MIXINGS:
        own = {"tokens": TOKENS} if tokens == "dense" else {}
        cases += [Case("padre", {"token_mixing": tokens, "channel_mixing": c, **own}) for c in CHANNEL_MIXINGS]
    for output in OUTPUTS:
        own = {"tokens": TOKENS} if output == "element_sum" else {}
        cases.append(Case("padre", {"degree": 4, "output": output, **own}))
        cases.append(Case("padre", {"token_mixing": "causal_conv1d", "output": output, "kernel_size": 4, **own}))
        cases.append(Case("padre", {"z_mixing": "identity", "output": output, **own}))
    cases.append(Case("padre", {"z_mixing": "identity", "token_mixing": "causal_conv1d", "kernel_size": 4}))
    cases.append(Case("padre", {"products": False}))
    causal = {"products": False, "token_mixing": "causal_conv1d", "kernel_size": 4}
    cases += [Case("padre", {**causal, "output": "sum"}), Case("padre", {**causal, "z_mixing": "identity"})]
    cases.append(Case("padre", {"start": "identity", "out_proj": True, "gain": 0.5}))
    return cases


CASES = _cases()


def tokens(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, TOKENS, DIM, generator=generator, dtype=torch.float64).to(dtype)


def finite_difference_degree(function: Any, x: Tensor, highest: int) -> int | None:
    """Degree of a polynomial along a random line: the last finite difference that is not 0; None if above `highest`."""
    torch.manual_seed(1)
    u = torch.randn_like(x)
    steps = (torch.arange(highest + 3).double() - highest // 2) / 2
    with torch.no_grad():
        values = torch.stack([function(x + t * u) for t in steps])
    size = values.abs().max()
    sizes = [float(values.diff(n=n, dim=0).abs().max() / size) if n else 1.0 for n in range(highest + 2)]
    if sizes[-1] > 1e-11:
        return None
    return max(n for n, difference in enumerate(sizes) if difference > 1e-9)
