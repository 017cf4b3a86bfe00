"""MLP-Mixer's token mixing: the control that mixes all tokens by weights of their own, without any product.

Paper: Tolstikhin et al., MLP-Mixer, NeurIPS 2021, https://arxiv.org/abs/2105.01601

    O = W_2 GELU(W_1 X)     with W_1 (hidden, N), W_2 (N, hidden): over tokens, the same for every channel

Differs from the paper: prefix tokens, for which the paper has none, are tokens like the rest.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.checks import Grid, check_int, check_tokens
from attnzoo.mixers.canvas import fixed


class MlpMixer(nn.Module):
    """An MLP over tokens: for one fixed number of them.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Not used: there are no heads.
    tokens
        Number of tokens, prefix included.
    hidden
        Width of the hidden layer; half of `dim` if None, as in the paper's models.

    Raises
    ------
    OptionError
        For a value that an option cannot take.
    """

    def __init__(self, dim: int, num_heads: int = 1, *, tokens: int, hidden: int | None = None) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        self.tokens = check_int("tokens", tokens, minimum=1)
        hidden = max(dim // 2, 1) if hidden is None else check_int("hidden", hidden, minimum=1)
        self.fc1 = nn.Linear(tokens, hidden)
        self.fc2 = nn.Linear(hidden, tokens)

    def forward(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``(B, N, C)``; see `attnzoo.mixers` for grid, prefix and mask.

        Raises
        ------
        ShapeError
            If x, grid, prefix and mask do not fit together, or there is another number of tokens.
        """
        check_tokens(x, self.dim, mask)
        canvas = fixed(x, grid, prefix, mask, self.tokens)
        head, tokens = canvas.lay(x)
        return canvas.take(head, self.fc2(F.gelu(self.fc1(tokens.mT))).mT)
