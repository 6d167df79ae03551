"""What a step takes, launched as a whole or as recorded parts: estimated from a model's shape, a kind of GPU, a step.

Never measured by the engine itself: two engines on the same kind of GPU would then choose differently for the same
requests, and tokens would not repeat. The constants are of an H100 (2026-11-28); how fast the memory is, the GPU says.
Knows no tensor.
"""

from dataclasses import dataclass

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.layers.base import Weights

# Launching a layer takes this process 0.87 (Qwen3-0.6B) to 0.97 ms (Llama-3.1-8B in FP8), whatever is in the step, and
# 1.2 (Qwen3-30B-A3B) to 1.5 (Qwen3-0.6B) on the hosts of two H200.
_LAUNCH_MS_PER_LAYER = 1.1
# Of a recorded layer, for its kernels one after the other: a token of Qwen3-0.6B takes 0.88 ms, of it 0.4 by its bytes.
_LEAST_MS_PER_LAYER = 0.04
# Of what the memory could give: Llama-3.1-8B reads 16 GB for a token in 4.15 ms (H200, 4.8 TB/s) and 5.4 (H100, 3.35).
_READ_SHARE = 0.8
_H100_BYTES_PER_MS = 2.7e9
# Of a prompt, by the bytes of the weights, each of which a token is multiplied with once: 512 and 2,048 tokens of
# Llama-3.1-8B in bfloat16 take 12 and 49 ms; by the layers: of Qwen3-0.6B 2.5 and 5.5.
_TOKEN_BYTES_PER_MS, _TOKEN_MS_PER_LAYER = 6.8e11, 5e-5
# Of a prompt, by the weights of the experts that a token goes through, in bfloat16 or MXFP4: 16,384 tokens take
# Qwen3-30B-A3B 220 ms and gpt-oss-20b 237 (one H200, 2026-12-01).
_EXPERT_WEIGHTS_PER_MS = 2.2e11
# Of computed tokens in front of a chunk, which one program reads from the first to the last; not measured.
_CONTEXT_MS_PER_LAYER = 1.6e-5


def bytes_per_ms(memory_clock_khz: int, bus_bits: int) -> float:
    """How fast a GPU reads weights, by its memory, which moves two bits a clock and line; 0: it does not say."""
    return memory_clock_khz * 2 * bus_bits / 8 * _READ_SHARE or _H100_BYTES_PER_MS


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Estimates for one model on one kind of GPU.

    Attributes:
        num_layers: of the model.
        weights: of its layers.
        kv_token_bytes: KV of one token.
        bytes_per_ms: that the GPU reads.
    """

    num_layers: int
    weights: Weights
    kv_token_bytes: int
    bytes_per_ms: float = _H100_BYTES_PER_MS

    @property
    def launch_ms(self) -> float:
        """Until a step is launched as a whole; the GPU waits, unless it has more to do."""
        return self.num_layers * _LAUNCH_MS_PER_LAYER

    def parts_ms(self, arrays: StepArrays) -> float:
        """What the recorded parts of a step take the GPU: the single tokens, and each prompt or chunk by itself."""
        first = arrays.num_singles
        counts, contexts = arrays.counts[first:], int(arrays.starts[first:].sum())
        prompts = sum(map(self._prompt_ms, counts.tolist())) + contexts * self.num_layers * _CONTEXT_MS_PER_LAYER
        if not first:
            return prompts
        return prompts + self._read_ms(first) + int(arrays.single_lens.sum()) * self.kv_token_bytes / self.bytes_per_ms

    def _prompt_ms(self, num_tokens: int) -> float:
        """Weights are read while others are multiplied with."""
        return max(self._read_ms(num_tokens), num_tokens * self._token_ms)

    def _read_ms(self, num_tokens: int) -> float:
        """The least that so many tokens take together."""
        return max(self.weights.read_by(num_tokens) / self.bytes_per_ms, self.num_layers * _LEAST_MS_PER_LAYER)

    @property
    def _token_ms(self) -> float:
        """What each token of a long prompt takes."""
        weights = self.weights
        experts = weights.chosen * weights.num_expert_weights / _EXPERT_WEIGHTS_PER_MS
        return weights.num_bytes / _TOKEN_BYTES_PER_MS + experts + self.num_layers * _TOKEN_MS_PER_LAYER
