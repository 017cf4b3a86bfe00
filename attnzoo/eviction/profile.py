"""The profile of a model: how much the attention output of each layer loses when only a share of its entries is kept.

    python -m attnzoo.eviction.profile MODEL TEXT --out FILE

MODEL is transformers:FOLDER_OR_NAME, TEXT a file. The model reads the first `--tokens` tokens of the text once, and
FILE, a small JSON file, serves every swap of that model: ``replace_attention(llm, "h2o", budget=512,
budgets="measured", profile=FILE)``.

Sources: Gulhan et al., BaKlaVa, https://arxiv.org/abs/2502.13176, and XKV: memory by layer, from one profiling pass.

    e_l(share) = min(1, |o' - o|^2 / |o|^2)

where o are the outputs of the last `queries` queries of layer l, all heads together, and o' the same over the `share`
of the entries of each key/value head that got most attention from these queries. A total is shared out by water filling
on these curves, made convex: the next entry goes where it lowers the sum of errors most.

Differs from the papers: BaKlaVa compares the inputs and outputs of the heads, XKV searches for the least accuracy that
is lost; here the loss of the output is measured itself, at the choice of an oracle, so that one profile serves all
policies.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnzoo import files
from attnzoo.checks import check_int
from attnzoo.command import run_script
from attnzoo.errors import AssetError, OptionError, UnsupportedError, short
from attnzoo.eviction.policy import by_group, highest, wide
from attnzoo.eviction.store import Store

if TYPE_CHECKING:
    from attnzoo.eviction.budgets import LayerShape

FORMAT = 1
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
QUERIES = 64
TOKENS = 2048


@dataclass(frozen=True)
class LayerCurve:
    """Errors of one layer.

    Attributes
    ----------
    index
        The layer's place in the cache.
    kv_heads
        Its key/value heads.
    errors
        Relative squared error of the output at each of `Profile.shares`.
    """

    index: int
    kv_heads: int
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Profile:
    """What `profile_layers` measured.

    Attributes
    ----------
    model, digest
        The model's name, and what tells it from others; see `attnzoo.eviction.layer_data.ModelIdentity`.
    tokens
        Tokens of the text: a budget of entries is a share of these.
    text_hash
        SHA-256 of the token ids.
    shares
        Shares of the entries, ascending, at which errors were measured; the last is 1.
    layers
        A curve for each layer that a policy can bound.
    """

    model: str
    digest: str
    tokens: int
    text_hash: str
    shares: tuple[float, ...]
    layers: tuple[LayerCurve, ...]

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        files.write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def of(cls, source: str | Path | Profile | None) -> Profile:
        """Give the profile that a user means by the option ``profile=``.

        Raises
        ------
        AssetError
            If the file cannot be read or is no profile.
        OptionError
            If `source` is neither a path nor a profile.
        """
        if isinstance(source, Profile):
            return source
        if not isinstance(source, (str, Path)):
            raise OptionError(f"profile must be a path or a Profile, not {short(source)}")
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise AssetError(f"the profile {str(source)!r} cannot be read: {why}") from error
        try:
            content = json.loads(text)
            if content.pop("format") != FORMAT:
                raise ValueError(f"the format is not {FORMAT}")
            curves = [LayerCurve(c["index"], c["kv_heads"], tuple(map(float, c["errors"]))) for c in content["layers"]]
            profile = cls(**{**content, "shares": tuple(content["shares"]), "layers": tuple(curves)})
            if not curves or any(len(curve.errors) != len(profile.shares) for curve in curves):
                raise ValueError("there is not an error for each share")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AssetError(
                f"{str(source)!r} is not a profile, or is damaged ({type(error).__name__}: {error}); make one: "
                "python -m attnzoo.eviction.profile MODEL TEXT --out FILE"
            ) from error
        return profile

    def check(self, layers: Sequence[LayerShape]) -> None:
        """Refuse layers of another model.

        Raises
        ------
        OptionError
            If the config, the layers or their key/value heads are others; the message says which.
        """
        curves = {curve.index: curve for curve in self.layers}
        said = f"the profile is of another model ({self.model or 'without a name'}, {len(curves)} layers): "
        again = "; make one of this model: python -m attnzoo.eviction.profile MODEL TEXT --out FILE"
        for layer in layers:
            if layer.index not in curves:
                raise OptionError(f"{said}it has no layer {layer.index}{again}")
            if curves[layer.index].kv_heads != layer.kv_heads:
                heads = curves[layer.index].kv_heads
                raise OptionError(
                    f"{said}its layer {layer.index} has {heads} key/value heads, this one's {layer.kv_heads}{again}"
                )
        for layer in layers:
            digest = "" if layer.model is None else layer.model.digest
            if digest != self.digest:
                raise OptionError(
                    f"{said}the hash of its config is {self.digest[:12]}, this one's {digest[:12]}{again}"
                )

    def share_out(self, mean: float, costs: Sequence[int], indices: Sequence[int], least: float) -> list[float]:
        """Share a total out over layers by water filling.

        Parameters
        ----------
        mean
            What each layer would get if all got the same: a share of the entries.
        costs
            Cost of an entry in each layer.
        indices
            The layers' places in the cache.
        least
            The share that each layer gets at least.

        Returns
        -------
        list of float
            Shares, which together cost what `mean` would.
        """
        curves = {curve.index: curve.errors for curve in self.layers}
        amounts = [least] * len(costs)
        left = (mean - least) * sum(costs)
        steps = []  # (gain per cost, layer, from, to)
        for layer, index in enumerate(indices):
            for start, end, slope in _convex((0.0, *self.shares), (1.0, *curves[index])):
                steps.append((slope / costs[layer], layer, start, end))
        for _, layer, _, end in sorted(steps, key=lambda step: (-step[0], step[2], step[1])):
            more = min(max(end - amounts[layer], 0.0), left / costs[layer])
            amounts[layer] += more
            left -= more * costs[layer]
        return amounts


def _convex(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float, float]]:
    """The lower convex hull of a falling curve: start and end of each piece, and how steeply it falls."""
    hull: list[tuple[float, float]] = []
    for point in zip(x, y, strict=True):
        while len(hull) > 1 and _fall(hull[-2], hull[-1]) <= _fall(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(a[0], b[0], max(_fall(a, b), 0.0)) for a, b in itertools.pairwise(hull)]


def _fall(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])


def profile_layers(model: Any, ids: Sequence[int] | Tensor, *, queries: int = QUERIES) -> Profile:
    """Measure, in one pass over a text, what each layer's attention output loses when entries go.

    Parameters
    ----------
    model
        A causal language model of transformers with its own attention.
    ids
        ``(N,)``: the tokens of the text; as many as the texts that the profile is for.
    queries
        Number of last queries whose outputs are compared.

    Raises
    ------
    UnsupportedError
        If the model is swapped, or no policy can bound its layers.
    OptionError
        If the text has no more tokens than `queries`.
    """
    from attnzoo.eviction.calls import models_with_a_hook
    from attnzoo.hosts import versions
    from attnzoo.hosts.layer_data import identity_of
    from attnzoo.swap import replace_attention, restore_attention, swapped_layers

    check_int("queries", queries, minimum=1)
    tokens = torch.as_tensor(ids).flatten()
    if len(tokens) <= queries:
        raise OptionError(f"a profile needs more than {queries} tokens (queries), the text has {len(tokens)}")
    if swapped_layers(model):
        raise UnsupportedError("a profile is measured on the model's own attention: call restore_attention first")
    core = "softmax" if any(getattr(m, "attn_logit_softcapping", None) for m in model.modules()) else "sdpa"
    held = len(tokens)  # so that nothing is evicted, and the last queries are kept
    replace_attention(model, "snapkv", window=queries, core=core, budget=held, block_size=held)
    try:
        identity = identity_of(next(models_with_a_hook(model)).config)
        last = {"logits_to_keep": 1} if "logits_to_keep" in versions.parameters(type(model).forward) else {}
        with torch.no_grad():
            ids = tokens[None].to(next(model.parameters()).device)
            cache = versions.output_cache(model(input_ids=ids, use_cache=True, **last))
        curves = tuple(_curve(layer.store) for layer in cache.own)
    finally:
        restore_attention(model)
    said = hashlib.sha256(" ".join(map(str, tokens.tolist())).encode()).hexdigest()
    return Profile(identity.name, identity.digest, len(tokens), said, SHARES, curves)


@torch.no_grad()
def _curve(store: Store) -> LayerCurve:
    """Errors of a layer that holds all entries of one row, and the last queries."""
    view = store.view([0])
    values = wide(view.values)  # (1, Hkv, S, Dv)
    attention = by_group(view.window_attention(), view.kv_heads).to(values)  # (1, Hkv, G, w, S)
    mass = attention.sum((2, 3))  # (1, Hkv, S)
    whole = attention @ values[:, :, None]
    errors = []
    for share in SHARES:
        kept = highest(mass, max(1, int(share * mass.shape[-1])))
        left = attention.gather(-1, kept[:, :, None, None].expand(*attention.shape[:-1], -1))
        left = left / left.sum(-1, keepdim=True).clamp_min(1e-30)
        there = values.gather(2, kept[..., None].expand(-1, -1, -1, values.shape[-1]))
        error = (left @ there[:, :, None] - whole).square().sum() / whole.square().sum().clamp_min(1e-30)
        errors.append(min(float(error), 1.0))
    return LayerCurve(store.layer, view.kv_heads, tuple(errors))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    parser = argparse.ArgumentParser(
        prog="python -m attnzoo.eviction.profile", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("model", metavar="MODEL", help="transformers:FOLDER_OR_NAME")
    parser.add_argument("text", metavar="TEXT", type=Path, help="a text file, like the texts that the model will read")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="where the profile goes (JSON)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"read so many of the text at most ({TOKENS})")
    parsed = parser.parse_args(arguments)

    def body() -> int:
        from transformers import AutoTokenizer

        from attnzoo.models import load_model, split

        check_int("tokens", parsed.tokens, minimum=1)
        host, name = split(parsed.model)
        if host != "transformers":
            raise OptionError(f"a profile is of a language model of transformers, not {parsed.model!r}")
        text = parsed.text.read_text(encoding="utf-8")
        model: Any = load_model(parsed.model)
        ids = AutoTokenizer.from_pretrained(name)(text)["input_ids"][: parsed.tokens]
        profile = profile_layers(model.eval(), ids)
        profile.save(parsed.out)
        print(f"{parsed.out}: {len(profile.layers)} layers of {profile.model}, measured on {profile.tokens:,} tokens")
        return 0

    return run_script(body)


if __name__ == "__main__":
    sys.exit(main())
