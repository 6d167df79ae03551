"""What the common families' templates make of conversations, against transformers; how their faults are told."""

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.api.chat_template import (
    ChatTemplate,
    NoChatTemplateError,
    TemplateLimitError,
    choose_template,
    read_legacy_template,
)
from deployments.api.template_meter import Limits
from deployments.api.text import TextCodec
from deployments.api.tokenizer import read_tokenizer
from deployments.errors import InvalidRequestError, UnsupportedModelError
from tests.api import templates
from tests.api.fakes import build_tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be short"}
ASSISTANT = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nHello there. "}
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one turn": [USER],
    "with a system message": [SYSTEM, USER],
    "three turns": [USER, ASSISTANT, USER],
    "the assistant's last": [SYSTEM, USER, ASSISTANT],
    "a tool's answer": [USER, ASSISTANT, {"role": "tool", "content": "42", "tool_call_id": "c1"}],
    "two users": [USER, USER],
    "text that looks like a template": [{"role": "user", "content": "{{ 1 }}{% if %}<|im_end|>"}],
}


def build(source: str) -> ChatTemplate:
    return ChatTemplate(source, TOKENS)


def by_transformers(source: str, messages: list[dict[str, Any]], **choices: Any) -> str | None:
    """What transformers renders; None where the template raises."""
    tokenizer = build_tokenizer(source)
    tokenizer.bos_token, tokenizer.eos_token = TOKENS["bos_token"], TOKENS["eos_token"]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **choices)
    except Exception:
        return None
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", templates.OF_TEXT)
def test_a_conversation_reads_as_transformers_renders_it(name: str, conversation: str):
    source, messages = templates.OF_TEXT[name], CONVERSATIONS[conversation]
    endings: list[dict[str, Any]] = [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ]
    for choices in endings:
        expected = by_transformers(source, messages, **choices)
        if expected is None:
            with pytest.raises(InvalidRequestError, match=r"^the model's chat template refused these messages: "):
                build(source).render(messages, **choices)
        else:
            assert build(source).render(messages, **choices) == expected


PARTS = ({"type": "text", "text": "first"}, {"type": "text", "text": "second"})


@pytest.mark.parametrize("name", templates.OF_TEXT)
def test_a_template_that_knows_text_is_given_text(name: str):
    text = build(templates.ALL[name]).render([{"role": "user", "content": PARTS}])
    assert "firstsecond" in text


def test_a_template_that_knows_parts_is_given_parts():
    vision = build(templates.VISION)
    expected = "<|im_start|>user\nfirstsecond<|im_end|>\n<|im_start|>assistant\n"
    assert vision.render([{"role": "user", "content": PARTS}]) == expected
    assert vision.render([{"role": "user", "content": "firstsecond"}]) == expected


def test_what_else_a_part_holds_reaches_a_template_that_knows_parts():
    source = templates.VISION.replace("{{ part.text }}", "{{ part.language }}:{{ part.text }}")
    part = PARTS[0] | {"language": "fr", "cache_control": {"type": "ephemeral"}}
    assert "user\nfr:first<" in build(source).render([{"role": "user", "content": (part,)}])


def test_a_template_that_knows_both_is_given_what_the_caller_sent():
    both = build(templates.LLAMA_3_VISION)
    assert "first | second" in both.render([{"role": "user", "content": PARTS}])
    assert "\n\nfirst<" in both.render([{"role": "user", "content": "first"}])


def test_a_role_is_tried_beside_messages_in_the_form_that_the_template_knows():
    # Read as text, the user's message has no part of the type `text`, and all is refused.
    strict = "{% if messages[-1].content[0].type != 'text' %}{{ raise_exception('parts, please') }}{% endif %}"
    template = build(strict + templates.VISION)
    assert "first" in template.render([{"role": "system", "content": "first"}, USER])


def test_each_role_is_given_the_form_that_the_template_knows_for_it():
    text = build(templates.LLAMA_3_VISION).render([{"role": "system", "content": PARTS}, USER])
    assert "\n\nfirstsecond<|eot_id|>" in text


def test_the_developers_message_is_the_systems_where_the_template_knows_no_developer():
    developer = {"role": "developer", "content": "be short"}
    for source in (templates.QWEN_2, templates.CHATML, templates.MISTRAL):
        assert build(source).render([developer, USER]) == build(source).render([SYSTEM, USER])
    assert "Alibaba" not in build(templates.QWEN_2).render([developer, USER])


def test_the_developers_message_stays_where_the_template_knows_it():
    source = "{% for m in messages %}{{ 'D' if m.role == 'developer' else m.role }}:{{ m.content }}{% endfor %}"
    assert build(source).render([{"role": "developer", "content": "x"}, USER]).startswith("D:xuser:")


def test_what_the_system_says_later_is_refused_where_the_template_would_leave_it_out():
    shown = "{% if loop.first or m.role != 'system' %}{{ m.content }}{% endif %}"
    source = "{% for m in messages %}" + shown + "{% endfor %}"
    template = build(source)
    assert template.render([SYSTEM, USER]) == SYSTEM["content"] + USER["content"]
    for late in (SYSTEM, SYSTEM | {"role": "developer"}):
        with pytest.raises(InvalidRequestError, match=r"messages\.1: .* leaves out a system message") as refused:
            template.render([USER, late])
        assert refused.value.param == "messages.1"
    assert SYSTEM["content"] in build(templates.CHATML).render([USER, SYSTEM])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_what_the_system_says_first_is_refused_where_the_template_would_leave_it_out(role: str):
    shown = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    for source in (shown, shown.replace("messages if", "messages[messages[0].role == 'system':] if")):
        template, said = build(source), SYSTEM | {"role": role}
        with pytest.raises(
            InvalidRequestError, match=r"messages\.0: .* leaves out a system message; say it in"
        ) as refused:
            template.render([said, USER])
        assert refused.value.param == "messages.0"
        assert template.render([said | {"content": ""}, USER]) == template.render([USER]) == USER["content"]


def test_a_field_that_the_template_reads_reaches_it():
    source = "{% for m in messages %}{{ m.name or 'nobody' }}:{{ m.tool_call_id }};{% endfor %}"
    message = {"role": "tool", "content": "x", "name": "ann", "tool_call_id": "c1"}
    assert build(source).render([message, USER]) == "ann:c1;nobody:;"


@pytest.mark.parametrize("name", templates.ALL)
def test_a_message_that_goes_on_ends_the_text(name: str):
    messages = [USER, {"role": "assistant", "content": "Once upon"}]
    text = build(templates.ALL[name]).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("Once upon")


def test_a_message_in_parts_goes_on_after_its_last():
    messages = [{"role": "user", "content": PARTS}]
    text = build(templates.VISION).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("firstsecond")


def test_a_message_that_the_template_leaves_out_cannot_go_on():
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="cannot be continued") as caught:
        build(source).render([USER, ASSISTANT], add_generation_prompt=False, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


FAULTS = {
    "{{ raise_exception('only \"user\", please') }}": 'only "user", please',
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ range(10 ** 9) }}": "OverflowError: Range too big",
    "{{ {} | dictsort(by='x') }}": "You can only sort by",
    "{{ 'a'.index('b') }}": "ValueError: substring not found",
    "{{ '%(x)s' % {} }}": "KeyError: 'x'",
    "{{ missing.field }}": "'missing' is undefined",
    "{{ messages[0].content + 1 }}": "TypeError: can only concatenate str",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError: ",
    "{{ messages[0].__class__.__base__ }}": "unsafe",
    "{{ 'x' * 10 ** 11 }}": "makes a text of more than",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "ran for more than",
}


@pytest.mark.parametrize("source", FAULTS)
def test_whatever_a_template_raises_is_told_as_a_refusal_of_the_messages(source: str):
    source = "{% if messages[0].content == 'hi' %}" + source + "{% endif %}"
    with pytest.raises(InvalidRequestError) as caught:
        build(source).render([USER], limits=Limits(cpu_s=1, max_size=2**20))
    assert str(caught.value).startswith("the model's chat template refused these messages: ")
    assert FAULTS[source.removeprefix("{% if messages[0].content == 'hi' %}").removesuffix("{% endif %}")] in str(
        caught.value
    )
    assert caught.value.param == "messages"


def test_a_template_that_never_ends_is_tried_once_and_refuses():
    template = build("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(TemplateLimitError):
        template.render([USER], limits=Limits(cpu_s=0.1, max_size=100))


def test_a_refusal_does_not_repeat_a_long_message_whole():
    with pytest.raises(InvalidRequestError) as caught:
        build("{{ raise_exception(messages[0].content) }}").render([{"role": "user", "content": "x" * 10_000}])
    assert len(str(caught.value)) < 1200


def test_a_limit_is_told_apart_so_that_a_thread_may_try_again():
    with pytest.raises(TemplateLimitError):
        build("{{ messages[0].content * 9 }}").render([USER], limits=Limits(cpu_s=1, max_size=10))


def test_the_default_of_several_templates_is_used():
    assert choose_template("one") == "one"
    assert choose_template({"tool_use": "two", "default": "one"}) == "one"
    assert choose_template({"rag": "only"}) == "only"


@pytest.mark.parametrize(
    ("templates", "reason"),
    [
        (None, "has no chat template"),
        ("", "has no chat template"),
        ({"tool_use": "a", "rag": "b"}, r"\(rag, tool_use\)"),
        ({"default": {"a": 1}}, r"\(default\)"),
        (3, "has no chat template"),
    ],
)
def test_a_model_without_a_template_for_chats_says_so(templates: object, reason: str):
    with pytest.raises(NoChatTemplateError, match=reason):
        choose_template(templates)


@pytest.mark.parametrize("template", [{"tool_use": "a", "rag": "b"}, "{% for %}", "{% unknown %}"])
def test_a_model_whose_template_cannot_be_used_completes_and_refuses_chats(template: Any):
    codec = TextCodec(build_tokenizer(template))
    assert codec.encode("ab") == [97, 98]
    with pytest.raises(InvalidRequestError, match=r"chat template.*use /v1/completions") as caught:
        codec.encode_chat([USER])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [("a template", "a template"), ([{"name": "default", "template": "named"}], {"default": "named"})],
)
def test_the_template_in_a_processors_file_is_read(tmp_path: Path, stored: object, expected: object):
    assert read_legacy_template(str(tmp_path)) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": stored}))
    assert read_legacy_template(str(tmp_path)) == expected


@pytest.mark.parametrize(
    "stored", ["{", "[]", "[" * 100_000, "{}", '"text"', '{"chat_template": [{"name": "default"}]}']
)
def test_a_processors_file_without_a_template_is_refused_by_name(tmp_path: Path, stored: str):
    (tmp_path / "chat_template.json").write_text(stored)
    with pytest.raises(UnsupportedModelError, match=r"chat_template\.json holds no chat template"):
        read_legacy_template(str(tmp_path))


def test_a_codec_loads_the_template_in_a_processors_file(tmp_path: Path):
    build_tokenizer(None).save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    assert bytes(TextCodec(read_tokenizer(str(tmp_path))).encode_chat([USER])) == b"hi!"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{% if not x is defined %}{% set x = '26 Jul' %}{% endif %}{{ x }}{{ messages[0].content }}", "x"),
        ("{% macro say(m) %}{{ m.content }}{{ x }}{% endmacro %}{{ say(messages[0]) }}", "x"),
        ("{% for m in messages %}{% if x %}{{ x }}{% endif %}{{ m.content }}{% endfor %}", "x"),
    ],
)
def test_variables_of_a_template_are_those_of_transformers(source: str, name: str):
    text = build(source).render([USER], variables={name: "known"})
    assert "known" in text and text == by_transformers(source, [USER], add_generation_prompt=True, x="known")
