"""The errors that attnzoo raises: every one is an `AttnZooError`, which is a `ValueError`."""

from collections.abc import Sequence


class AttnZooError(ValueError):
    """Base of all errors raised by attnzoo."""


class UnknownNameError(AttnZooError):
    """A name that is not registered: the message suggests the closest names."""


class OptionError(AttnZooError):
    """An option that does not exist, or a value that it cannot take."""


class ShapeError(AttnZooError):
    """Tensors whose shapes do not fit together: the message gives both."""


class UnsupportedError(AttnZooError):
    """Something that a method does not support: the message names it, and nothing was changed or computed.

    `reasons` are those of a refused swap, each with the first layer that has it.
    """

    def __init__(self, message: str, reasons: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.reasons = tuple(reasons)


class SwapError(AttnZooError):
    """A swap or restore that is not possible: the model is unchanged."""


class WeightsError(AttnZooError):
    """Weights that do not match a model: the message says what to do, and the model is unchanged."""


class MissingExtraError(AttnZooError):
    """A package that is not installed: the message gives the install line."""


class AssetError(AttnZooError):
    """A data set or weight file that could not be fetched completely: nothing is left behind."""


class ConfigError(AttnZooError):
    """A config that does not fit its schema."""


class DataError(AttnZooError):
    """Images or annotations that cannot be used: the message names the file."""


class RunError(AttnZooError):
    """A run that cannot continue: finished work is kept."""


class TrainingError(RunError):
    """A training that cannot continue, or a checkpoint that cannot be used: the message says where and what is left."""


def short(value: object, limit: int = 60) -> str:
    """Give the repr of a user's argument, or the name of its type if the repr is long (a model, a tensor)."""
    try:
        said = repr(value)
    except Exception:  # a repr of someone else's
        said = ""
    if said and len(said) <= limit and "\n" not in said:
        return said
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
