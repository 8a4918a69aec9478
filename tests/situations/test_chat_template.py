"""Chat templates: what is rendered is what transformers renders of the same folder."""

import datetime

import pytest

import mijax as mj
from tests.situations import refused
from tests.situations.folders import theirs, write

EACH = "{% for m in messages %}"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": "<int>", "a": "it's"}}}]
USER = [{"role": "user", "content": "hi"}]
NAMED = [
    {"name": "default", "template": "D{{ messages|length }}"},
    {"name": "tool_use", "template": "T{{ tools|length }}"},
]

# template (or chat_template of tokenizer_config.json), conversation, further arguments, what transformers renders
CASES = {
    "json as it stands": (EACH + "{{ m.content | tojson }}{% endfor %}", [{"role": "tool", "content": "it's <5 & é"}], {}, "\"it's <5 & é\""),
    "keys in their order": ("{{ tools | tojson }}", USER, {"tools": TOOLS}, '[{"type": "function", "function": {"name": "add", "parameters": {"b": "<int>", "a": "it\'s"}}}]'),
    "json with options": ("{{ tools[0].function.parameters | tojson(sort_keys=true, separators=(',', ':')) }}", USER, {"tools": TOOLS}, '{"a":"it\'s","b":"<int>"}'),
    "json with an indent": ("{{ tools[0].function.parameters | tojson(indent=1) }}", USER, {"tools": TOOLS}, '{\n "b": "<int>",\n "a": "it\'s"\n}'),
    "json in ascii": ("{{ messages[0].content | tojson(true) }}", [{"role": "user", "content": "é"}], {}, '"\\u00e9"'),
    "no tools is none": ("{% if tools is not none %}tools{% endif %}{% if documents is none %}no documents{% endif %}", USER, {}, "no documents"),
    "an empty list of tools": ("{% if tools is not none %}{{ tools|length }} tools{% endif %}", USER, {"tools": []}, "0 tools"),
    "documents": ("{% for d in documents %}{{ d.title }}: {{ d.text }}{% endfor %}", USER, {"documents": [{"title": "a", "text": "b"}]}, "a: b"),
    "undefined variables": ("[{{ nobody }}{% if thinking is defined %}{{ thinking }}{% endif %}]", USER, {}, "[]"),
    "variables of the template": ("[{% if thinking is defined %}{{ thinking }}{% endif %}]", USER, {"thinking": False}, "[False]"),
    "a variable before a special token": ("{{ bos_token }}", USER, {"bos_token": "!"}, "!"),
    "the generation tag": (EACH + "{% generation %}{% set n = 1 %}<{{ m.content }}>{% endgeneration %}{{ n }}{% endfor %}", USER, {}, "<hi>"),
    "blocks take their lines": ("a\n  {% if true %}\nb\n  {% endif %}\n", USER, {}, "a\nb\n"),
    "loop controls": (EACH + "{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", USER * 3, {}, "hi"),
    "a message's empty entries": (EACH + "{{ 'content' in m }}{{ m.content }}{% endfor %}", [{"role": "assistant", "content": None}], {}, "False"),
    "reasoning under another name": (EACH + "{{ m.reasoning_content }}{% endfor %}", [{"role": "assistant", "content": "", "reasoning": "so"}], {}, "so"),
    "a namespace and a dict": ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}{{ dict(a=3).a }}", USER, {}, "23"),
    "named: tools choose tool_use": (NAMED, USER, {"tools": TOOLS}, "T1"),
    "named: no tools, default": (NAMED, USER, {}, "D1"),
    "named: by name": (NAMED, USER, {"tools": TOOLS, "template": "default"}, "D1"),
}  # fmt: skip


def folder_of(path, template):
    files = {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}}
    return write(path / "model", files)


@pytest.mark.parametrize("case", CASES)
def test_a_conversation_is_rendered_by_the_folders_template(tmp_path, case):
    template, conversation, more, expected = CASES[case]
    tokenizer = mj.Tokenizer.from_folder(folder_of(tmp_path, template))
    assert tokenizer.render(conversation, **more) == expected
    tokenizer.save(tmp_path)
    assert mj.Tokenizer.from_folder(tmp_path).render(conversation, **more) == expected


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_expected_conversations_are_those_of_transformers(tmp_path, case):
    template, conversation, more, expected = CASES[case]
    folder = folder_of(tmp_path, template)
    (tmp_path / "saved").mkdir()
    mj.Tokenizer.from_folder(folder).save(tmp_path / "saved")
    names = {"template": "chat_template"}
    more = {names.get(key, key): value for key, value in more.items()}
    for place in (folder, tmp_path / "saved"):
        rendered = theirs(place).apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **more)
        assert rendered == expected


# which of a folder's files holds the template
PLACES = {
    "a jinja file goes before the settings": ({"chat_template.jinja": "jinja", "tokenizer_config.json": {"chat_template": "settings"}}, None, "jinja"),
    "the settings": ({"tokenizer_config.json": {"chat_template": "settings"}}, None, "settings"),
    "further jinja files, by name": ({"chat_template.jinja": "jinja", "additional_chat_templates/rag.jinja": "rag"}, "rag", "rag"),
    "further jinja files beside the default": ({"chat_template.jinja": "jinja", "additional_chat_templates/rag.jinja": "rag"}, None, "jinja"),
    "further jinja files replace the settings": ({"tokenizer_config.json": {"chat_template": NAMED}, "additional_chat_templates/rag.jinja": "rag"}, "rag", "rag"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_the_template_comes_from_the_file_that_goes_first(tmp_path, place):
    files, name, expected = PLACES[place]
    tokenizer = mj.Tokenizer.from_folder(write(tmp_path / "model", files))
    assert tokenizer.render(USER, template=name) == expected
    tokenizer.save(tmp_path)
    assert mj.Tokenizer.from_folder(tmp_path).render(USER, template=name) == expected


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
def test_the_file_that_goes_first_is_that_of_transformers(tmp_path, place):
    files, name, expected = PLACES[place]
    tokenizer = theirs(write(tmp_path / "model", files))
    assert tokenizer.apply_chat_template(USER, tokenize=False, chat_template=name) == expected


def test_a_processors_template_is_read_where_there_is_no_other(tmp_path):
    """transformers gives it to the processor, and leaves the tokenizer without one."""
    tokenizer = mj.Tokenizer.from_folder(write(tmp_path / "model", {"chat_template.json": {"chat_template": "p"}}))
    assert tokenizer.render(USER) == "p"


def test_the_day_of_the_conversation_is_today(tmp_path):
    days = [datetime.datetime.now().strftime("%d %b %Y")]
    rendered = mj.Tokenizer.from_folder(folder_of(tmp_path, "{{ strftime_now('%d %b %Y') }}")).render(USER)
    assert rendered in [*days, datetime.datetime.now().strftime("%d %b %Y")]


def test_a_conversation_that_begins_with_its_own_special_token_gets_no_second_one(tmp_path):
    files = {"tokenizer_config.json": {"bos_token": "<s>", "chat_template": "{{ bos_token }}hi"}}
    tokenizer = mj.Tokenizer.from_folder(write(tmp_path / "model", files, begin=True))
    assert tokenizer.chat([USER]).strings == [["<s>", "h", "i"]]
    assert tokenizer("hi").strings == [["<s>", "h", "i"]]


TEMPLATES = {
    "no template": ({}, {}, "comes without a chat template"),
    "an unknown name": ({"chat_template": NAMED}, {"template": "rag"}, r"no chat template 'rag'; template= is one of \['default', 'tool_use'\]"),
    "no default": ({"chat_template": NAMED[1:]}, {}, r"no chat template 'default'; template= is one of \['tool_use'\]"),
    "a syntax error": ({"chat_template": "{% if %}"}, {}, "refuses this conversation"),
    "an exception of its own": ({"chat_template": "{{ raise_exception('no system') }}"}, {}, "refuses this conversation: no system"),
    "a sum of text and nothing": ({"chat_template": "{{ 'a' + none }}"}, {}, "fails on this conversation: TypeError"),
    "a division": ({"chat_template": "{{ 1 / 0 }}"}, {}, "fails on this conversation: ZeroDivisionError"),
    "a way out of the sandbox": ({"chat_template": "{{ ''.__class__.__mro__ }}"}, {}, "is unsafe"),
    "a change of the conversation": ({"chat_template": "{{ messages.append(1) }}"}, {}, "refuses this conversation"),
    "a private name in a namespace": ({"chat_template": "{% set n = namespace(_x=1) %}"}, {}, "'_x'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TEMPLATES)
def test_a_template_that_cannot_be_used_says_why(tmp_path, fault):
    settings, more, message = TEMPLATES[fault]
    tokenizer = mj.Tokenizer.from_folder(write(tmp_path / "model", {"tokenizer_config.json": settings}))
    with refused(ValueError, message):
        tokenizer.render(USER, **more)


@pytest.mark.parametrize("value", [5, [{"name": "default"}], {"default": None}])
def test_a_template_that_is_no_text_is_named_with_its_file(tmp_path, value):
    folder = write(tmp_path / "model", {"tokenizer_config.json": {"chat_template": value}})
    with refused(ValueError, "tokenizer_config.json: chat_template must be a text or a list"):
        mj.Tokenizer.from_folder(folder)


def add(a: int, b: int) -> int:
    return a + b


CONVERSATIONS = {
    "none": ([], {}, ValueError, "at least one message"),
    "a text": ("hi", {}, TypeError, "expected a list of messages, given str"),
    "texts": (["hi"], {}, TypeError, "a message must be a mapping .*, given str at 0"),
    "an array in it": ([{"role": "user", "content": {1j}}], {}, TypeError, r"message\['content'\] must be plain JSON .*, given set"),
    "a function as a tool": (USER, {"tools": [add]}, TypeError, "a tool must be a mapping .* given function at 0"),
    "one tool": (USER, {"tools": TOOLS[0]}, TypeError, "expected a list of tools, given dict"),
    "messages twice": (USER, {"messages": USER}, TypeError, "messages cannot be given"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONVERSATIONS)
def test_a_conversation_of_another_kind_is_refused(tmp_path, as_a_user, fault):
    conversation, more, kind, message = CONVERSATIONS[fault]
    tokenizer = mj.Tokenizer.from_folder(folder_of(tmp_path, "{{ messages[0].content }}"))
    with refused(kind, message):
        tokenizer.render(conversation, **more)


def test_one_conversation_in_place_of_several_is_refused(tmp_path, as_a_user):
    tokenizer = mj.Tokenizer.from_folder(folder_of(tmp_path, "{{ messages[0].content }}"))
    with refused(TypeError, "chat takes a list of conversations"):
        tokenizer.chat(USER)


def test_a_template_whose_name_leaves_the_folder_is_not_written(tmp_path):
    tokenizer = mj.Tokenizer.from_folder(folder_of(tmp_path, [{"name": "../../x", "template": "x"}]))
    with refused(ValueError, r"name '\.\./\.\./x' cannot be a file's name"):
        tokenizer.save(tmp_path)


def test_a_tokenizers_templates_are_a_text_or_named_texts(tmp_path):
    read = lambda name, template: mj.Tokenizer.from_folder(folder_of(tmp_path / name, template)).chat_template
    for name in "abc":
        (tmp_path / name).mkdir()
    assert read("a", "x") == "x" and read("b", NAMED[:1]) == NAMED[0]["template"] and read("c", None) is None
