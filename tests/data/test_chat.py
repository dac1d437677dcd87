"""Chat templates give the text that was written out by hand, refuse with one message, and can do nothing else."""

from __future__ import annotations

import datetime
import pathlib
import shutil

import pytest

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from llm_jax.interop.exporting import export_run
from llm_jax.interop.importing import import_run
from tests.data import chat_templates as chats
from tests.data import tokenizer_kinds as kinds


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return kinds.byte_level(tmp_path_factory.mktemp("base"))


@pytest.fixture
def having(base, tmp_path):
    """Makes the tokenizer with a chat template, as tokenizer_config.json has it or (jinja) in its own file."""

    def make(template, jinja=None):
        kinds.write(tmp_path, tokenizer__json=(base / "tokenizer.json").read_bytes(), tokenizer_config__json={
            "bos_token": "<|begin|>", "eos_token": "<|im_end|>", "chat_template": template})
        if jinja is not None:
            kinds.write(tmp_path, chat_template__jinja=jinja)
        return Tokenizer.load(tmp_path)

    return make


@pytest.mark.parametrize("template, text", chats.ALL.values(), ids=chats.ALL)
def test_templates_in_the_manner_of_known_models(having, template, text):
    tokenizer = having(template)
    assert tokenizer.chat_template == template
    assert tokenizer.render_chat(chats.MESSAGES) == text
    assert text.startswith(tokenizer.render_chat(chats.MESSAGES, add_generation_prompt=False))


def test_tools_and_variables(having):
    tokenizer = having(chats.CHATML)
    assert tokenizer.render_chat(chats.MESSAGES, chats.TOOLS) == chats.CHATML_TOOLS + chats.CHATML_TEXT
    assert tokenizer.render_chat(chats.MESSAGES, enable_thinking=False) == chats.CHATML_TEXT + "<think></think>3"


def test_tokens_of_a_chat_are_the_meant_special_tokens_and_bos_is_there_once(having):
    tokenizer = having(chats.CHATML.replace("{% if tools %}", "{{ bos_token }}{% if tools %}", 1))
    ids = tokenizer.encode_chat(chats.MESSAGES)
    begin, start = (tokenizer.encode(t, special=True)[0] for t in ("<|begin|>", "<|im_start|>"))
    assert ids[0] == begin == tokenizer.bos_id and ids.count(begin) == 1 and ids.count(start) == 5
    assert tokenizer.prompt_ids(tokenizer.render_chat(chats.MESSAGES), special=True) == ids
    assert having(chats.CHATML).encode_chat(chats.MESSAGES)[0] == start  # no BOS that the template does not write


def test_where_templates_come_from(having, base):
    assert having("a", jinja="b").render_chat([]) == "b"
    several = having([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}])
    (several.files.contents).pop("chat_template.jinja", None)
    assert (several.render_chat([]), several.render_chat([], tools=[])) == ("d", "t")
    with pytest.raises(UserError, match="no chat template"):
        Tokenizer.load(base).render_chat([])
    assert Tokenizer.load(base).chat_template is None


def test_named_templates_are_read_chosen_by_name_and_saved(having, tmp_path):
    having([{"name": "default", "template": "config's"}, {"name": "old", "template": "o"}], jinja="d")
    for name, text in (("tool_use", "t"), ("rag", "r {{ documents }}"), ("default.txt", "no template")):
        kinds.write(tmp_path / "additional_chat_templates", **{name if "." in name else f"{name}__jinja": text})
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.chat_template, tokenizer.render_chat([]), tokenizer.render_chat([], tools=[])) == ("d", "d", "t")
    assert tokenizer.render_chat([], tools=[], template="rag", documents=1) == "r 1"
    assert tokenizer.encode_chat([], template="tool_use") == tokenizer.encode("t")
    with pytest.raises(UserError, match="no chat template 'old'.*default, rag, tool_use"):
        tokenizer.render_chat([], template="old")
    kinds.write(tmp_path / "run" / "additional_chat_templates", left__jinja="by another")
    tokenizer.save(tmp_path / "run")
    again = Tokenizer.load(tmp_path / "run")
    assert again.files.contents == tokenizer.files.contents and again.fingerprint == tokenizer.fingerprint
    kinds.write(tmp_path / "additional_chat_templates", rag__jinja=b"\xff")
    with pytest.raises(UserError, match="additional_chat_templates/rag.jinja is not UTF-8"):
        Tokenizer.load(tmp_path).render_chat([])


def test_named_templates_come_through_import_and_export(tmp_path):
    golden = pathlib.Path(__file__).parents[1] / "golden" / "llama2"
    source = shutil.copytree(golden, tmp_path / "hf", ignore=shutil.ignore_patterns("*.npz"))
    kinds.write(source / "additional_chat_templates", rag__jinja="r", tool_use__jinja="t")
    import_run(source, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    for folder in (tmp_path / "run", tmp_path / "out"):
        assert {p.name: p.read_text() for p in (folder / "additional_chat_templates").iterdir()} == {
            "rag.jinja": "r", "tool_use.jinja": "t"}


def test_the_date(having):
    now = having("{{ strftime_now('%Y') }}").render_chat([])
    assert abs(int(now) - datetime.date.today().year) <= 1


@pytest.mark.parametrize("template, says", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% if %}", "refuses"), ("{{ 1 / 0 }}", "refuses"), ("{{ messages[7].content }}", "refuses"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{{ messages.append(1) }}", "unsafe|not safely"),
    ("{{ namespace(__init__=1) }}", "__init__"), ("{% include 'x' %}", "refuses"),
    ("{{ messages | tojson(indent='x', separators=3) }}", "refuses"),
])
def test_what_a_template_may_not_do_is_one_error(having, template, says):
    with pytest.raises(UserError, match=says):
        having(template).render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("template", [7, {"a": 1}, [{"name": "default"}], ["x"]])
def test_what_is_no_template_is_refused(having, template):
    with pytest.raises(UserError, match="chat_template must be"):
        having(template).render_chat([])


def test_messages_are_plain_values(having):
    tokenizer = having("{{ messages[0].content }}")
    with pytest.raises(UserError, match="not PurePosixPath"):
        tokenizer.render_chat([{"role": "user", "content": kinds.pathlib.PurePath("x")}])
    with pytest.raises(UserError, match="mapping with role"):
        tokenizer.render_chat(["hello"])
