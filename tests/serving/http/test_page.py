"""The page's files: all there, all their own, and what they name exists. How it looks and works: tests/ops."""

from __future__ import annotations

import re

import pytest

from serving.http.page import FILES, FOLDER


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path, name", [("/", "index.html"), *((f"/static/{name}", name) for name in FILES)])
def test_every_file_is_served_as_what_it_is(http, path, name):
    answer = http.get(path)
    assert answer.status_code == 200 and answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == FILES[name] and answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]


def test_nothing_else_is_served(http):
    for path in ("/static/", "/static/../page.py", "/static/%2e%2e/page.py", "/index.html"):
        assert http.get(path).status_code == 404
    assert set(FILES) == {path.name for path in FOLDER.iterdir()}


def test_nothing_comes_from_elsewhere():
    for name in FILES:
        named = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`]*", read(name))) - {"http://www.w3.org/2000/svg"}
        assert not named, f"{name} names {named}"
    page = read("index.html")
    local = re.findall(r'(?:src|href)="([^"]+)"', page) + re.findall(r'from "\./([^"]+)"', read("chat.js"))
    assert {one.removeprefix("static/") for one in local} | {"index.html"} == set(FILES)
    assert "<style" not in page and " style=" not in page and "onclick" not in page, "the page's own policy forbids it"


def test_both_languages_say_everything():
    english, chinese = read("words.js").split("\n  zh: {")
    said = [re.findall(r"^    (\w+): ", part, re.MULTILINE) for part in (english, chinese)]
    assert said[0] == said[1]
    used = set(re.findall(r'data-(?:word|placeholder)="(\w+)"', read("index.html")))
    used |= set(re.findall(r'\bword\("(\w+)"\)', read("chat.js")))
    assert used <= set(said[0])
    assert set(said[0]) - used == {"emptyChat", "emptyText", "broken", "unreachable", "stopped", "length",
                                   "content_filter", "deadline"}, "only what is chosen as the page runs"
    assert not re.search(r"[一-鿿]", english.replace('"中文"', "")) and "…" not in chinese


def test_scripts_name_elements_that_the_page_has():
    ids = set(re.findall(r' id="([\w-]+)"', read("index.html")))
    named = set(re.findall(r'\$\("([\w-]+)"\)', read("chat.js")))
    kept = set(re.findall(r'([\w-]+)"?: (?:session|local)Storage', read("chat.js")))
    assert len(kept) == 5 and named | kept <= ids


def test_models_say_whether_they_can_be_talked_with(http):
    assert http.get("/v1/models").json()["data"][0]["has_chat_template"] is False
