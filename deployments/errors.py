"""Every error that crosses a module border. Only `api/failures.py` turns them into status codes.

Each passes all that it was made of to its base, so that it survives pickling between actors.
"""

import asyncio


def was_cancelled() -> bool:
    """In a handler of `CancelledError`: whether this very task was cancelled, and not the call that it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def brief(error: BaseException) -> str:
    """An error in one line: Ray's, gloo's and CUDA's run over many."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}" if lines else type(error).__name__


class KvRelayError(Exception):
    """Base of all errors of this project."""


class InvalidRequestError(KvRelayError):
    """The request is wrong in itself; retrying it unchanged cannot help.

    Args:
        message: names the value and the bound.
        param: the field at fault, as the API calls it.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class RequestTooLargeError(InvalidRequestError):
    """The request can never fit this engine; the message gives the numbers."""


def is_hopeless(error: BaseException) -> bool:
    """Whether a request failed by itself alone: no other engine can do better."""
    return isinstance(error, InvalidRequestError) and not isinstance(error, RequestTooLargeError)


class UnsupportedModelError(KvRelayError):
    """The model cannot be served, or not with these settings; the message names what is at fault."""


class LimitsError(UnsupportedModelError, ValueError):
    """An engine's limits cannot be met by what is there; the message names the setting, its value and the bound."""


class LayoutMismatchError(KvRelayError):
    """Two engines disagree on what a KV block is; handing one over would give wrong tokens."""


class ParityError(KvRelayError):
    """A prompt that was handed over is continued with other tokens; the message gives both."""


class TransferError(KvRelayError):
    """A hand-off did not complete: the peer died, timed out, or dropped the chunk."""


class TierError(KvRelayError):
    """KV could not be had from the shared tier, or not soon enough; whoever wanted it computes it."""


class PinError(KvRelayError):
    """The driver does not pin memory of the host for a GPU."""


class OverloadedError(KvRelayError):
    """Not taken, since too much is queued; the same request can succeed later.

    Args:
        message: gives the numbers.
        retry_after_s: when it could, if nobody else came in between.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class StartingError(KvRelayError):
    """Not served, since nobody is there who could, and whoever is being started did not come in time.

    Args:
        message: names what is being started, and the bound.
        retry_after_s: when the same request could succeed, by what a start took before.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class SlowReaderError(KvRelayError):
    """The client did not read its tokens; the message gives the bound."""


class EngineDeadError(KvRelayError):
    """The engine process or its loop ended; the replica will be replaced."""
