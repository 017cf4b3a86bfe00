"""Eviction: policies that decide which keys and values a bounded cache keeps, one file per method.

- `policy`: what a policy is: its options, and what it sees (`CacheView`).
- `store`: the bounded buffer of one layer, and `scan`: attention through it, block by block. Plain PyTorch.
- `weights`: attention weights, computed unfused, for policies that score by them.
- `cache`: the cache that transformers sees. The only file here that knows transformers.
- `size`: the bytes of a cache.

A layer holds at most `budget` entries per key/value head once a block has ended, and at most ``budget + block_size``
while it is being closed, fewer between calls. Blocks end at multiples of `block_size` of each row's own count of real
tokens, so how a prompt was padded or cut into calls makes no difference.
"""
