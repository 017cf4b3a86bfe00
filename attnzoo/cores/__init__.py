"""Cores: parameter-free functions of queries, keys and values, one file per method.

A core is an object called ``core(q, k, v, *, mask=None, causal=False, scale=None, dropout=0.0, softcap=None)``:

- `q` ``(B, H, N, D)``, `k` ``(B, Hkv, S, D)``, `v` ``(B, Hkv, S, Dv)`` with Hkv dividing H; returns ``(B, H, N, Dv)``.
- `mask` is boolean, True where a query may see a key, or floating and added to the scores; it broadcasts to
  ``(B, H, N, S)``. A query that may see no key gets zeros.
- `causal` lines up the ends: query i sees keys up to ``i + S - N``. It combines with `mask`.
- `scale` defaults to ``D ** -0.5``; `dropout` is the probability with which a weight is dropped.

A core that can also return its weights has ``with_weights(...) -> (output, weights)``; one that can tell how much
attention each key got has ``scored(...) -> Scored``, which eviction policies use (see `attnzoo.kernels`).
"""
