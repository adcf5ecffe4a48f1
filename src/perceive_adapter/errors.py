"""Typed exceptions. Every message says what was given, what was expected and the remedy."""

__all__ = [
    "AdapterMismatchError",
    "AlreadyWrappedError",
    "BackboneError",
    "CheckpointError",
    "CompiledBackboneError",
    "ConfigError",
    "ImageError",
    "ImageRangeWarning",
    "LossInputError",
    "MissingDependencyError",
    "PerceiveError",
    "PerceptionError",
    "SiteError",
    "TrainingError",
    "UnseenTaskWarning",
    "UntrainedPerceiverWarning",
]


class PerceiveError(Exception):
    """Base of every exception that this package raises on purpose."""


class ConfigError(PerceiveError, ValueError):
    """An argument or a configuration field has a value that cannot work."""


class BackboneError(PerceiveError, ValueError):
    """The backbone cannot be run, probed or hooked as it was given."""


class CompiledBackboneError(BackboneError):
    """The backbone is already compiled or scripted, so hooks added now would be ignored."""


class AlreadyWrappedError(BackboneError):
    """The backbone already carries the hooks of a prompt injector."""


class SiteError(PerceiveError, ValueError):
    """No injection site matches, or a site's layout cannot be told."""


class PerceptionError(PerceiveError, RuntimeError):
    """The perception is missing, stale, or does not fit the batch or the adapter."""


class ImageError(PerceiveError, ValueError):
    """An image has a shape, dtype, mode or value that is not supported."""


class LossInputError(PerceiveError, ValueError):
    """The tensors given to a loss do not fit each other."""


class CheckpointError(PerceiveError, ValueError):
    """A saved adapter or perceiver is missing, damaged, or of an unknown format."""


class AdapterMismatchError(CheckpointError):
    """A saved adapter is sound but belongs to another backbone or perceiver."""


class TrainingError(PerceiveError, RuntimeError):
    """Training cannot go on."""


class MissingDependencyError(PerceiveError, ImportError):
    """An optional dependency is needed and not installed."""


class ImageRangeWarning(UserWarning):
    """An image has the values of images in [-1, 1]."""


class UntrainedPerceiverWarning(UserWarning):
    """A score was asked of a perceiver whose tier prompts were never trained."""


class UnseenTaskWarning(UserWarning):
    """An adapter will work on every image, since the perceiver does not see what a task has."""
