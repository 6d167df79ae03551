"""What a step takes, launched as a whole or as recorded parts, estimated from the model's shape and the step alone.

Never measured by the engine itself: two engines would then choose differently for the same requests, and tokens would
not repeat. The constants are of an H100 (2026-11-28). Knows no tensor and no model.
"""

from dataclasses import dataclass

from deployments.engine.batch.arrays import StepArrays

# Launching a layer takes this process 0.87 ms (Qwen3-0.6B) to 0.97 (Llama-3.1-8B in FP8), whatever is in the step.
_LAUNCH_MS_PER_LAYER = 0.85
# Of a recorded layer, for its kernels one after the other: a token of Qwen3-0.6B takes 0.88 ms, of it 0.4 by its bytes.
_LEAST_MS_PER_LAYER = 0.04
_BYTES_PER_MS = 2.7e9
# Of a prompt, by the bytes of the weights, each of which a token is multiplied with once: 512 and 2,048 tokens of
# Llama-3.1-8B in bfloat16 take 12 and 49 ms; by the layers: of Qwen3-0.6B 2.5 and 5.5.
_TOKEN_BYTES_PER_MS, _TOKEN_MS_PER_LAYER = 6.8e11, 5e-5
# Of computed tokens in front of a chunk, which one program reads from the first to the last; not measured.
_CONTEXT_MS_PER_LAYER = 1.6e-5


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Estimates for one model.

    Attributes:
        num_layers: of the model.
        weight_bytes: that a step reads of it.
        kv_token_bytes: KV of one token.
    """

    num_layers: int
    weight_bytes: int
    kv_token_bytes: int

    @property
    def launch_ms(self) -> float:
        """Until a step is launched as a whole; the GPU waits, unless it has more to do."""
        return self.num_layers * _LAUNCH_MS_PER_LAYER

    def parts_ms(self, arrays: StepArrays) -> float:
        """What the recorded parts of a step take the GPU: the single tokens, and each prompt or chunk by itself."""
        least = max(self.weight_bytes / _BYTES_PER_MS, self.num_layers * _LEAST_MS_PER_LAYER)
        first = arrays.num_singles
        contexts, num_tokens = int(arrays.starts[first:].sum()), int(arrays.counts[first:].sum())
        per_token = self.weight_bytes / _TOKEN_BYTES_PER_MS + self.num_layers * _TOKEN_MS_PER_LAYER
        prompts = (arrays.num_runs - first) * least + num_tokens * per_token
        prompts += contexts * self.num_layers * _CONTEXT_MS_PER_LAYER
        if not first:
            return prompts
        return prompts + least + int(arrays.single_lens.sum()) * self.kv_token_bytes / _BYTES_PER_MS
