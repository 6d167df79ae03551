"""A router names blocks as the engines do, without an engine."""

import subprocess
import sys

import hypothesis.strategies as st
from hypothesis import given, settings

from deployments.engine.scheduling.block_manager import BlockManager
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.messages import GenerateRequest, SamplingParams
from deployments.routing.hashes import PromptHashes


def computed(manager: BlockManager, tokens: list[int], position_offset: int, salt: str) -> Sequence:
    request = GenerateRequest("r", tuple(tokens), SamplingParams(max_tokens=1), cache_salt=salt)
    sequence = Sequence(request, Role.EXPORT, 0.0, position_offset=position_offset)
    assert manager.admit(sequence)
    sequence.receive(len(tokens))
    manager.publish(sequence)
    return sequence


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40),
    st.integers(1, 9),
    st.sampled_from([0, 4096]),
    st.sampled_from(["", "tenant"]),
)
def test_a_prompt_has_the_blocks_that_an_engine_publishes_and_would_find(
    tokens: list[int], block_size: int, position_offset: int, salt: str
) -> None:
    manager, prompt = BlockManager(64, block_size), PromptHashes(tokens, position_offset, salt)
    sequence = computed(manager, tokens, position_offset, salt)
    assert prompt.of(block_size) == sequence.block_hashes == list(manager.cache_log.held)
    again = Sequence(sequence.request, Role.EXPORT, 0.0, position_offset=position_offset)
    assert prompt.usable(block_size) == manager.num_cached_prefix_blocks(again)


def test_sizes_of_blocks_do_not_mix() -> None:
    prompt = PromptHashes(range(64))
    assert len(prompt.of(16)) == 4
    assert len(prompt.of(64)) == 1
    assert not set(prompt.of(16)) & set(prompt.of(64))


def test_prompts_with_one_beginning_are_told_apart_by_what_follows() -> None:
    first, second = PromptHashes([*range(32), 1, 1, 1, 1]), PromptHashes([*range(32), 2, 2, 2, 2])
    assert first.key_after(16, 16) == second.key_after(16, 16), "their second block is the same"
    assert first.key_after(32, 4) != second.key_after(32, 4)
    short, other = PromptHashes([1, 2]), PromptHashes([1, 3])
    assert short.key_after(0, 16) != other.key_after(0, 16), "no block is full, and they differ"
    assert short.key_after(0, None) != other.key_after(0, None)


def test_routing_needs_neither_torch_nor_ray() -> None:
    check = (
        "import sys; import deployments.routing.router; "
        "assert not {'torch', 'ray', 'starlette', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
