"""What the class of a method must be like to be registered: a mistake is told there, not at the first call."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn

from attnzoo.errors import AttnZooError

if TYPE_CHECKING:
    from attnzoo.registry import AttentionInfo

KW_ONLY = "put @dataclass(frozen=True, kw_only=True) above the class"


def check_class(info: AttentionInfo) -> None:
    """Raise `AttnZooError` unless the class of a method can be built as its kind is, and a mixer's called so."""
    target = info.load()
    kind = {"mixer": "a mixer", "eviction": "an eviction policy", "core": "a core"}[info.kind]
    said = f"{info.name!r} is registered as {kind} but"
    if not isinstance(target, type):
        return
    if info.kind == "mixer":
        _check_mixer(info, target, said)
    elif info.kind == "eviction":
        _check_policy(target, said)
    if by_position := _by_position(target, 2 if info.kind == "mixer" else 0):
        made = next(base for base in target.__mro__ if "__init__" in vars(base))
        remedy = KW_ONLY if "__dataclass_params__" in vars(made) else "put * before them"
        raise AttnZooError(
            f"{said} {', '.join(by_position)} of {target.__name__} can be given by position, and options are "
            f"keyword-only: {remedy}"
        )


def _check_policy(target: type, said: str) -> None:
    """Raise `AttnZooError` unless a class is a policy that can be made."""
    from attnzoo.eviction.policy import Policy

    if not issubclass(target, Policy):
        raise AttnZooError(f"{said} is not an attnzoo.eviction.policy.Policy: {target.__name__} must inherit from it")
    if inspect.isabstract(target):
        missing = ", ".join(sorted(target.__abstractmethods__))
        raise AttnZooError(f"{said} {target.__name__} does not define {missing}")
    if undeclared := _not_fields(target):
        raise AttnZooError(f"{said} {', '.join(undeclared)} of {target.__name__} is no option: {KW_ONLY}")


def _check_mixer(info: AttentionInfo, target: type, said: str) -> None:
    """Raise `AttnZooError` unless a mixer can be built and called as mixers are."""
    if not issubclass(target, nn.Module):
        raise AttnZooError(f"{said} {target.__name__} is not a torch.nn.Module")
    if target.__init__ is nn.Module.__init__ or not _takes(target, 2, info.options):
        raise AttnZooError(f"{said} {target.__name__} cannot be built as {target.__name__}(dim, num_heads, **options)")
    if not _takes(target.forward, 2, ("grid", "prefix", "mask")):
        raise AttnZooError(
            f"{said} {target.__name__}.forward cannot be called as mixer(x, grid=, prefix=, mask=); arguments that it "
            "has no use for may stay unread"
        )
    if info.capabilities.decode and not _takes(getattr(target, "extend", None), 4, ()):
        raise AttnZooError(f"{said} {target.__name__}.extend cannot be called as mixer.extend(x, state, mask)")
    if info.capabilities.inherit and not _takes(getattr(target, "inherit", None), 3, ()):
        raise AttnZooError(f"{said} {target.__name__}.inherit cannot be called as mixer.inherit(weight, bias)")


def _by_position(target: type, count: int) -> list[str]:
    """Arguments of a class's constructor, but for the first `count`, that need not be given by name."""
    try:
        parameters = list(inspect.signature(target).parameters.values())[count:]
    except ValueError:  # it tells no signature
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _not_fields(policy: type) -> list[str]:
    """Names that a policy's class annotates as options, but which are no fields of it as a dataclass."""
    known = {one.name for one in fields(policy)}
    own = {name: said for name, said in vars(policy).get("__annotations__", {}).items() if name not in known}
    return [name for name, said in own.items() if "ClassVar" not in str(said) and not name.startswith("_")]


def _takes(function: Any, count: int, named: Iterable[str]) -> bool:
    """Whether `function` can be called with `count` arguments by position and with those `named`."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*[None] * count, **dict.fromkeys(named))
    except TypeError:
        return False
    except ValueError:  # it tells no signature
        return True
    return True
