"""Chats with tools in the syntax of each family: templates, tokenizers with their markers, what is asked in them."""

from functools import cache
from typing import Any

from tokenizers import AddedToken

from deployments.api.control_tokens import ControlPolicy
from deployments.api.http import build_app
from deployments.api.text import TextCodec
from deployments.api.tools.families import ToolParserName
from deployments.grammars import Guide, Vocabulary
from deployments.messages import FinishReason, Grammar, ModelInfo
from tests.api.fakes import CHAT, END_ID, FakeBackend, Step, body_of, build_tokenizer, client_of, playing

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
MARKERS = {"[TOOL_CALLS]": True, "<tool_call>": False, "</tool_call>": False}
MARKER_IDS = {marker: 257 + number for number, marker in enumerate(MARKERS)}
INFO = ModelInfo("fake/model", "", max_model_len=4096, vocab_size=260, eos_token_ids=(256,))
# Each reduced to what it says of tools.
PLAIN = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
HERMES = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}<tool_call>{% endif %}{% for m in messages %}"
    "{{ m.role[0] }}:{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}"
    "{% endfor %};{% endfor %}a:"
)
LLAMA = HERMES.replace("<tool_call>", "<|python_tag|>")
MISTRAL = HERMES.replace("<tool_call>", "[TOOL_CALLS]")
OTHER = HERMES.replace("<tool_call>", "<|call|>")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Look", "parameters": SCHEMA}}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "strict": True}}
TOOLS = [WEATHER, CLOCK]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
USER: Any = {"role": "user", "content": "hi"}
PARIS = '{"city": "Paris"}'
CALLED: Any = {"name": "weather", "arguments": PARIS}
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'


def codec_of(template: str, parser: ToolParserName = "auto", control: ControlPolicy = "allow") -> TextCodec:
    tokenizer = build_tokenizer(template)
    tokenizer.backend_tokenizer.add_special_tokens(
        [AddedToken(marker, special=True) for marker, special in MARKERS.items() if special]
    )
    tokenizer.backend_tokenizer.add_tokens([AddedToken(text) for text, special in MARKERS.items() if not special])
    codec = TextCodec(tokenizer, control, parser)
    assert {marker: codec.backend.token_to_id(marker) for marker in MARKERS} == MARKER_IDS
    return codec


def saying(*steps: Step) -> FakeBackend:
    """A backend that says this, and ends."""
    return playing(*steps, [END_ID], STOP)


async def post(codec: TextCodec, backend: FakeBackend | None = None, **fields: Any) -> tuple[int, Any]:
    async with client_of(build_app(backend or saying("x"), codec, INFO)) as client:
        answer = await client.post(CHAT, json=body_of(CHAT, **fields))
    return answer.status_code, answer.json()


def prompt_of(backend: FakeBackend, codec: TextCodec) -> str:
    return codec.backend.decode(list(backend.requests[0].prompt_token_ids), skip_special_tokens=False)


@cache
def vocabulary_of(codec: TextCodec) -> Vocabulary:
    return Vocabulary(codec.backend.to_str(), codec.backend.get_vocab_size(), INFO.eos_token_ids)


def guide_of(codec: TextCodec, grammar: Grammar) -> Guide:
    assert grammar.end_token_ids == INFO.eos_token_ids
    return vocabulary_of(codec).compile(grammar)


def next_of(guide: Guide) -> list[int]:
    """The tokens that may follow."""
    mask = guide.mask()
    return [token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1]


def allowed(codec: TextCodec, grammar: Grammar, tokens: list[int]) -> bool:
    """Whether tokens are a whole answer."""
    guide = guide_of(codec, grammar)
    for token in [*tokens, END_ID]:
        if token not in next_of(guide):
            return False
        if token != END_ID:
            guide.take([token])
    return True


def as_hermes(*calls: str) -> list[int]:
    opening, closing = MARKER_IDS["<tool_call>"], MARKER_IDS["</tool_call>"]
    blocks = [[opening, *f"\n{call}\n".encode(), closing] for call in calls]
    return blocks[0] + [token for block in blocks[1:] for token in [ord("\n"), *block]]


def as_llama(*calls: str) -> list[int]:
    return list("; ".join(call.replace('"arguments"', '"parameters"') for call in calls).encode())


def as_mistral(*calls: str) -> list[int]:
    return [MARKER_IDS["[TOOL_CALLS]"], *f"[{', '.join(calls)}]".encode()]
