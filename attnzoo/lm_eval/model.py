"""The harness's model of transformers, `HFLM`, with its cache bounded by an eviction policy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from attnzoo.assets import model_folder
from attnzoo.errors import AssetError, OptionError, UnsupportedError, short
from attnzoo.eviction.policy import Policy
from attnzoo.hosts.versions import cache_arguments, output_cache
from attnzoo.imports import import_modules
from attnzoo.registry import AttentionInfo, build_policy, describe, list_attentions
from attnzoo.swap import replace_attention

# Keyword arguments of `from_pretrained` that its signature does not name.
LOADING = ("attn_implementation", "device_map", "load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype")
Request = tuple[Any, list[int], list[int]]  # what it is kept under, context, continuation


@register_model("attnzoo")
class AttnZooLM(HFLM):
    """A causal language model of transformers whose key/value cache an eviction policy bounds.

    Likelihoods and generations go through the bounded cache, each request as if it were alone, whatever the batch.
    With ``schedule="prompt"`` the context of a request is its prompt: full attention over it, one eviction at its end,
    then the continuation, so that likelihoods are computed one context at a time (its continuations share the reading
    of it). A rolling likelihood has no context but one token, and is then bounded from there on.

    Parameters
    ----------
    pretrained
        As of `HFLM`: a folder, a name on the Hugging Face hub, or a model, which is then swapped in place; or the name
        of an asset of attnzoo, such as ``smollm2_135m_instruct``.
    attention
        Name of an eviction policy.
    where
        As of `attnzoo.replace_attention`: which layers.
    imports
        A module, or several, to import first, for the policies that they register; of the working directory, too.
    **arguments
        Options of the policy, such as ``budget=1024`` (entries) or ``budget=0.25`` (a share), and all that `HFLM`
        takes, such as ``dtype``, ``max_length`` or ``batch_size``.

    Raises
    ------
    ConfigError
        If one of `imports` cannot be imported.
    OptionError, UnknownNameError
        If `attention` is missing or no policy, or an argument is unknown or cannot be; nothing has been loaded then.
    AssetError
        If the model cannot be loaded.
    SwapError, UnsupportedError
        If it cannot be swapped.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        attention: str | None = None,
        where: str | Sequence[str] | None = None,
        imports: str | Sequence[str] = (),
        **arguments: Any,
    ) -> None:
        import_modules([imports] if isinstance(imports, str) else imports)
        info = _policy_named(attention)
        options, others = _split(info, arguments)
        self.policy: Policy = build_policy(info, options)
        others.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")  # HFLM takes CUDA to be there
        if isinstance(pretrained, str):
            pretrained = str(model_folder(pretrained) or pretrained)
        try:
            super().__init__(pretrained, **others)
        except (OSError, ValueError) as error:  # no such model, a damaged file
            raise AssetError(f"the model {short(pretrained)} cannot be loaded: {error}") from error
        replace_attention(self.model, info.name, where=where, **options)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes of a model, and the policy with all its options."""
        return {
            **super().get_model_info(),
            "attention": repr(self.policy),
            "attnzoo_version": metadata.version("attnzoo"),
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding would have said."""
        if self.policy.schedule != "prompt":  # then how a request is cut into calls makes no difference
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise UnsupportedError(
                    f"a continuation of {len(continuation)} tokens does not fit max_length={self.max_length}; give a "
                    "larger max_length"
                )
            room = self.max_length + 1 - len(continuation)  # as HFLM cuts: from the left, the last token is not read
            by_context.setdefault(tuple(context[-room:]), []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        for context, indices in tqdm(
            by_context.items(), desc="Running loglikelihood requests", disable=disable_tqdm or self.rank != 0
        ):
            found = self._after_prompt(context, [requests[index][2] for index in indices])
            answers |= zip(indices, found, strict=True)
        for index, (key, _, _) in enumerate(requests):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _after_prompt(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """Read a context, evict, and score each continuation from there."""
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            prompt = self.model(self._row(context), use_cache=True, logits_to_keep=1)
            cache = output_cache(prompt)
            cache.end_prompt()
            answers = []
            for tokens in continuations:
                logits = prompt.logits[0, -1:]  # (1, vocabulary)
                if len(tokens) > 1:
                    own = cache_arguments(self.model, cache.copy())
                    logits = torch.cat([logits, self.model(self._row(tokens[:-1]), **own, use_cache=True).logits[0]])
                scores = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)  # (tokens, vocabulary)
                wanted = torch.tensor(tokens, device=scores.device)
                total = scores.gather(1, wanted[:, None]).sum()
                answers.append((float(total), bool((scores.argmax(-1) == wanted).all())))
        return answers

    def _row(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(tokens)], device=self.device)  # (1, N)


def _policy_named(name: str | None) -> AttentionInfo:
    policies = list_attentions("eviction")
    if name is None:
        raise OptionError(
            f"attention= is missing: name an eviction policy ({', '.join(policies)}); the dense model is --model hf"
        )
    info = describe(name)
    if info.kind != "eviction":
        raise OptionError(f"attention={name} is a {info.kind}, not an eviction policy; those are {', '.join(policies)}")
    return info


def _split(info: AttentionInfo, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which arguments are the policy's and which are `HFLM`'s."""
    theirs = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
    loading = {*LOADING, *inspect.signature(PreTrainedModel.from_pretrained).parameters} - {"kwargs", "model_args"}
    if twice := sorted(set(info.options) & theirs & set(arguments)):
        raise OptionError(
            f"{', '.join(twice)}: both {info.name!r} and the harness have an argument of this name; swap the model in "
            "Python and pass it to lm_eval.models.huggingface.HFLM"
        )
    unknown = [name for name in arguments if name not in {*info.options, *theirs, *loading}]
    info.check_options(unknown)  # which names the closest option, and all there are
    options = {name: value for name, value in arguments.items() if name in info.options}
    return options, {name: value for name, value in arguments.items() if name not in options}
