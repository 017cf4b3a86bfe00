"""The profile of a model, as `attnzoo.eviction.profile` measures it, and how a budget is shared out by it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo import files
from attnzoo.errors import AssetError, OptionError, short

if TYPE_CHECKING:
    from attnzoo.eviction.budgets import LayerShape

FORMAT = 1


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
