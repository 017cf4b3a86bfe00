"""A language model at work with its cache, and a second one on the same weights, swapped, beside it."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo.bench import gate as gates
from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.record import Gate
from attnzoo.eviction.policy import Policy
from attnzoo.eviction.size import CacheBytes, kv_bytes
from attnzoo.hosts.versions import cache_arguments, output_cache
from attnzoo.registry import build_policy
from attnzoo.tasks.decode.config import DecodeConfig
from attnzoo.tasks.decode.lm import largest, load_model


def load_dense(config: DecodeConfig) -> Any:
    """Load the dense model without transformers' progress bar, whose lock would outlive a child that is killed."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = getattr(torch, config.dtype)
    return load_model(config.model, dtype=dtype, attention=config.attention, device=torch.device(config.device))


def twin(model: Any) -> Any:
    """Give a second model that shares every parameter and buffer with `model`, to be swapped by itself."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def swapped_twin(dense: Any, spec: AttentionConfig | None) -> Any:
    """Give a second model on the same weights, with the attention of `spec`; with None, the same attention."""
    model = twin(dense)
    return model if spec is None else attnzoo.replace_attention(model, spec.name, **spec.swap)


def policy_of(spec: AttentionConfig | None) -> Policy | None:
    """Give the policy that `spec` names; None for cores and the dense baseline."""
    if spec is None or attnzoo.describe(spec.name).kind != "eviction":
        return None
    return build_policy(attnzoo.describe(spec.name), spec.options)


def read(model: Any, prompts: Tensor) -> Any:
    """A prefill: the prompts into a new cache, and the logits of the first new token."""
    return model(prompts, use_cache=True, logits_to_keep=1)


class Decoder:
    """A model at work on prompts: `read` them, then `step` greedily. After each the cache's bound is checked.

    `read_bytes` are those of the cache after a prompt, `step_bytes` the largest after any step.
    """

    def __init__(self, model: Any, prompts: Tensor, policy: Policy | None = None) -> None:
        self.model, self.prompts, self.policy = model, prompts, policy
        self.read_bytes = self.step_bytes = CacheBytes(0, 0, 0)
        self.most = self.limit = 0
        self.broken = ""
        self._out: Any = None

    def forget(self) -> None:
        """Let the cache go."""
        self._out = None

    def read(self) -> None:
        """Read the prompts into a new cache."""
        self._out = read(self.model, self.prompts)

    def step(self) -> None:
        """Take the likeliest token and put it in."""
        token = self._out.logits[:, -1:].argmax(-1)
        self._out = self.model(token, **cache_arguments(self.model, output_cache(self._out)), use_cache=True)

    def repeat_rows(self, times: int) -> None:
        """Go on with every row so many times; if they are more, take two steps: the first at a new size are slower."""
        if times == 1:
            return
        output_cache(self._out).batch_repeat_interleave(times)
        self._out.logits = self._out.logits.repeat_interleave(times, 0)
        for _ in range(2):
            self.step()

    def look(self) -> None:
        """Take the cache's measures, and note where it holds more than it may."""
        cache = output_cache(self._out)
        seen, size = cache.get_seq_length(), kv_bytes(cache)
        if seen == self.prompts.shape[1]:
            self.read_bytes = largest(self.read_bytes, size)
        else:
            self.step_bytes = largest(self.step_bytes, size)
        if self.policy is None:
            return
        waits = self.policy.schedule == "prompt" and seen == self.prompts.shape[1]
        for layer in cache.own:
            held, policy = max(layer.entries), self.policy
            if policy.by_layer:
                policy = layer.policy
            allowed = seen if waits else policy.most_at(seen)
            self.most = max(self.most, held)
            self.limit = max(self.limit, seen if waits else policy.entries_at(seen) + policy.every - 1)
            if held > allowed and not self.broken:
                self.broken = f"a layer held {held} entries after {seen} tokens, {allowed} are allowed"

    def bounded(self, gate: Gate) -> Gate:
        """Put the bound into a gate, which fails where it was broken."""
        if self.policy is None:
            return gate
        gate = gate.model_copy(update={"cache_limit": self.limit, "cache_most": self.most})
        if self.policy.schedule == "prompt":
            gate = gate.model_copy(update={"detail": "its cache is not bounded while the prompt is read"})
        return gates.refuse(gate, self.broken or None)
