"""Behind what chunks are copied on a GPU, whose streams keep no order among each other; fences are numbers here."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from deployments.engine.kv.copies import KVCopies
from tests.engine.driving import Transcript, build_engine, greedy, prefill_all, run
from tests.engine.families import load, random_prompt

PROMPT = random_prompt(57, seed=57)


class Order:
    """Fences that were asked for, and those that copies waited for; nothing is copied later than asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_fences = 0
        self.out: list[object] = []
        self.into: list[object] = []
        export, import_ = KVCopies.export, KVCopies.import_

        def noted_fence(_: KVCopies) -> int:
            self.num_fences += 1
            return self.num_fences

        def noted_export(copies: KVCopies, ids: list[int], chunk: Tensor, after: object, first_layer: int = 0) -> None:
            self.out.append(after)
            export(copies, ids, chunk, None, first_layer)

        def noted_import(
            copies: KVCopies,
            parts: Iterable[tuple[list[int], Tensor]],
            layers: tuple[int, int] | None = None,
            after: torch.cuda.Event | None = None,
        ) -> None:
            self.into.append(after)
            import_(copies, parts, layers)

        monkeypatch.setattr(KVCopies, "fence", noted_fence)
        monkeypatch.setattr(KVCopies, "export", noted_export)
        monkeypatch.setattr(KVCopies, "import_", noted_import)


def test_what_was_found_is_copied_out_behind_whoever_may_still_compute_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine(load("llama"), max_num_batched_tokens=16, num_blocks=128)
    prefill_all(engine, greedy("a", PROMPT, 2))
    order = Order(monkeypatch)
    (chunk, _), *_ = prefill_all(engine, greedy("b", PROMPT, 2))
    assert chunk.start_block == 0 and engine.stats().prefix_hit_tokens > 0
    assert order.out[0] == 1 == order.num_fences, "asked for once, when it had been found"


def test_chunks_come_in_behind_what_was_launched_when_their_blocks_were_set_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefill, decode = (build_engine(load("llama"), max_num_batched_tokens=16, num_blocks=128) for _ in range(2))
    order = Order(monkeypatch)
    for number, name in enumerate(("a", "b"), 1):
        decode.add(greedy(name, random_prompt(57, seed=number), 3), remote_threshold=0)
        decode.step()
    assert order.num_fences == 2
    transcript = Transcript()
    for seed, name in ((2, "b"), (1, "a")):
        order.into.clear()
        for chunk, tensor in prefill_all(prefill, greedy(name, random_prompt(57, seed=seed), 3)):
            transcript.note(decode.import_chunk(chunk, tensor))
        assert set(order.into) == {seed}
    assert [len(tokens) for tokens in run(decode, transcript).tokens.values()] == [3, 3]
