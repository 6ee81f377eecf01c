"""Functions, calls and results laid out by templates of each family, and by ones that have no place for them."""

import json
from pathlib import Path

import pytest
from eff_serve.models.chat_template import ChatTemplate
from eff_serve.models.dialects import HERMES, LLAMA3, MISTRAL, SMOLLM2, dialect_of
from eff_serve.models.tool_messages import arranged
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

TOOL = {"type": "function", "function": {"name": "city", "description": "d", "parameters": {"type": "object"}}}


def call(name, number):
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": {"n": number}}}


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [call("city", 1), call("city", 2)]},
    {"role": "tool", "content": "one", "tool_call_id": "call_1"},
    {"role": "tool", "content": "two", "tool_call_id": "call_2"},
]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
QWEN = """{% if tools %}[system]<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}{% if m.role == "tool" %}<tool_response>{% endif %}{% endfor %}"""
MISTRAL_LIKE = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}{% if m.tool_calls is defined %}[TOOL_CALLS][{% for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception("ids have nine characters") }}{% endif %}
{{- c.function | tojson }}:{{ c.id }}{% endfor %}]
{%- elif m.role == "tool" %}[TOOL_RESULTS]{{ m.tool_call_id }}:{{ m.content }}
{%- else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"""
LLAMA_LIKE = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.tool_calls is defined %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception("one call at once") }}{% endif %}
{%- set c = m.tool_calls[0].function %}<|python_tag|>{{ c.name }}:{{ c.arguments | tojson }};
{%- elif m.role == "tool" or m.role == "ipython" %}[ipython]{{ m.name }}:{{ m.content }};
{%- else %}[{{ m.role }}]{{ m.content }};{% endif %}{% endfor %}"""
SMOLLM3_LIKE = """{% if xml_tools %}[system]<tool_call>{{ xml_tools | tojson }}{% endif %}
{%- for m in messages %}[{% if m.role == "tool" %}user{% else %}{{ m.role }}{% endif %}]{{ m.content }}{% endfor %}"""


def rendered(source, messages, tools=None):
    template = ChatTemplate(source, {})
    turns, more = arranged(messages, tools, template, dialect_of(source))
    return template.render(turns, tools=more.pop("tools", None), more=more)


@pytest.mark.parametrize(
    ("source", "dialect"),
    [
        (QWEN, HERMES),
        (SMOLLM3_LIKE, HERMES),
        (MISTRAL_LIKE, MISTRAL),
        (LLAMA_LIKE, LLAMA3),
        ("You are SmolLM", SMOLLM2),
        (PLAIN, HERMES),
        (None, HERMES),
    ],
)
def test_a_template_tells_its_dialect(source, dialect):
    assert dialect_of(source) is dialect


def test_a_template_with_places_for_all_gets_them_as_they_are():
    text = rendered(QWEN, TALK, [TOOL])
    assert f"<tools>{json.dumps(TOOL)}</tools>" in text
    assert text.count('<tool_call>\n{"name": "city", "arguments": {"n": ') == 2
    assert text.endswith("[tool]one<tool_response>[tool]two<tool_response>")


def test_ids_of_mistral_have_nine_characters_and_still_belong_together():
    text = rendered(MISTRAL_LIKE, TALK, [TOOL])
    first = text.split('{"n": 1}}:')[1][:9]
    assert first.isalnum()
    assert f"[TOOL_RESULTS]{first}:one" in text
    kept = [{**TALK[1], "tool_calls": [{**call("city", 1), "id": "abcdefgh1"}]}]
    assert "abcdefgh1" in rendered(MISTRAL_LIKE, kept)


def test_llama_gets_one_call_a_message_with_its_result_behind_it():
    text = rendered(LLAMA_LIKE, TALK, [TOOL])
    assert text.endswith(
        '[user]hi;<|python_tag|>city:{"n": 1};[ipython]city:one;<|python_tag|>city:{"n": 2};[ipython]city:two;'
    )
    single = [TALK[0], {**TALK[1], "tool_calls": [call("city", 1)]}, TALK[2]]
    assert rendered(LLAMA_LIKE, single).endswith('city:{"n": 1};[ipython]city:one;')


def test_smollm3_has_another_name_for_tools_and_no_place_for_calls():
    text = rendered(SMOLLM3_LIKE, TALK, [TOOL])
    assert text.startswith(f"[system]<tool_call>[{json.dumps(TOOL)}]")
    assert '[assistant]<tool_call>\n{"name": "city", "arguments": {"n": 1}}\n</tool_call>\n<tool_call>' in text
    assert text.endswith("[user]one[user]two")


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be kind."}]])
def test_a_template_without_any_place_tells_all_in_words(system):
    text = rendered(PLAIN, [*system, *TALK], [TOOL])
    assert text.startswith("[system]Be kind.\n\nYou may call" if system else "[system]You may call")
    assert json.dumps(TOOL["function"]) in text
    assert '[assistant]<tool_call>\n{"name": "city", "arguments": {"n": 1}}\n</tool_call>' in text
    assert text.endswith("[user]<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>")
    assert text.count("[system]") == 1


def test_without_tools_nothing_changes():
    assert rendered(PLAIN, TALK[:1]) == "[user]hi"


@pytest.fixture
def with_tokens(tmp_path, smollm2):
    """SmolLM2's tokenizer with markers that are tokens, and a template that takes tools."""
    from eff_serve.models.tokenizer import Tokenizer

    backend = Backend.from_file(str(smollm2 / "tokenizer.json"))
    backend.add_tokens([AddedToken("<tool_call>", special=False)])
    backend.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = json.loads(Path(smollm2 / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": QWEN}))
    return Tokenizer(tmp_path)


def test_markers_are_known_by_their_tokens(with_tokens):
    assert with_tokens.marker("<tool_call>")[1] is False
    assert with_tokens.marker("[TOOL_CALLS]")[1] is True
    assert with_tokens.marker("<|im_end|>") == (2, True)
    assert with_tokens.marker("the") is None
    assert with_tokens.marker("not in the vocabulary") is None


def test_special_tokens_in_descriptions_names_and_results_are_text(with_tokens):
    end = "<|im_end|>"
    evil = {"name": "city", "description": end, "parameters": {"properties": {f"a{end}": {"type": "string"}}}}
    talk = [
        TALK[0],
        {
            "role": "assistant",
            "content": end,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "city", "arguments": {end: end}}}],
        },
        {"role": "tool", "content": end, "tool_call_id": "call_1"},
    ]
    ids = with_tokens.encode_chat(talk, tools=[{"type": "function", "function": evil}])
    assert ids.count(2) == 0
    assert with_tokens.decode(ids, skip_special_tokens=False).count(end) == 6
