"""What differs between releases of transformers: the only file of attnzoo that knows.

transformers renames things from release to release (the key/value cache of a call was ``past_key_values`` until 5.23
and is ``cache`` since). What can be found by behavior is: `facts` calls a tiny model of the installed release once and
sees what reaches whom. The rest is read from signatures, here and nowhere else. A release that nobody has tried yet is
tried like any other; where a fact cannot be found, the error names the release and the fact.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError

CACHE_NAMES = ("cache", "past_key_values")
"""What releases of transformers call the key/value cache of a call and of its output, newest first."""

UNREAD = ("position_bias", "s_aux", "sinks", "cache", "indices", "block_indices")
"""Arguments of the attention interface that some models pass and no core supports."""

PROBE = "attnzoo_probe"  # in transformers' attention interface
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # the table of functions that attention modules look into


@dataclass(frozen=True)
class Facts:
    """What the installed release of transformers does.

    Attributes
    ----------
    cache_argument
        The argument of a model's forward that takes the key/value cache.
    cache_field
        The field of a model's output that holds it.
    """

    cache_argument: str
    cache_field: str


@lru_cache(maxsize=1)
def facts() -> Facts:
    """Call a tiny model of the installed release once and say what was seen.

    Raises
    ------
    UnsupportedError
        If the release does not do what attnzoo needs; names the release and what is missing.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            return _observe()
    except UnsupportedError:
        raise
    except Exception as error:
        raise _missing(f"a tiny Llama cannot be called ({type(error).__name__}: {error})") from error


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Name of the argument of a model's `forward` that takes the key/value cache; None if there is none.

    Models whose code comes from elsewhere keep the names of the release they were written for.
    """
    return next((name for name in CACHE_NAMES if name in parameters(forward)), None)


def pop_cache(arguments: dict[str, Any]) -> Any:
    """Take the key/value cache out of a call's keyword arguments, under whichever name it was given; None without."""
    found = [arguments.pop(name) for name in CACHE_NAMES if name in arguments]
    return next((cache for cache in found if cache is not None), None)


def cache_arguments(model: Any, cache: Any) -> dict[str, Any]:
    """Keyword arguments that hand `cache` to a call of `model`.

    Raises
    ------
    UnsupportedError
        If the model takes no cache.
    """
    name = cache_argument(type(model).forward)
    if name is None and keywords(type(model).forward) is not None:
        name = facts().cache_argument
    if name is None:
        raise UnsupportedError(f"{type(model).__name__} takes no key/value cache")
    return {name: cache}


def output_cache(output: Any) -> Any:
    """The key/value cache in a model's output; None where it made none.

    Raises
    ------
    UnsupportedError
        If the output has no field for one.
    """
    for name in CACHE_NAMES:
        if hasattr(output, name):
            return getattr(output, name)
    raise _missing(f"the output {type(output).__name__} has no field {' or '.join(CACHE_NAMES)}")


def separates(arguments: Mapping[str, Any], cache: Any) -> bool:
    """Whether the host takes positions that do not rise by 1 for several sequences packed into one row.

    It does where a call has neither a mask nor a cache (``masking_utils.find_packed_sequence_indices``).
    """
    return cache is None and arguments.get("attention_mask") is None


def takes_cache(module: Any) -> bool:
    """Whether a module makes masks and caches for its layers."""
    forward = type(module).forward
    names = parameters(forward)
    return cache_argument(forward) is not None and ("input_ids" in names or "inputs_embeds" in names)


def passes_down(module: Any) -> bool:
    """Whether a module takes keyword arguments it does not know, and hands them on."""
    return _hands_on(type(module).forward)


@lru_cache(maxsize=256)
def _hands_on(forward: Callable[..., Any]) -> bool:
    name = keywords(forward)
    if name is None:
        return False
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return True
    return source.count(f"**{name}") > 1


def calls_interface(layer: Any) -> bool:
    """Whether a module looks its attention up in transformers' table of attention functions."""
    return _INTERFACE in _code(layer).co_names


def words(layer: Any) -> set[str]:
    """Names that a module's forward gives to its variables and to the arguments of what it calls."""
    code = _code(layer)
    return {w for c in code.co_consts if isinstance(c, tuple) for w in c} | set(code.co_varnames)


def new_tokens(query: Any) -> int:
    """Number of new tokens, as a cache is told it: a number, or one number for each of them (before 5.10)."""
    return query if isinstance(query, int) else len(query)


def saved_names(model: Any) -> dict[str, str]:
    """Names of a model's weights by those under which ``save_pretrained`` writes them by default.

    Weights that are saved in another shape (split or merged) are left out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    names = {id(value): name for name, value in state.items()}
    saved = revert_weight_conversion(model, dict(state))
    return {name: names[id(value)] for name, value in saved.items() if id(value) in names}


@lru_cache(maxsize=256)
def parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Parameters of a method, without self."""
    found = dict(inspect.signature(forward).parameters)
    found.pop("self", None)
    return found


def keywords(forward: Callable[..., Any]) -> str | None:
    """Name of the parameter that takes the keyword arguments a method does not know; None if there is none."""
    return next((p.name for p in parameters(forward).values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)


def _code(layer: Any) -> Any:
    return inspect.unwrap(type(layer).forward).__code__


def _observe() -> Facts:
    from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaModel

    seen: list[Mapping[str, Any]] = []

    def probe(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.append(kwargs)
        return query.transpose(1, 2), None

    AttentionInterface.register(PROBE, probe)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=4, **sizes)
    model = LlamaModel(config).eval()
    if not calls_interface(model.layers[0].self_attn):
        raise _missing(f"attention modules do not look into {_INTERFACE}")
    config._attn_implementation_internal = PROBE
    ids = torch.tensor([[1, 2, 3]])
    for name in CACHE_NAMES:
        cache = DynamicCache(config=config)
        if name not in parameters(LlamaModel.forward):
            continue
        output = model(ids, **{name: cache}, attnzoo_call="down")
        if cache.get_seq_length() != ids.shape[1]:
            continue
        if not seen or seen[-1].get("attnzoo_call") != "down":
            raise _missing("keyword arguments of a model do not go down to the attention interface")
        field = next((field for field in CACHE_NAMES if getattr(output, field, None) is cache), None)
        if field is None:
            raise _missing(f"a model's output has no field for its cache (looked for: {', '.join(CACHE_NAMES)})")
        return Facts(name, field)
    raise _missing(f"a model's forward has no argument for its cache (looked for: {', '.join(CACHE_NAMES)})")


def _missing(fact: str) -> UnsupportedError:
    import transformers

    return UnsupportedError(
        f"transformers {transformers.__version__} is not understood by this release of attnzoo: {fact}. "
        "Use a release that docs/compat.md lists, or a newer attnzoo"
    )
