"""Repair of swapped models: mixers are fitted to the attention that they replaced.

`repair` trains them, `sensitivity` tells which layers can do without their attention.
"""
