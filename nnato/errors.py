"""What can go wrong, one class per cause. Every message names the thing and the remedy."""

from collections.abc import Iterable
from difflib import get_close_matches


class NnatoError(Exception):
    """Base of all errors nnato raises on purpose."""


class SiteError(NnatoError):
    """A residual site or a (source, target) pair that the model does not have."""


class ModelError(NnatoError):
    """A model that cannot be found, loaded or understood."""


class TextError(NnatoError):
    """A text source that cannot be found or read, or holds too little text."""


class ActivationError(NnatoError):
    """Activations that are not finite, or not of the expected shape."""


class MomentsError(NnatoError):
    """Moments that do not fit the request: of another model, width, site or run."""


class OperatorError(NnatoError):
    """An operator that does not fit the model, or an intervention nobody knows."""


class DictionaryError(NnatoError):
    """A sparse autoencoder that cannot be found or read, or does not belong to the model or site."""


class PositionError(NnatoError):
    """Positions outside the sequence, or more of them than there are tokens."""


class FileFormatError(NnatoError):
    """A file that is truncated, foreign, of a future schema, or otherwise unreadable."""


class OutputError(NnatoError):
    """A place that cannot be written to."""


class UnwritableError(OutputError):
    """A folder for results that cannot be made or written to, as found before work starts: wrong input, no failure."""


class RemoteError(NnatoError):
    """A job on a server that could not be sent, failed there, or whose answer cannot be had.

    Attributes:
        job: Its id, if it has one.
        transient: Whether the same job may succeed when it is sent again.
    """

    def __init__(self, message: str, job: str | None = None, transient: bool = False) -> None:
        super().__init__(message)
        self.job, self.transient = job, transient


class ClusterError(NnatoError):
    """A cluster that is not there, too small, or loses its workers."""


class MissingExtraError(NnatoError):
    """A part of nnato that needs a package which is not installed."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: ` (did you mean …?)` if there is a similar one, else nothing."""
    close = get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""
