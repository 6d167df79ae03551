"""From a conversation to the text that a model was trained on, by the chat template that came with the model.

Owns which template is used, what it understands (messages as text or as parts, the role `developer`), how the last
message is left open, and that whatever goes wrong in a template is told as one error. Knows nothing of tokens or HTTP;
`text.py` encodes what it renders. A `ChatTemplate` may be used from several threads at once.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.meta import find_undeclared_variables

from deployments.api.template_meter import LimitError, Limits, SizeLimitError
from deployments.api.template_sandbox import BoundedEnvironment, render
from deployments.errors import InvalidRequestError, RequestTooLargeError, UnsupportedModelError

# A message's content is a text, or parts in order: mappings with the type `text`, their `text`, and what else there is.
Message = Mapping[str, object]

LEGACY_FILE = "chat_template.json"
# Any chat that fits a context takes a fraction of this.
LIMITS = Limits(cpu_s=2.0, max_size=2**27)
# What may stop an event loop. A template that needs more is rendered in a thread.
BRIEF_LIMITS = Limits(cpu_s=0.003, max_size=2**14)
_MAX_REASON_CHARACTERS = 1000
_OWN_VARIABLES = frozenset(("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"))
_NO_VARIABLES: Mapping[str, object] = {}


class TemplateLimitError(InvalidRequestError):
    """The template went over a limit with these messages; the message names the limit."""


class TemplateSizeError(TemplateLimitError, RequestTooLargeError):
    """That limit is the size: what the template writes is longer than what was asked for."""


class NoChatTemplateError(InvalidRequestError):
    """The model has no chat template that can be used; the message says why."""


def choose_template(templates: object) -> str:
    """The template for a plain chat, of what a tokenizer holds: one template, or several by name.

    Raises:
        NoChatTemplateError: there is none, or none that is meant for plain chats.
    """
    if isinstance(templates, str) and templates:
        return templates
    if isinstance(templates, Mapping) and templates:
        chosen = next(iter(templates.values())) if len(templates) == 1 else templates.get("default")
        if isinstance(chosen, str):
            return chosen
        names = ", ".join(sorted(map(str, templates)))
        raise _unusable(f"this model has chat templates by name ({names}), and none of them is the default")
    raise _unusable("this model has no chat template")


def read_legacy_template(folder: str) -> object:
    """What the processors of some models keep beside the tokenizer; None without the file.

    Raises:
        UnsupportedModelError: the file is not JSON, or holds no template.
    """
    file = Path(folder) / LEGACY_FILE
    if not file.is_file():
        return None
    try:
        templates: object = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        if isinstance(templates, list):
            templates = {entry["name"]: entry["template"] for entry in templates}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnsupportedModelError(f"{file} holds no chat template: {type(error).__name__}: {error}") from None
    return templates


def _unusable(reason: str) -> NoChatTemplateError:
    return NoChatTemplateError(f"{reason}; use /v1/completions", "messages")


@dataclass(frozen=True, slots=True)
class _Reads:
    """In which form a template shows the content of messages of one role."""

    text: bool
    parts: bool


class ChatTemplate:
    """One template, compiled.

    Args:
        source: Jinja.
        special_tokens: variables that the template may read, as `bos_token`.

    Raises:
        NoChatTemplateError: the source is no valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, object]) -> None:
        environment = BoundedEnvironment()
        try:
            tree = environment.parse(source)
            self._knows_developer = any(node.value == "developer" for node in tree.find_all(nodes.Const))
            self._read_variables = frozenset(find_undeclared_variables(tree)) - environment.globals.keys()
            self._template = environment.build(tree)
        except (TemplateError, SyntaxError, RecursionError) as error:
            raise _unusable(f"this model's chat template cannot be compiled: {error}") from None
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._reads = {"user": _Reads(text=True, parts=False)}
        # A template that takes long with a few words is given text; what it is asked for will be refused anyway.
        with suppress(TemplateLimitError):
            for role in ("user", *_TRIALS):  # the user's first: the others' trials hold messages of a user
                self._reads[role] = self._try_role(role)
        self._loses_system = self._loses_late_system = False
        with suppress(TemplateLimitError):
            self._loses_system = self._loses_words("system", "user")
            self._loses_late_system = self._loses_words("user", "assistant", "system", "user")

    @property
    def shows_tools(self) -> bool:
        """Whether it tells the model of tools."""
        return "tools" in self._read_variables

    def reads(self, variable: str) -> bool:
        """Whether it reads a variable of this name."""
        return variable in self._read_variables

    @property
    def shows_calls(self) -> bool:
        """Whether it tells the model of calls in earlier turns."""
        return "tool_calls" in self.source

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        limits: Limits = LIMITS,
        variables: Mapping[str, object] = _NO_VARIABLES,
    ) -> str:
        """Write the conversation.

        Args:
            messages: each with `role` and `content`, and what else the template may read.
            tools: that the model may call, as OpenAI has them.
            add_generation_prompt: end where the assistant's turn begins.
            continue_final_message: end within the last message, after its text; never with a generation prompt.
            limits: of time and size.
            variables: what else the template reads, `enable_thinking` for one.

        Raises:
            TemplateLimitError: the template went over one of the limits.
            InvalidRequestError: the template refuses these messages.
        """
        assert not (add_generation_prompt and continue_final_message)
        self._check_variables(variables)
        shaped = [self._shape(message) for message in messages]
        self._check_systems(shaped)
        if not continue_final_message:
            return self._render(shaped, add_generation_prompt, limits, variables, tools)
        marked, last_text = _with_mark(shaped[-1])
        return _before_mark(self._render([*shaped[:-1], marked], False, limits, variables, tools), last_text)

    def check_systems(self, messages: Sequence[Message]) -> None:
        """As `render` does, and before anything is added to what the caller wrote.

        Raises:
            InvalidRequestError: the model would not be told one of them.
        """
        self._check_systems([self._shape(message) for message in messages])

    def _check_systems(self, shaped: Sequence[Mapping[str, object]]) -> None:
        """Refuse what the model would not be told."""
        for place, message in enumerate(shaped):
            is_lost = self._loses_late_system if place else self._loses_system
            if is_lost and message["role"] in _INSTRUCTING and message["content"]:
                what = f"messages.{place}: the model's chat template leaves out a {message['role']} message"
                help_ = " that is not the first" if place else "; say it in the first message of the user"
                raise InvalidRequestError(f"{what}{help_}", f"messages.{place}")

    def _check_variables(self, variables: Mapping[str, object]) -> None:
        """Refuse what the server itself sets, and what would have no effect."""
        for name in variables:
            if name in _OWN_VARIABLES:
                raise InvalidRequestError(f"chat_template_kwargs must not set {name!r}", "chat_template_kwargs")
            if name not in self._read_variables:
                known = ", ".join(sorted(self._read_variables - _OWN_VARIABLES)) or "none"
                message = f"chat_template_kwargs: the model's chat template does not read {reprlib.repr(name)}"
                raise InvalidRequestError(f"{message}; it reads: {known}", "chat_template_kwargs")

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        limits: Limits,
        variables: Mapping[str, object] = _NO_VARIABLES,
        tools: Sequence[Mapping[str, object]] = (),
    ) -> str:
        known = {
            **self._special_tokens,
            **variables,
            "messages": messages,
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render(self._template, known, limits)
        except SizeLimitError as error:
            raise TemplateSizeError(_refusal(str(error)), "messages") from None
        except LimitError as error:
            raise TemplateLimitError(_refusal(str(error)), "messages") from None
        except TemplateError as error:  # the template's own words, where it raised
            raise InvalidRequestError(_refusal(str(error)), "messages") from None
        # A template may fail in any way that Python can, for these messages and not for others.
        except Exception as error:
            raise InvalidRequestError(_refusal(f"{type(error).__name__}: {error}"), "messages") from None

    def _shape(self, message: Message) -> dict[str, object]:
        """A message as the template understands it."""
        role, content = str(message["role"]), message["content"]
        if role == "developer" and not self._knows_developer:
            # Verbatim it is a role that the model never saw, and the default system prompt would come as well.
            role = "system"
        reads = self._reads.get(role, self._reads["user"])
        if isinstance(content, str):
            shaped: object = content if reads.text or not reads.parts else [_as_part(content)]
        else:
            assert isinstance(content, Sequence)
            shaped = list(content) if reads.parts else "".join(part["text"] for part in content)
        return {**message, "role": role, "content": shaped}

    def _try_role(self, role: str) -> _Reads:
        """Render a small conversation in both forms; where it fails in both, the role reads as the user's does."""
        reads = _Reads(
            text=self._shows(role, _PROBES[0], _PROBES[:1]),
            parts=self._shows(role, [_as_part(probe) | {"probe": _STRUCTURE} for probe in _PROBES], _PROBES),
        )
        return reads if reads.text or reads.parts else self._reads["user"]

    def _loses_words(self, *roles: str) -> bool:
        """Whether it leaves out, without a word, what the system says in such a conversation."""
        messages = [self._shape({"role": role, "content": _PROBES[role == "system"]}) for role in roles]
        try:
            return _PROBES[1] not in self._render(messages, True, _TRIAL_LIMITS)
        except TemplateLimitError:
            raise
        except InvalidRequestError:
            return False

    def _shows(self, role: str, content: object, probes: Sequence[str]) -> bool:
        before, after = _TRIALS.get(role, ((), ()))
        others = [self._shape({"role": other, "content": "x"}) for other in (*before, *after)]
        messages = [*others[: len(before)], {"role": role, "content": content}, *others[len(before) :]]
        try:
            text = self._render(messages, True, _TRIAL_LIMITS)
        except TemplateLimitError:
            raise
        except InvalidRequestError:
            return False
        # A list that was written as Python or JSON shows more than its texts.
        return all(probe in text for probe in probes) and _STRUCTURE not in text


# Roles and what surrounds them in a conversation that most templates accept.
_TRIALS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "system": ((), ("user",)),
    "developer": ((), ("user",)),
    "assistant": (("user",), ("user",)),
    "tool": (("user", "assistant"), ()),
}
_INSTRUCTING = ("system", "developer")
_TRIAL_LIMITS = Limits(cpu_s=1.0, max_size=2**20)
_PROBES = ("kvrelay-first-text", "kvrelay-second-text")
_STRUCTURE = "kvrelay-structure"


def _as_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _refusal(reason: str) -> str:
    if len(reason) > _MAX_REASON_CHARACTERS:
        reason = f"{reason[:_MAX_REASON_CHARACTERS]}..."
    return f"the model's chat template refused these messages: {reason}"


# The space tells whether the template strips what ends a message.
_MARK = "kvrelay-message-goes-on "


def _with_mark(message: Mapping[str, object]) -> tuple[dict[str, object], str]:
    """The message with the mark behind it, and the text that the mark stands behind."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + _MARK}, content
    assert isinstance(content, list)
    *others, last = content or [_as_part("")]
    return {**message, "content": [*others, {**last, "text": last["text"] + _MARK}]}, last["text"]


def _before_mark(text: str, last_text: str) -> str:
    """What stands before the last mark; stripped at its end, where the template would have stripped the message."""
    before, mark, after = text.rpartition(_MARK.rstrip())
    if not mark or last_text.strip() not in before:
        reason = "it does not write the last message as it is, so that it cannot be continued"
        raise InvalidRequestError(_refusal(reason), "continue_final_message")
    return before if after.startswith(" ") else before.rstrip()
