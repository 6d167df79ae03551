"""Short messages between the two ends of a link, over a TCP connection of their own.

Behind the last chunk of a hand-off the source's word that it is complete is all that is on the way. Here it takes 0.1
ms, as a call through Ray 1 to 5. Knows nothing of Ray or of KV.
"""

import socket
from contextlib import suppress
from threading import Lock
from time import monotonic

_END = b"\n"
# A first token with the twenty likeliest ones beside it takes some hundred.
_MAX_BYTES = 4096
# A stranger who says nothing holds up the one that is waited for no longer.
_INTRODUCTION_S = 1.0
# The systems of both ends ask each other after 4 s of silence, every 2 s, and end a line that does not answer, or what
# is said, for 10 s. Ray has lines of its own, and hears nothing of it.
_KEEPALIVE = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}


class Line:
    """One end. `hear` comes from one thread, `say` and `close` from any."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._heard = b""
        self._saying = Lock()

    def say(self, message: str) -> None:
        """Send a message without line breaks; OSError if the other end is gone."""
        with self._saying:
            self._connection.sendall(message.encode() + _END)

    def hear(self, timeout_s: float | None = None) -> str | None:
        """The next message; None: none will come, one of the ends is closed. TimeoutError at the latest."""
        deadline = None if timeout_s is None else monotonic() + timeout_s
        while _END not in self._heard:
            if len(self._heard) > _MAX_BYTES:
                return None
            try:
                self._connection.settimeout(None if deadline is None else max(1e-3, deadline - monotonic()))
                part = self._connection.recv(_MAX_BYTES)
            except OSError as error:
                # A path that is gone ends in a TimeoutError of the system's, which has a number.
                if isinstance(error, TimeoutError) and error.errno is None:
                    raise TimeoutError(f"no word from the other end after {timeout_s} s") from None
                return None
            if not part:
                return None
            self._heard += part
        message, _, self._heard = self._heard.partition(_END)
        return message.decode(errors="replace")

    def close(self) -> None:
        """End `hear` on both ends. Idempotent."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class LineHost:
    """Where one line begins: waits for the end that knows the secret.

    Args:
        host: address of this machine's interface that the other end can reach.
        secret: which the other end was told in private; whoever does not say it is hung up on.
    """

    def __init__(self, host: str, secret: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family)
        self._secret = secret
        self.address: tuple[str, int] = (host, self._server.getsockname()[1])

    def wait(self, timeout_s: float) -> Line:
        """The line, once the other end has called; TimeoutError at the latest."""
        deadline = monotonic() + timeout_s
        while (left_s := deadline - monotonic()) > 0:
            self._server.settimeout(left_s)
            line = Line(_at_once(self._server.accept()[0]))
            with suppress(TimeoutError):
                if line.hear(min(_INTRODUCTION_S, left_s)) == self._secret:
                    return line
            line.close()
        raise TimeoutError(f"nobody who knows the secret has called within {timeout_s} s")

    def __enter__(self) -> "LineHost":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()


def call(address: tuple[str, int], secret: str, timeout_s: float) -> Line:
    """Reach the end that waits at this address; OSError if nobody does."""
    line = Line(_at_once(socket.create_connection(address, timeout_s)))
    line.say(secret)
    return line


def _at_once(connection: socket.socket) -> socket.socket:
    """Messages leave at once, and a line over which nothing comes any more ends, though both processes live."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:  # Linux has all of them
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
