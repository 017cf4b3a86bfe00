"""Mixers: modules with weights of their own that mix tokens, one file per method.

A mixer is built ``Mixer(dim, num_heads, **options)`` and called ``mixer(x, grid=None, prefix=0, mask=None)``:

- `x` is ``(B, N, C)``: `prefix` tokens (class token, registers) and then the tokens of a grid, row by row.
- `grid` is ``(h, w)`` with ``prefix + h * w == N``, or an integer tensor ``(B, 2)``, one grid an image; then the first
  ``h_i * w_i`` tokens after the prefix of image i are real and the rest is padding.
- `mask` is boolean ``(B, N)``, True where a token is real. Padding changes no real token and comes out as zeros.

A mixer whose weights are for one number of tokens takes it as the option `tokens`, prefix included: a host that knows
how many it has refuses another number at the swap.

A mixer that is slow to read because it is fast to run also has ``reference(...)``: the paper's equation, plainly.
"""
