"""Eviction: policies that decide which keys and values a bounded cache keeps, one file per method.

A call goes through, in this order:

- `cache`: the cache that transformers sees, its copies and its file; `layers`: its layers; `calls`: what begins and
  ends a call of a swapped model. These three know transformers.
- `scan`: attention through a store, block by block, with an eviction at the end of each. Plain PyTorch, as all below.
- `store`: the bounded buffer of one layer; `ragged`: one whose heads share its budget.
- `policy`: what a policy is: its options, and what it sees (`CacheView`); `wrapper`: policies over another one.
- `weights`: attention weights, computed unfused, for scores that the core does not give.

Beside them: `budgets` (what each layer gets), `profile` and `layer_profile` (measured budgets), `calibrate` and
`directions` (for `qfilters`), `layer_data` (what a policy may ask of a model's layer), `size` (bytes), `reading`.

A layer holds at most `budget` entries per key/value head once a block has ended, and at most ``budget + block_size``
while it is being closed, fewer between calls. Blocks end at multiples of `block_size` of each row's own count of real
tokens, so how a prompt was padded or cut into calls makes no difference. ``schedule="prompt"`` is another matter: the
prompt is not bounded, and ends with the first call of one token per row.
"""
