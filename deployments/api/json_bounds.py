"""How much a JSON text may hold before it is read: the time that reading takes goes by values, not by bytes.

Knows nothing of what stands in it; `calls.py` asks before it reads.
"""

from deployments.errors import InvalidRequestError

# Reading 4 MiB stops all streams of an ingress for 5 ms if they are one text, for 30 if they are token ids, and for 500
# to 900 if they are lists of nothing, which Python's collector goes through again and again (orjson 3.13, Python 3.11,
# CPU time on a shared core, 2026-11-28). With so many lists and objects it is 20.
MAX_CONTAINERS = 2**16
_NO_MARKS = bytes(sorted(set(range(256)) - set(b'[{"')))


def check_containers(data: bytes) -> None:
    """Let a text with few lists and objects pass; brackets in strings are not counted.

    Raises:
        InvalidRequestError: there are too many.
    """
    if _num_opened(data) <= MAX_CONTAINERS:
        return
    marks = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_MARKS)
    # Without escaped ones each quotation mark begins or ends a string: every other piece is outside of them. Two in a
    # row change nothing for what follows.
    pieces = marks.replace(b'""', b"").split(b'"')
    if _num_opened(b"".join(pieces[::2])) > MAX_CONTAINERS:
        raise InvalidRequestError(f"the body holds more than {MAX_CONTAINERS} lists and objects")


def _num_opened(data: bytes) -> int:
    return data.count(b"[") + data.count(b"{")
