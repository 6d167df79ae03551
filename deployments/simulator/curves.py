"""What an engine takes for a step, and a hand-off: measured, or given."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Curves:
    """Of one kind of engine.

    Attributes:
        step_s: each step.
        token_s: each prompt token in it.
        sequence_s: each sequence that draws a token in it.
        context_s: each token of their KV.
        handoff_s: until the last chunk of a hand-off has arrived, whatever its size.
        handoff_token_s: and for each token of that chunk.
        tier_token_s: until a token's KV has come from the shared tier.
        max_num_batched_tokens: of a step.
        max_num_seqs: at once.
        num_kv_tokens: of the KV pool.
    """

    step_s: float
    token_s: float
    sequence_s: float
    context_s: float
    handoff_s: float = 0.010
    handoff_token_s: float = 7e-7
    tier_token_s: float = 7.6e-6
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    num_kv_tokens: int = 450_000

    def slower(self, factor: float) -> "Curves":
        """An engine that takes so many times as long for each step."""
        return replace(
            self,
            step_s=self.step_s * factor,
            token_s=self.token_s * factor,
            sequence_s=self.sequence_s * factor,
            context_s=self.context_s * factor,
        )


# Llama-3.1-8B on an H100 (docs/measured.md, 2026-11-27 and 28): steps of 1, 32 and 128 sequences of about 256 tokens
# take 5.41, 6.44 and 8.46 ms, prompts of 512 and 8,192 tokens 17.5 and 203.8 ms; what is behind the first token of a
# hand-off takes 10 ms, bytes 80 GiB/s at 128 KiB of KV per token. Not measured: that KV is read at 2.5 TB/s, 52 ns per
# token.
LLAMA_8B_H100 = Curves(step_s=0.0055, token_s=2.42e-5, sequence_s=1.0e-5, context_s=5.2e-8, handoff_token_s=1.5e-6)
