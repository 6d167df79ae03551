"""Short sleeps of one thread, for those that poll what a GPU does."""

import ctypes

_PR_SET_TIMERSLACK = 29  # linux/prctl.h


def nap_exactly() -> None:
    """Have short sleeps of the calling thread end when they are over. Linux takes 50 us more, to wake several at once.

    Of threads that it starts from then on as well. Where the system knows no such thing they stay as they are.
    """
    try:
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)
    except (AttributeError, OSError):  # not Linux
        return
