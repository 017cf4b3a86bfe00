"""Hosts: one file per library. Each finds the attention layers of a model and calls a substitute as the library would.

A host has one function, ``find(model, layers, options) -> list[Site]``: `layers` maps paths to the host's own modules
(what an earlier swap replaced stands in its place), and `options` holds what the user said about the host (see
`HostOptions`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from torch import nn

from attnzoo.hosts.site import NOBODY, HostOptions, RefusedSite, Site, looks_like_attention, swapped_record
from attnzoo.hosts.standing import attends

__all__ = ["HostOptions", "RefusedSite", "Site", "find_sites"]

# the package whose classes give a host away -> the file that knows it, most particular first
_HOSTS = {
    "mmdet": "attnzoo.hosts.mmdet",
    "timm": "attnzoo.hosts.timm",
    "transformers": "attnzoo.hosts.transformers",
    "torch": "attnzoo.hosts.torch",
}


def find_sites(model: nn.Module, layers: Mapping[str, nn.Module], options: HostOptions) -> list[Site]:
    """Find every attention layer of `model`, in the model's order.

    A layer that no host knows is a site too, one that refuses, if it is attention by its class's name or by what its
    class calls (see `attnzoo.hosts.standing`).
    """
    packages = {base.__module__.partition(".")[0] for m in layers.values() for base in type(m).__mro__}
    sites: dict[str, Site] = {}
    for package, module in _HOSTS.items():
        if package in packages:
            for site in importlib.import_module(module).find(model, layers, options):
                sites.setdefault(site.path, site)
    found = set(sites) | {path for path, layer in layers.items() if swapped_record(layer) is not None}
    for path, layer in layers.items():
        if path not in sites and looks_like_attention(layer) and not _related(path, found):
            sites[path] = RefusedSite(path, layer, "unknown", NOBODY)
    found |= set(sites)
    for path, layer in layers.items():
        if path not in found and not _related(path, found) and attends(layer):
            library = type(layer).__module__.partition(".")[0]
            sites[path] = RefusedSite(path, layer, library, f"it computes attention, but {NOBODY}", standing=True)
    order = {path: i for i, path in enumerate(layers)}
    return sorted(sites.values(), key=lambda site: order[site.path])


def _related(path: str, found: set[str]) -> bool:
    """Whether `path` lies inside a layer that was found, or holds one."""
    return any(f.startswith(f"{path}.") or path.startswith(f"{f}.") or not path for f in found)
