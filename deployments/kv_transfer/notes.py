"""What a source says of a part that is complete, in one word of a line. Knows no tensors, links or Ray."""

import base64

import msgspec

from deployments.messages import ChunkReady, DrawnToken


class Note(msgspec.Struct, frozen=True, array_like=True):
    """A chunk that is complete, or some layers of one.

    Attributes:
        index: as all up to `layers` it is that of `ChunkReady`.
        num_parts: that the chunk comes in.
        tensor_blocks: that the chunk's tensor has: what groups of layers hold of its blocks, behind each other.
        offset: of the chunk's first byte in memory that other processes can map; None: it is not there.
    """

    index: int
    start_block: int
    num_blocks: int
    is_last: bool
    first_token: DrawnToken | None
    num_cached_tokens: int
    layers: tuple[int, int] | None
    num_parts: int
    tensor_blocks: int
    offset: int | None

    @classmethod
    def of(cls, chunk: ChunkReady, num_parts: int, tensor_blocks: int, offset: int | None) -> "Note":
        """Of a part."""
        return cls(
            chunk.index,
            chunk.start_block,
            chunk.num_blocks,
            chunk.is_last,
            chunk.first_token,
            chunk.num_cached_tokens,
            chunk.layers,
            num_parts,
            tensor_blocks,
            offset,
        )

    @property
    def chunk(self) -> ChunkReady:
        """What it is, without the request."""
        return ChunkReady(
            "",
            self.index,
            self.start_block,
            self.num_blocks,
            self.is_last,
            self.first_token,
            self.num_cached_tokens,
            self.layers,
        )


def encode(note: Note) -> str:
    # No JSON: it knows no infinite logprobs. No pickle: whoever reaches a line's port shall not run code.
    return base64.b64encode(msgspec.msgpack.encode(note)).decode()


def decode(text: str) -> Note:
    """Raises `msgspec.DecodeError` if it is none."""
    return msgspec.msgpack.decode(base64.b64decode(text), type=Note)
