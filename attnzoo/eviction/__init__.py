"""Eviction policies: which keys and values a bounded cache keeps. None is registered yet.

A policy scores the entries of a layer's cache, ``(B, Hkv, S)``, highest to keep, under a hard budget of entries a
key/value head, wrapped round a core. It is registered with the kind ``eviction``.
"""
