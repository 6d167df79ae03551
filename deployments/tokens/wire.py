"""Token outputs as bytes: frames of a length and a MessagePack array, after a key that the receiver has to see first.

Both ends of a channel use it. No pickle: whoever reaches the port and guesses the key can send tokens, not run code.
"""

from collections.abc import Iterator, Sequence

import msgspec

from deployments.messages import TokenOutput

KEY_BYTES = 32
# A step of an engine is some kilobytes; what announces more is not one of ours.
MAX_FRAME_BYTES = 64 * 2**20
_LENGTH_BYTES = 4

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[TokenOutput])


class WireError(Exception):
    """The bytes are not what `encode` makes."""


def encode(outputs: Sequence[TokenOutput]) -> bytes:
    """One frame."""
    body = _encoder.encode(outputs)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameReader:
    """Takes bytes as they arrive, however they are cut, and gives back whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[list[TokenOutput]]:
        """Yield the frames that are complete now.

        Raises:
            WireError: a frame is too long or no list of token outputs; nothing after it can be read.
        """
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            length = int.from_bytes(self._buffer[start:body], "big")
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a frame of {length} bytes; {MAX_FRAME_BYTES} are allowed")
            if len(self._buffer) < body + length:
                break
            start = body + length
            with memoryview(self._buffer) as view:
                try:
                    outputs = _decoder.decode(view[body:start])
                except msgspec.MsgspecError as error:
                    raise WireError(f"a frame that is no list of token outputs: {error}") from None
            yield outputs
        del self._buffer[:start]
