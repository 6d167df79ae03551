"""A call: what `calls.py` makes of a request's body, and all that is needed to serve and answer it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.api.choices import TextRules
from deployments.api.common_fields import ServiceTier
from deployments.api.harmony import HarmonyRules
from deployments.api.reasoning.parser import ThoughtRules
from deployments.api.tools.rules import ToolRules
from deployments.messages import GenerateRequest


@dataclass(frozen=True, slots=True)
class Call:
    """A request that can be served as it stands.

    Attributes:
        call_id: the id of the response; its requests' ids begin with it.
        created: Unix time in seconds.
        model: the name to answer with.
        requests: one per sample: those of the first prompt, then those of the next.
        num_samples: of each prompt; the first's tokens tell that its KV can be found by the others.
        num_choices: of each prompt in the answer: the best of its samples.
        prefixes: what each sample's text begins with.
        text: how the tokens of every choice become text.
        stream: answer with server-sent events.
        include_usage: streaming: send the usage at the end.
        continuous_usage: streaming: send the usage so far with every chunk.
        return_token_ids: send the ids of prompt and output beside the text.
        num_logprobs: send logprobs, with those of so many of the likeliest tokens; None: none.
        echo: the answer begins with the prompt, text and logprobs.
        num_prompt_logprobs: send those of the prompt apart, likewise.
        user: who asked, for the operator's log.
        labels: what else the caller says of the call, for the operator's log.
        tools: how calls of tools are found in the answers; None: none are looked for.
        thoughts: how thoughts are found in the answers; None: none are looked for.
        repeated: what the answer repeats of the request.
        packs_thoughts: the answer says thoughts in an opaque form as well.
        wants_receipt: the answer says what became of the call.
        service_tier: how urgent it is, in the words of OpenAI, for the answer to say; None: nobody asked for any.
    """

    call_id: str
    created: int
    model: str
    requests: tuple[GenerateRequest, ...]
    num_samples: int
    num_choices: int
    prefixes: tuple[str, ...]
    text: TextRules
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    num_logprobs: int | None
    echo: bool
    num_prompt_logprobs: int | None
    user: str | None
    labels: Mapping[str, object]
    tools: ToolRules | None = None
    thoughts: ThoughtRules | HarmonyRules | None = None
    repeated: Mapping[str, object] = field(default_factory=dict)
    packs_thoughts: bool = False
    wants_receipt: bool = False
    service_tier: ServiceTier | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts; one that is sampled several times counts once."""
        return sum(len(request.prompt_token_ids) for request in self.requests[:: self.num_samples])

    @property
    def tells_total(self) -> bool:
        """Whether a stream ends with a chunk of the whole call."""
        return self.include_usage or self.wants_receipt

    @property
    def is_read(self) -> bool:
        """Whether the text of an answer is looked through for its parts."""
        return self.tools is not None or self.thoughts is not None

    @property
    def tells_text_alone(self) -> bool:
        """Whether what a stream says of new tokens is their text, as it is, and nothing else."""
        is_scored = self.num_logprobs is not None or self.num_prompt_logprobs is not None
        says_more = self.return_token_ids or self.continuous_usage or self.wants_receipt
        return not (is_scored or says_more or self.is_read)

    @property
    def scores_prompts(self) -> bool:
        """Whether logprobs of prompts come with the first tokens."""
        return self.requests[0].num_prompt_logprobs is not None

    def lead_of(self, sample: int) -> int:
        """Number of the first sample of the same prompt."""
        return sample - sample % self.num_samples
