"""Swap the attention of a model, in all chosen layers or none, and restore it.

A swap changes only the object it is given. It stores one record per swapped layer on the model (`Swapped`), so a copy
of a swapped model, or a part of it, can be reported on and restored like the model itself.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from attnzoo.checks import check_choice
from attnzoo.errors import OptionError, SwapError, UnsupportedError, short
from attnzoo.eviction.budgets import LayerShape, share_out
from attnzoo.eviction.scan import BoundedAttention
from attnzoo.hosts import HostOptions, RefusedSite, Site, find_sites
from attnzoo.hosts.site import Core, Swapped, original_of, swapped_record
from attnzoo.hosts.value_map import value_map
from attnzoo.registry import AttentionInfo, build_core, build_policy, cores_with, describe, list_attentions
from attnzoo.repairing.teacher import put_back
from attnzoo.units import megabytes

Model = TypeVar("Model", bound=nn.Module)
INITS = ("random", "inherit")


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes
    ----------
    path, host, host_class
        Name of the layer in the model, library it comes from, and class of the original module.
    attention
        Name of the attention that was swapped in; None if the layer has its own.
    options
        Options of the swap.
    parameters_before, parameters_after, reused, added
        Numbers of parameters of the layer: before the swap, after it, shared by both, new.
    note
        Why an eviction policy leaves the layer out: a sliding window bounds its cache already.
    held_bytes, most_bytes
        Bytes that an eviction policy lets the layer hold per row of a batch at the end of a block, and at most within
        one, in the dtype that the layer has now; None for other methods, and where the budget is a share of the text.
    """

    path: str
    host: str
    host_class: str
    attention: str | None
    options: Mapping[str, Any]
    parameters_before: int
    parameters_after: int
    reused: int
    note: str = ""
    held_bytes: int | None = None
    most_bytes: int | None = None

    @property
    def budget(self) -> int | float | None:
        """What an eviction policy has in this layer: entries per key/value head, or a share; else None."""
        return self.options.get("budget")

    @property
    def added(self) -> int:
        """Number of new parameters."""
        return self.parameters_after - self.reused


@dataclass(frozen=True)
class SwapReport:
    """The attention layers of a model; prints as a table.

    Attributes
    ----------
    layers
        Every attention layer, swapped or not.
    parameters_before, parameters_after
        Numbers of parameters of the whole model.
    standing
        Layers that compute attention, judging by the functions they call, but whose class attnzoo does not know. They
        cannot be swapped.
    """

    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    standing: tuple[LayerReport, ...] = ()

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        """The swapped layers."""
        return tuple(layer for layer in self.layers if layer.attention is not None)

    @property
    def reused(self) -> int:
        """Number of the original parameters that the swapped layers still use."""
        return sum(layer.reused for layer in self.swapped)

    @property
    def added(self) -> int:
        """Number of new parameters."""
        return sum(layer.added for layer in self.swapped)

    @property
    def removed(self) -> int:
        """Number of the original parameters that the swapped layers do not use."""
        return sum(layer.parameters_before - layer.reused for layer in self.swapped)

    def __str__(self) -> str:
        bounded = [layer for layer in self.swapped if layer.budget is not None]
        heads = ("layer", "was", "is", "parameters", "reused", "added", *(("budget", "cache") if bounded else ()))
        rows = [heads]
        for layer in self.layers:
            options = ", ".join(f"{k}={v!r}" for k, v in layer.options.items())
            own = f"(its own; {layer.note})" if layer.note else "(its own)"
            now = own if layer.attention is None else layer.attention + (f"({options})" if options else "")
            change = f"{layer.parameters_before:,} -> {layer.parameters_after:,}"
            counts = ("-", "-") if layer.attention is None else (f"{layer.reused:,}", f"{layer.added:,}")
            kept = (_budget(layer.budget), megabytes(layer.held_bytes)) if bounded else ()
            rows.append((layer.path, layer.host_class, now, change, *counts, *kept))
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(
            [
                *lines,
                f"{len(self.layers)} attention layers found, {len(self.swapped)} swapped; "
                f"parameters of the model {self.parameters_before:,} -> {self.parameters_after:,} "
                f"(reused {self.reused:,}, removed {self.removed:,}, added {self.added:,})",
                *([_held(bounded)] if bounded else []),
                *(["left alone: " + _told(self.standing)] if self.standing else []),
            ]
        )


def _budget(budget: int | float | None) -> str:
    """What a layer got, for a reader."""
    if isinstance(budget, float):
        return f"{budget:.3g} of the tokens"
    return "-" if budget is None else "1 entry" if budget == 1 else f"{budget:,} entries"


def _held(bounded: Sequence[LayerReport]) -> str:
    """What the caches of bounded layers hold together."""
    sizes = [(layer.held_bytes, layer.most_bytes) for layer in bounded]
    known = [(held, most) for held, most in sizes if held is not None and most is not None]
    size = "a size that depends on the text"
    if len(known) == len(sizes):
        held, most = (megabytes(sum(each)) for each in zip(*known, strict=True))
        size = f"{held}, and up to {most} within one"
    prompt = any(layer.options.get("schedule") == "prompt" for layer in bounded)
    whole = "; the whole prompt until it ends" if prompt else ""
    return f"budgets are per key/value head; at the end of a block the swapped layers hold, per row, {size}{whole}"


def _cache_bytes(layer: nn.Module, record: Swapped) -> tuple[int | None, int | None]:
    """Bytes that a bounded layer holds per row at the end of a block, and at most within one, in its dtype of now."""
    if record.shape is None or not isinstance(record.options.get("budget"), int):
        return None, None
    policy = vars(layer)["attnzoo_cache"].policy
    dtypes = {p.dtype for p in layer.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    shape = replace(record.shape, dtype=dtypes.pop()) if len(dtypes) == 1 else record.shape
    always, entry = shape.bytes_held(policy)
    return always + entry * policy.budget, always + entry * (policy.budget + policy.every)


def _told(standing: Sequence[LayerReport]) -> str:
    """Layers that attend and were left alone, by class."""
    classes: dict[str, list[str]] = {}
    for layer in standing:
        classes.setdefault(f"{layer.host_class} ({layer.host})", []).append(layer.path)
    said = [f"{len(paths)} of {name}, the first at {paths[0]}" for name, paths in classes.items()]
    return "; ".join(said) + ": they compute attention, but attnzoo does not know their class"


def replace_attention(
    model: Model,
    name: str,
    *,
    where: str | Sequence[str] | None = None,
    keep_original: bool = True,
    init: str = "random",
    **options: Any,
) -> Model:
    """Replace the attention of a model, in every layer or in the layers that `where` selects.

    The model is changed in place and returned. A core or a policy runs on the model's own weights; a mixer has new
    weights and must be trained. Swapping a swapped layer replaces the first swap, also if the new method then leaves
    the layer's own attention (an eviction policy, in layers with a sliding window). If any chosen layer cannot be
    swapped, none is. Layers that compute attention but whose class attnzoo does not know (such as the windows of a
    detector's Swin backbone) are left unchanged: a swap without `where` warns about them, and `swap_report` lists them.

    Parameters
    ----------
    model
        A timm, torch, transformers or mmdet model, or a module that contains one.
    name
        A registered core, mixer or eviction policy; see `attnzoo.list_attentions`. A policy bounds the key/value cache
        of a causal language model of transformers; layers with a sliding window keep their own cache.
    where
        One or several shell-style patterns for the names of the layers to swap, or of modules that contain them:
        ``"blocks.0"``, ``"blocks.*"``, ``"*.11.attn"``.
    keep_original
        Keep the original modules, so that `restore_attention` can put them back. False frees them.
    init
        How a mixer's weights begin. ``random``: as its class has it. ``inherit``: from the map that the layer's value
        and output projections are together, if the mixer can hold it (`Capabilities.inherit`).
    **options
        Options of the method. For mixers in models that do not know their grid (torch's encoders), also
        ``grid=(h, w)`` and ``prefix=0``, the number of tokens before the grid. For mixers in a detector's encoder, or
        where `nn.MultiheadAttention` is called with three tensors of one sequence, also ``positions=True``: whether the
        mixer gets tokens with position embeddings added, as queries and keys do, or without, as values do. Select the
        self-attention with `where` if such a model has cross-attention too.

    Raises
    ------
    AttnZooError
        The name or an option is unknown; the model has no attention; `where` matches nothing; or a chosen layer cannot
        be swapped (all such layers are listed with the reason). The model is then unchanged.
    """
    if isinstance(model, str) and isinstance(name, nn.Module):
        raise SwapError(f"the arguments are in the wrong order: it is replace_attention(model, {model!r})")
    places = _places(model)
    info = describe(name)
    layers = {path: _own(layer) for path, layer in places.items()}
    info = info.given(options)
    given = dict(options)
    host_options, options = split_host_options(info, options)
    info.check_options(options)
    _check_init(info, init)
    gone = _gone(places)
    found = [site for site in find_sites(model, layers, host_options) if site.path not in {g.path for g in gone}]
    chosen = _choose(model, [*found, *gone], where)
    try:
        info.require_options(options)
        budgets, options = _budget_per_layer(info, options)
        bounded = _bounded(info, options) if info.kind == "eviction" else None
    except OptionError:
        _refuse(info, chosen, None, {})  # where the method cannot stand at all, its options are beside the point
        raise
    sites = chosen if bounded is None else _without_own_window(chosen)
    left = [] if bounded is None else [site for site in chosen if site.note and _is_swapped(places[site.path])]
    _refuse(info, sites, bounded, options)
    if where is None:
        _warn_of_standing(found)
    _check_host_options(host_options, sites)
    core = build_core(info, options) if info.kind == "core" else None
    plans = [_Plan(given, core)] * len(sites) if bounded is None else _shared_out(bounded, given, sites, budgets)
    swaps = [
        (site, _substitute(site, info, options, plan, keep_original, places[site.path].training, init))
        for site, plan in zip(sites, plans, strict=True)
    ]
    # nothing below can fail: the model changes here, and whole
    for site in left:
        site.module.training = places[site.path].training
    put = {id(places[site.path]): layer for site, layer in swaps}
    _put(model, put | {id(places[site.path]): site.module for site in left})
    for site in left:
        site.removed()
    for site, layer in swaps:
        site.installed(layer)
    return model


def restore_attention(model: Model) -> Model:
    """Put the original attention modules back into a swapped model, in place, and return the model.

    Weights that `attnzoo.repair` trained besides mixers (``train="all"``) are put back, too.

    Raises
    ------
    SwapError
        If nothing in the model was swapped, or if an original was not kept (``keep_original=False``).
    """
    places = _places(model)
    swapped = {path: layer for path, layer in places.items() if swapped_record(layer) is not None}
    if not swapped:
        raise SwapError("nothing to restore: no layer of this model was swapped by attnzoo.replace_attention")
    gone = [path for path, layer in swapped.items() if original_of(layer) is None]
    if gone:
        raise SwapError(
            "swapped with keep_original=False, or loaded by attnzoo.load, which keeps no originals, so the original "
            f"modules are gone: {', '.join(gone)}"
        )
    if "" in swapped:
        raise SwapError("this module is itself a swapped layer; restore the model that holds it")
    originals = {}
    for layer in swapped.values():
        original = original_of(layer)
        assert original is not None
        original.training = layer.training
        originals[id(layer)] = original
    sites = find_sites(model, {path: _own(layer) for path, layer in places.items()}, HostOptions())
    _put(model, originals)
    for site in sites:
        site.removed()
    put_back(model)
    return model


def swap_report(model: nn.Module) -> SwapReport:
    """List the attention layers of a model, the attention that each has, and the number of parameters."""
    places = _places(model)
    own = {path: _own(layer) for path, layer in places.items()}
    sites = find_sites(model, own, HostOptions())
    reports = []
    seen: set[int] = set()
    standing = _standing(sites)
    hosts = {site.path: site for site in sites if not _stands(site)}
    for path, layer in places.items():
        record = swapped_record(layer)
        if (record is None and path not in hosts) or id(layer) in seen:
            continue
        seen.add(id(layer))
        if record is None:
            n = _parameters(layer)
            site = hosts[path]
            reports.append(LayerReport(path, site.host, type(layer).__name__, None, {}, n, n, n, site.note))
        else:
            held, most = _cache_bytes(layer, record)
            reports.append(
                LayerReport(
                    path,
                    record.host,
                    record.host_class,
                    record.info.name,
                    record.options,
                    record.parameters_before,
                    record.parameters_after,
                    record.reused,
                    held_bytes=held,
                    most_bytes=most,
                )
            )
    after = _parameters(model)
    before = after - sum(r.parameters_after - r.parameters_before for r in reports)
    return SwapReport(tuple(reports), before, after, standing)


def swapped_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Names and modules of the swapped layers."""
    return {path: layer for path, layer in _places(model).items() if swapped_record(layer) is not None}


def _places(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its first path, without what lies inside a swapped layer."""
    if not isinstance(model, nn.Module):
        raise SwapError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return dict(_walk("", model, set()))


def _walk(path: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    if swapped_record(module) is None:
        for name, child in module.named_children():
            yield from _walk(f"{path}.{name}" if path else name, child, seen)


def _own(layer: nn.Module) -> nn.Module:
    """The host's own module at this place: what a swap put there gives way to what it stands for."""
    original = original_of(layer)
    return layer if original is None else original


def _is_swapped(layer: nn.Module) -> bool:
    return swapped_record(layer) is not None


def _gone(places: Mapping[str, nn.Module]) -> list[Site]:
    """Layers that were swapped for good: sites that refuse."""
    reason = "the original module is gone (swapped with keep_original=False)"
    return [
        RefusedSite(path, layer, record.host, reason)
        for path, layer in places.items()
        if (record := swapped_record(layer)) is not None and record.original is None
    ]


def split_host_options(info: AttentionInfo, options: dict[str, Any]) -> tuple[HostOptions, dict[str, Any]]:
    """Take out of `options` what is said about the host rather than about the method.

    Raises `OptionError` if that cannot be. `info` has the capabilities that the method has under these options.
    """
    names = ({"positions"} if info.kind == "mixer" else set()) | (
        {"grid", "prefix"} if info.capabilities.grid else set()
    )
    said = {key: value for key, value in options.items() if key in names}
    rest = {key: value for key, value in options.items() if key not in said}
    if "grid" in said:
        grid = said["grid"]
        whole = isinstance(grid, Sequence) and len(grid) == 2 and all(type(n) is int and n > 0 for n in grid)
        if not whole:
            raise OptionError(f"grid must be (h, w), two whole numbers of at least 1, not {short(grid)}")
        said["grid"] = (grid[0], grid[1])
    if "prefix" in said and (type(said["prefix"]) is not int or said["prefix"] < 0):
        raise OptionError(f"prefix must be a whole number of at least 0, not {short(said['prefix'])}")
    if "positions" in said and type(said["positions"]) is not bool:
        raise OptionError(f"positions must be True or False, not {short(said['positions'])}")
    return HostOptions(**said), rest


def _check_host_options(host_options: HostOptions, sites: list[Site]) -> None:
    """Raise `OptionError` if something was said about the host that one of the layers has no use for."""
    useless = {name for site in sites for name in host_options.given() - site.accepted_options}
    if useless & {"grid", "prefix"}:
        raise OptionError("grid and prefix are not options here: this host knows its own grid")
    if useless:
        raise OptionError(
            "positions is not an option here: this attention is called with one tensor, and adds no position"
        )


def _choose(model: nn.Module, sites: list[Site], where: str | Sequence[str] | None) -> list[Site]:
    if not sites:
        raise SwapError(
            f"found no attention in this {type(model).__name__}; attnzoo knows the attention layers of timm, torch, "
            "transformers and mmdet"
        )
    if sites[0].path == "" and isinstance(sites[0], RefusedSite):
        reason = f"{type(model).__name__}: {sites[0].reason}"
        raise UnsupportedError(f"this model is itself an attention layer that cannot be replaced: {reason}", [reason])
    if sites[0].path == "":
        raise SwapError(
            f"this {type(model).__name__} is itself the attention layer; pass the model that holds it, "
            "for example torch.nn.Sequential(layer)"
        )
    known = [site for site in sites if not _stands(site)]
    if where is None:
        return known or sites
    patterns = [where] if isinstance(where, str) else where
    if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise OptionError(f"where must be a pattern or a list of patterns of layer names, not {short(where)}")
    for pattern in patterns:
        if not any(matches(site.path, pattern) for site in sites):
            listed = ", ".join(site.path for site in sites[:4]) + (", ..." if len(sites) > 4 else "")
            raise SwapError(f"where={pattern!r} matches none of the {len(sites)} attention layers: {listed}")
    chosen = [site for site in sites if any(matches(site.path, p) for p in patterns)]
    return [site for site in chosen if not _stands(site)] or chosen


def _stands(site: Site) -> bool:
    """Whether the layer is known to attend by what it does alone."""
    return isinstance(site, RefusedSite) and site.standing


def _standing(sites: Sequence[Site]) -> tuple[LayerReport, ...]:
    found = []
    for site in filter(_stands, sites):
        n = _parameters(site.module)
        found.append(LayerReport(site.path, site.host, type(site.module).__name__, None, {}, n, n, n))
    return tuple(found)


def _warn_of_standing(sites: Sequence[Site]) -> None:
    """Say what attention a swap of a whole model leaves standing."""
    left = _standing(sites)
    if left:
        warnings.warn(
            f"this swap leaves some attention unchanged: {_told(left)}. Choose layers with where= to swap a part only",
            stacklevel=3,
        )


def matches(path: str, pattern: str) -> bool:
    """Whether `pattern` fits the layer, or a module that holds it."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def _bounded(info: AttentionInfo, options: dict[str, Any]) -> BoundedAttention:
    """Build the policy and the core under it."""
    policy = build_policy(info, options)
    core = describe(policy.core)
    if core.kind != "core":
        raise OptionError(f"core={policy.core!r} is not a core; cores are {', '.join(list_attentions('core'))}")
    if policy.budgets == "adaptive" and not core.capabilities.mask:
        able = ", ".join(cores_with(["mask", "causal"]))
        raise OptionError(
            f"core={policy.core!r} takes no mask, which budgets='adaptive' needs: in one head the rows of a batch hold "
            f"different numbers of entries; cores that do: {able}"
        )
    return BoundedAttention(info.name, policy, build_core(core, {}))


def _without_own_window(sites: list[Site]) -> list[Site]:
    """Leave out the layers whose cache the library bounds already; `swap_report` names them."""
    chosen = [site for site in sites if not site.note]
    if not chosen:
        raise UnsupportedError(f"every attention layer chosen has a {sites[0].note}; there is nothing to evict")
    return chosen


def _refuse(
    info: AttentionInfo, sites: list[Site], bounded: BoundedAttention | None, options: Mapping[str, Any]
) -> None:
    """Raise `UnsupportedError` naming every layer where `info`, with these options or this policy, cannot stand."""
    core = None if bounded is None else describe(bounded.policy.core)
    problems: dict[str, str] = {}
    for site in sites:
        problem = site.problem(info, core)
        if problem is None and bounded is not None:
            problem = site.policy_problem(bounded.policy)
        if problem is None and info.kind == "mixer":
            problem = site.count_problem(options.get("tokens"))
        if problem is not None:
            problems[site.path] = f"{type(site.module).__name__}: {problem}"
    able = [site for site in sites if site.path not in problems]
    for kind in {type(site): None for site in able}:
        for path, problem in kind.try_together([site for site in able if type(site) is kind], info).items():
            site = next(one for one in able if one.path == path)
            problems[path] = f"{type(site.module).__name__}: {problem}"
    if problems:
        lines = _lines(problems)
        paths = [site.path for site in sites if site.path not in problems]
        hint = f" Choose layers with where=, for example where={_pattern(paths, list(problems))!r}." if paths else ""
        raise UnsupportedError(
            f"{info.name!r} cannot replace the attention in {len(problems)} of {len(sites)} layers:\n"
            + "\n".join(f"  {line}" for line in lines)
            + f"\nNothing was swapped.{hint}",
            lines,
        )


def _lines(problems: dict[str, str]) -> list[str]:
    """A line a problem: the first layer that has it, and how many more do."""
    paths: dict[str, list[str]] = {}
    for path, problem in problems.items():
        paths.setdefault(problem, []).append(path)
    return [
        f"{first}: {problem}{f' (and {len(rest)} more)' if rest else ''}" for problem, (first, *rest) in paths.items()
    ]


def _pattern(paths: list[str], others: list[str]) -> str | list[str]:
    """A pattern that covers `paths` and none of `others`: what they begin or end with; else the paths themselves."""
    first = paths[0].split(".")
    common = 0
    while common < len(first) - 1 and all(p.split(".")[: common + 1] == first[: common + 1] for p in paths):
        common += 1
    begin, end = ".".join([*first[:common], "*"]), f"*.{first[-1]}"
    for pattern in (begin, end):
        if all(matches(path, pattern) for path in paths) and not any(matches(path, pattern) for path in others):
            return pattern
    return paths


@dataclass(frozen=True)
class _Plan:
    """What is put at a layer: the options that make it, its core (None for mixers), and what it keeps of a token."""

    options: dict[str, Any]
    core: Core | BoundedAttention | None
    shape: LayerShape | None = None


def _budget_per_layer(info: AttentionInfo, options: dict[str, Any]) -> tuple[list[Any] | None, dict[str, Any]]:
    """Take a list of budgets out of `options`, which then have the first of them."""
    listed = options.get("budget")
    if info.kind != "eviction" or not isinstance(listed, (list, tuple)):
        return None, options
    if not listed or any(isinstance(one, str) for one in listed):
        raise OptionError(f"budget as a list is numbers, one per swapped layer, not {short(listed)}")
    if options.get("budgets", "uniform") in ("pyramid", "measured"):
        raise OptionError(f"budget lists what each layer gets, which budgets={options['budgets']!r} would decide")
    return list(listed), {**options, "budget": listed[0]}


def _shared_out(
    bounded: BoundedAttention, given: dict[str, Any], sites: Sequence[Site], budgets: list[Any] | None
) -> list[_Plan]:
    """Give every layer its own budget, by which a saved model is swapped again; `budgets` are those listed."""
    if budgets is None:
        policies = share_out(bounded.policy, [site.shape for site in sites])
    elif len(budgets) == len(sites):
        policies = [bounded.policy.changed(budget=budget) for budget in budgets]
    else:
        raise OptionError(f"budget lists {len(budgets)} numbers, and the layers to swap are {len(sites)}")
    plans = []
    asked = {name: value for name, value in given.items() if name not in ("budgets", "profile")}
    for site, policy in zip(sites, policies, strict=True):
        options = {**asked, "budget": policy.budget}
        if policy.budgets != "uniform":
            options["budgets"] = policy.budgets
        plans.append(_Plan(options, replace(bounded, policy=policy), site.shape))
    return plans


def _substitute(
    site: Site,
    info: AttentionInfo,
    options: dict[str, Any],
    plan: _Plan,
    keep_original: bool,
    training: bool,
    init: str,
) -> nn.Module:
    core = plan.core
    if core is not None:
        layer = site.put_bounded(core) if isinstance(core, BoundedAttention) else site.put_core(core)
        layer.training = training  # its children are the host's own, each in its own mode
    else:
        mixer: Any = site.build_mixer(info, options)
        if init == "inherit":
            mixer.inherit(*value_map(site))
        layer = site.put_mixer(mixer).train(training)
    before = {id(p): p.numel() for p in site.module.parameters()}
    after = {id(p): p.numel() for p in layer.parameters()}
    layer.__dict__["attnzoo_swap"] = Swapped(
        info=info,
        options=plan.options,
        host=site.host,
        host_class=type(site.module).__name__,
        original=site.module if keep_original else None,
        parameters_before=sum(before.values()),
        parameters_after=sum(after.values()),
        reused=sum(n for i, n in before.items() if i in after),
        shape=plan.shape,
    )
    return layer


def _put(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put modules in place of others (by `id`), wherever these stand in the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]


def _check_init(info: AttentionInfo, init: str) -> None:
    """Raise `OptionError` unless a method of these options can begin so."""
    check_choice("init", init, INITS)
    if init == "inherit" and not info.capabilities.inherit:
        able = [name for name in list_attentions(kind="mixer") if describe(name).capabilities.inherit]
        raise OptionError(
            f"init='inherit' is for mixers that can begin as a given map over channels, by default {', '.join(able)}; "
            f"{info.name!r} as it is asked for cannot"
        )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
