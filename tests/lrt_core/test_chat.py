"""Chat templates: what becomes a token and what stays text, which tokens are the assistant's, what is refused and bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrt_core import chat
from lrt_core.chat import ChatError, ChatTemplate, ChatTemplateError
from lrt_core.checkpoint import BUNDLED, CheckpointError, load_tokenizer
from lrt_core.official_tokenizer import CHAT_TEMPLATE
from lrt_core.tokenizer import CONFIG_FILE, TEMPLATE_FILE, Tokenizer
from tests.helpers import SPECIAL_NAMES, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BOS, USER, USER_END, ASSISTANT, END = (TOKENIZER.special_tokens[name] for name in SPECIAL_NAMES)
TURNS = (
    "{% for message in messages %}{{ '<|' + message.role + '_start|>' }}BODY{{ '<|' + message.role + '_end|>' }}{% endfor %}"
)


def text(content: str) -> list[int]:
    return TOKENIZER.encode(content, add_bos=False)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rendered(source: str, *contents: str, **options: bool) -> chat.Conversation:
    """Messages of user and assistant in turn, by a template that writes `source` for each message's text."""
    roles = ("user", "assistant")
    messages = [message(roles[index % 2], content) for index, content in enumerate(contents)]
    return ChatTemplate(TURNS.replace("BODY", source), TOKENIZER).render(messages, **options)


def specials(ids: list[int]) -> list[int]:
    return [id for id in ids if id in TOKENIZER.special_tokens.values()]


def test_frame_of_the_authors() -> None:
    template = ChatTemplate(CHAT_TEMPLATE, TOKENIZER)
    turns = [message("user", " Hi \n"), message("assistant", "Yo "), message("user", "Bye")]
    first, answer = [USER, *text(" Hi \n"), USER_END], [ASSISTANT, *text("Yo "), END]
    last = [USER, *text("Bye"), USER_END]
    assert template.render(turns).ids == [BOS, *first, *answer, *last]
    assert template.render(turns, add_generation_prompt=True).ids == [BOS, *first, *answer, *last, ASSISTANT]
    with_system = [BOS, USER, *text("Be kind.\n\n Hi \n"), USER_END, *answer, *last]
    assert template.render([message("system", "Be kind."), *turns]).ids == with_system


def test_mask_is_the_assistants_text_and_the_end_of_its_turn() -> None:
    turns = [message("user", "a"), message("assistant", " yes\n"), message("user", "b"), message("assistant", "no")]
    ids, mask, whole = ChatTemplate(CHAT_TEMPLATE, TOKENIZER).render(turns)
    assert mask is not None and len(mask) == len(ids)
    assert TOKENIZER.decode(ids) == whole
    assert [id for id, own in zip(ids, mask, strict=True) if own] == [*text(" yes\n"), END, *text("no"), END]


def test_mask_takes_what_stands_before_the_end_of_the_turn() -> None:
    ids, mask, _ = rendered("[{{ message.content }}]", "a", "b")
    assert mask is not None
    assert [id for id, own in zip(ids, mask, strict=True) if own] == [*text("b]"), END]


def test_mask_leaves_out_a_token_that_is_partly_the_templates() -> None:
    ids, mask, _ = rendered("t{{ message.content }}", "a", "hx")
    assert ids[-3:] == [TOKENIZER.ranks[b"th"], ord("x"), END]
    assert mask is not None and mask[-3:] == [False, True, True]


@pytest.mark.parametrize("name", SPECIAL_NAMES)
def test_a_special_token_in_a_message_is_text(name: str) -> None:
    ids = ChatTemplate(CHAT_TEMPLATE, TOKENIZER).render([message("user", f"a{name}b")], add_generation_prompt=True).ids
    assert ids == [BOS, USER, *text(f"a{name}b"), USER_END, ASSISTANT]


PARTS = st.sampled_from([*SPECIAL_NAMES, "<|", "|>", "user", "_start", "<|BOS|>", "<", ">", " ", "\n", "ß", "\U000f0000", "x"])
CONTENTS = st.lists(PARTS, max_size=6).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    contents=st.lists(CONTENTS, min_size=1, max_size=4),
    source=st.sampled_from(
        [
            "{{ message.content }}",
            "{{ message.content | trim }}",
            "{{ message.content | upper }}",
            "{{ message.content | lower | trim }}",
            "{{ '<|' }}{{ message.content }}{{ '|>' }}",
            "{{ message.content }}{{ message['content'].strip() }}",
            "{{ '<|user' if false else '' }}{{ message.content ~ '_start|>' }}",
        ]
    ),
)
def test_no_message_forges_a_turn(contents: list[str], source: str) -> None:
    """The special tokens are those of the frame, whatever the messages hold, and the text is what a plain rendering says."""
    ids, mask, whole = rendered(source, *contents)
    frame = [id for index in range(len(contents)) for id in ((USER, USER_END), (ASSISTANT, END))[index % 2]]
    assert specials(ids) == frame
    assert TOKENIZER.decode(ids) == whole
    assert mask is not None and len(mask) == len(ids)


@given(contents=st.lists(CONTENTS, min_size=2, max_size=5))
def test_the_authors_frame_holds_against_any_system_and_user(contents: list[str]) -> None:
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [message(role, content) for role, content in zip(roles, contents, strict=False)]
    ids = ChatTemplate(CHAT_TEMPLATE, TOKENIZER).render(messages, add_generation_prompt=True).ids
    frame = [USER, USER_END, ASSISTANT, END, USER, USER_END, ASSISTANT, END]
    assert specials(ids) == [BOS, *frame[: 2 * (len(contents) - 1)], ASSISTANT]
    assert TOKENIZER.decode(ids[2:]).startswith(f"{contents[0]}\n\n{contents[1]}<|user_end|>")


@given(contents=st.lists(CONTENTS, min_size=1, max_size=3))
@pytest.mark.parametrize(
    "source", ["{{ message.content.split('x') | last }}", "{{ message.content | tojson }}", "{{ message.content[:3] }}"]
)
def test_a_template_that_transforms_messages_takes_harmless_ones_only(source: str, contents: list[str]) -> None:
    frame = [id for index in range(len(contents)) for id in ((USER, USER_END), (ASSISTANT, END))[index % 2]]
    try:
        ids, _, whole = rendered(source, *contents)
    except ChatError as error:
        assert "messages must not hold any of < >" in str(error)
        assert any(
            "<" in content or ">" in content or content.strip().casefold() in "_start_end|bosuserassistant"
            for content in contents
        )
    else:
        assert specials(ids) == frame
        assert TOKENIZER.decode(ids) == whole


def test_a_transformed_message_has_no_mask() -> None:
    ids, mask, _ = rendered("{{ message.content.split(' ') | last }}", "good day")
    assert (ids, mask) == ([USER, *text("day"), USER_END], None)
    with pytest.raises(ChatError, match="must not hold any of < >"):
        rendered("{{ message.content.split(' ') | last }}", "a <|user_end|>")


def test_conditions_see_the_real_text() -> None:
    source = "{% if 'sec' in message.content %}s{% elif message.content == 'x' %}equal{% endif %}{{ message.content | length }}"
    assert rendered(source, "a secret").text == "<|user_start|>s8<|user_end|>"
    assert rendered(source, "x").text == "<|user_start|>equal1<|user_end|>"


@pytest.mark.parametrize("content", ["a b", "a b \n", " a<|bos|>"])
@pytest.mark.parametrize(("source", "change"), [("{{ message.content }}", str), ("{{ message.content | trim }}", str.strip)])
def test_the_final_message_is_left_open(content: str, source: str, change: Any) -> None:
    ids, mask, _ = rendered(source, "q", content, continue_final_message=True)
    assert ids == [USER, *text("q"), USER_END, ASSISTANT, *text(change(content))]
    assert mask is not None and any(mask)


def test_the_final_message_of_a_transforming_template_is_left_open() -> None:
    assert rendered("{{ message.content.split('#') | last }}", "q", "z", continue_final_message=True).ids[-1] == text("z")[-1]


@pytest.mark.parametrize("contents", [("a", ""), ()])
def test_nothing_to_continue(contents: tuple[str, ...]) -> None:
    with pytest.raises(ChatError, match="no final message with text"):
        rendered("{{ message.content }}", *contents, continue_final_message=True)


def test_a_templates_refusal_is_passed_on() -> None:
    with pytest.raises(ChatError, match="refuses these messages: Messages come from user or assistant"):
        ChatTemplate(CHAT_TEMPLATE, TOKENIZER).render([message("user", "a"), message("system", "b")])


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{% for x in %}", r"line 1: "),
        ("\n{{ 'a' | nope }}", r"line 2: No filter named 'nope'"),
        ("{{ strftime_now('%d') }}", "'strftime_now' is undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler() }}", "undefined"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_a_broken_template_is_named(source: str, told: str) -> None:
    with pytest.raises(ChatTemplateError, match=told):
        ChatTemplate(source, TOKENIZER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 100000000000 }}",
        "{{ 100000000000 * [1] }}",
        "{{ 9 ** 99999 }}",
        "{% for a in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in range(10000000) %}x{% endfor %}",
    ],
)
def test_a_template_cannot_take_everything(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"too large|longer than|RecursionError|Range too big"):
        ChatTemplate(source, TOKENIZER)


def test_rendering_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% for a in range(9) %}{{ messages[0] }}{% endfor %}", TOKENIZER)
    monkeypatch.setattr(chat, "MAX_SECONDS", -1.0)
    with pytest.raises(ChatError, match="took longer"):
        template.render([message("user", "a")])


def test_too_many_messages() -> None:
    with pytest.raises(ChatError, match="more than 4096"):
        rendered("{{ message.content }}", *["a"] * 4097)


def test_special_tokens_with_spaces_cannot_be_told_apart() -> None:
    spaced = Tokenizer(TOKENIZER.pattern, TOKENIZER.ranks, {"<a b>": len(TOKENIZER.ranks)}, None, [], False, None)
    with pytest.raises(ChatTemplateError, match="without white space"):
        ChatTemplate("x", spaced)


def test_json_is_not_escaped_for_html() -> None:
    assert rendered("{{ {'a': '<é>'} | tojson }}", "q").text == '<|user_start|>{"a": "<é>"}<|user_end|>'


def test_the_template_has_a_file_of_its_own(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    assert (tmp_path / TEMPLATE_FILE).read_text("utf-8") == CHAT_TEMPLATE
    (tmp_path / TEMPLATE_FILE).write_text("other", "utf-8")
    assert Tokenizer.from_directory(tmp_path).chat_template == "other"
    (tmp_path / TEMPLATE_FILE).unlink()
    assert Tokenizer.from_directory(tmp_path).chat_template is None
    tiny_tokenizer(chat_template=None).save(tmp_path)
    assert not (tmp_path / TEMPLATE_FILE).exists()


def test_an_older_checkpoints_template_is_read(tmp_path: Path) -> None:
    tiny_tokenizer(chat_template=None).save(tmp_path)
    config = tmp_path / CONFIG_FILE
    plain = config.read_text("utf-8")
    for value, expected in (("null", None), ('"old"', "old")):
        config.write_text(plain.replace('"add_bos"', f'"chat_template": {value},\n"add_bos"'), "utf-8")
        assert Tokenizer.from_directory(tmp_path).chat_template == expected
    (tmp_path / TEMPLATE_FILE).write_text("new", "utf-8")
    with pytest.raises(CheckpointError, match="holds a chat template too"):
        Tokenizer.from_directory(tmp_path)
    config.write_text(plain.replace('"add_bos"', '"chat_template": 3,\n"add_bos"'), "utf-8")
    with pytest.raises(CheckpointError, match="chat_template must be a string or null"):
        Tokenizer.from_directory(tmp_path)


def test_converted_and_bundled_checkpoints_chat(golden_checkpoints: dict[str, Path]) -> None:
    for folder in (golden_checkpoints["lrt-layerwise"], BUNDLED):
        tokenizer = load_tokenizer(folder)
        assert (folder / TEMPLATE_FILE).read_text("utf-8") == tokenizer.chat_template
        assert tokenizer.chat_template is not None
        ids = ChatTemplate(tokenizer.chat_template, tokenizer).render([message("user", "x")]).ids
        assert ids[0] == tokenizer.bos_id
