"""The blocks of a prompt, named as engines name them, without an engine.

Engines of one pool have blocks of one size, those of another pool perhaps of another; a prompt is hashed once for each
size that is asked for.
"""

from array import array
from collections.abc import Mapping, Sequence

from deployments.engine.scheduling.block_hash import hash_block, hash_chain, root_of


class PromptHashes:
    """Chained hashes of a prompt's full blocks, for any size of blocks.

    Args:
        token_ids: the prompt.
        position_offset: of its rotary embedding, see `engine/scheduling/positions.py`; 0 for nearly all models.
        cache_salt: see `GenerateRequest`.
        gathers: likewise.
    """

    def __init__(
        self, token_ids: Sequence[int], position_offset: int = 0, cache_salt: str = "", *, gathers: bool = False
    ) -> None:
        self.num_tokens = len(token_ids)
        self.meeting_key = root_of(0, cache_salt) if gathers else None
        self._token_ids = array("I", token_ids)
        self._root = root_of(position_offset, cache_salt)
        self._by_size: dict[int, list[bytes]] = {}

    @classmethod
    def known(
        cls, num_tokens: int, by_size: Mapping[int, list[bytes]], beginning: Sequence[int] = ()
    ) -> "PromptHashes":
        """Of a prompt of which the hashes are known and the tokens are not: of a trace.

        Args:
            num_tokens: of the prompt.
            by_size: the hashes, by size of blocks.
            beginning: what tells prompts apart that have no hash.
        """
        prompt = cls(beginning)
        prompt.num_tokens = num_tokens
        prompt._by_size = dict(by_size)
        return prompt

    def of(self, block_size: int) -> list[bytes]:
        """Hashes of all full blocks of that size, from the first."""
        if block_size not in self._by_size:
            self._by_size[block_size] = hash_chain(self._root, self._token_ids, block_size)
        return self._by_size[block_size]

    def usable(self, block_size: int) -> int:
        """Leading blocks that an engine would take from its cache: it always computes the last token itself."""
        return max(0, self.num_tokens - 1) // block_size

    def key_after(self, num_tokens: int, block_size: int | None) -> bytes:
        """What tells this prompt from others that begin with the same so many tokens.

        Args:
            num_tokens: whole blocks.
            block_size: of these blocks; None: nothing is known of any.
        """
        if block_size is None or not (chain := self.of(block_size)):
            return hash_block(self._root, self._token_ids)
        return chain[min(num_tokens // block_size, len(chain) - 1)]
