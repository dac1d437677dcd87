"""The chat page in a real browser, headless, over the real HTTP door and a double of the engine."""

from __future__ import annotations

import re
import shutil

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.serving.access.keyring import Keyring
from tests.serving.doubles import FakeService, wait_until
from tests.serving.http.chat_doubles import ChatService
from tests.serving.http.conftest import running_app

MODEL = "双语/page-test"
ANSWER = """好的。**两点**：

```python
print('你好' + "<b>x</b>")
```
用 `ls`，不是 <img src=x onerror=alert(1)>。"""


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def service():
    return ChatService(lambda prompt, sample: ANSWER if "说" in prompt else "长" * 4000, step_s=0.001)


@pytest.fixture
def app(service):
    with running_app(service, name=MODEL) as running:
        yield running


@pytest.fixture
def visit(browser):
    """Opens the page; whatever the browser complains of, or asks of others, fails the test."""
    contexts, wrong = [], []

    def opened(app, **options) -> Page:
        context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 900, "height": 700}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" and
                not said.text.startswith("Failed to load resource") else None)
        page.on("request", lambda request: wrong.append(f"asks {request.url}")
                if not request.url.startswith(app.url) else None)
        page.goto(app.url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def ask(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def settings(page: Page, **fields: str) -> None:
    page.click("#open-settings")
    for name, value in fields.items():
        page.fill(f"#{name.replace('_', '-')}", value)
    page.click("#settings button")


def test_a_conversation(visit, app, service):
    page = visit(app)
    expect(page.locator("#model")).to_have_text(MODEL)
    expect(page).to_have_title(MODEL)
    ask(page, "说一下")
    answer = page.locator(".assistant")
    expect(answer.locator(".numbers")).to_contain_text(re.compile(
        rf"{len(ANSWER)} tokens · [\d.]+ tokens/s · first after \d+ ms"))
    expect(answer.locator("strong")).to_have_text("两点")
    expect(answer.locator("pre")).to_have_text("print('你好' + \"<b>x</b>\")")
    expect(answer.locator(".text code")).to_have_text("ls")
    assert answer.locator("img").count() == answer.locator("b").count() == 0, "markup of the model's is text"
    expect(answer).to_contain_text("不是 <img src=x onerror=alert(1)>。")
    ask(page, "再说")
    expect(page.locator(".assistant .numbers")).to_have_count(2)
    assert service.prompts[-1].count("<|im_start|>") == 4 and ANSWER in service.prompts[-1]
    page.click("#new")
    expect(page.locator("article")).to_have_count(0)
    ask(page, "又说")
    expect(page.locator(".assistant .numbers")).to_have_count(1)
    assert ANSWER not in service.prompts[-1]


def test_text_is_shown_while_it_comes_and_stopped_by_the_button(visit, app, service):
    page = visit(app)
    ask(page, "长长的")
    body = page.locator(".assistant .body")
    expect(body).to_contain_text("长" * 20)
    assert len(body.inner_text()) < 4000
    expect(page.locator("#send")).to_be_hidden()
    expect(page.locator("#log")).to_have_attribute("aria-busy", "true")
    page.click("#stop")
    expect(page.locator(".numbers .why")).to_have_text("stopped")
    expect(page.locator(".numbers")).to_contain_text(f"{len(body.inner_text())} tokens")
    expect(page.locator("#stop")).to_be_hidden()
    assert wait_until(lambda: service.stats()["running"] == 0) and len(service.cancelled) == 1
    ask(page, "再来长的")
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".numbers .why")).to_have_count(2)


def test_a_new_chat_ends_the_answer_under_way(visit, app, service):
    page = visit(app)
    ask(page, "长长的")
    expect(page.locator(".assistant .body")).to_contain_text("长长")
    page.click("#new")
    assert wait_until(lambda: service.stats()["running"] == 0)
    ask(page, "说")
    expect(page.locator(".numbers")).to_have_count(1)
    assert "长" not in service.prompts[-1]


def test_settings_are_sent_and_kept(visit, app, service):
    page = visit(app)
    settings(page, system="你是海盗。", temperature="0.7", max_tokens="5")
    ask(page, "说")
    expect(page.locator(".numbers")).to_contain_text("5 tokens")
    expect(page.locator(".numbers .why")).to_have_text("cut at the limit of tokens")
    assert service.prompts[-1].startswith("<|im_start|>system\n你是海盗。<|im_end|>")
    params = service.submitted[-1][1]
    assert (params.temperature, params.max_tokens) == (0.7, 5)
    page.reload()
    assert page.input_value("#system") == "你是海盗。" and page.input_value("#temperature") == "0.7"


def test_enter_sends_but_not_while_an_input_method_composes(visit, app, service):
    page = visit(app)
    page.fill("#prompt", "shuo")
    for composing in ({"isComposing": True}, {"keyCode": 229}, {"shiftKey": True}):
        page.dispatch_event("#prompt", "keydown", {"key": "Enter", **composing})
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#prompt") == "shuo\n" and not service.prompts
    page.keyboard.press("Enter")
    assert wait_until(lambda: len(service.prompts) == 1)


def test_chinese_and_english(visit, app):
    page = visit(app, locale="zh-CN")
    expect(page.locator("#empty")).to_have_text("请输入问题。按 Enter 发送，Shift+Enter 换行。")
    assert page.get_attribute("html", "lang") == "zh-Hans"
    ask(page, "说")
    expect(page.locator(".numbers")).to_contain_text("词元/秒")
    page.click("#language")
    expect(page.locator("#new")).to_have_text("New chat")
    expect(page.locator("#prompt")).to_have_attribute("placeholder", "Message")
    page.reload()
    expect(page.locator("#open-settings")).to_have_text("Settings")


def _brightness(page: Page) -> int:
    return int(re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])


def test_light_and_dark(visit, app):
    for scheme, other in (("light", "dark"), ("dark", "light")):
        page = visit(app, color_scheme=scheme)
        assert (_brightness(page) > 128) == (scheme == "light")
        page.click("#open-settings")
        page.select_option("#theme", other)
        assert (_brightness(page) > 128) == (scheme == "dark")
        page.reload()
        assert (_brightness(page) > 128) == (scheme == "dark"), "what was chosen is kept"


def test_a_narrow_screen_needs_no_scrolling_sideways(visit, app):
    page = visit(app, viewport={"width": 320, "height": 568})
    ask(page, "说" + "x" * 200)
    expect(page.locator(".numbers")).to_be_visible()
    for element in ("documentElement", "querySelector('#log')"):
        assert page.evaluate(f"document.{element}.scrollWidth") == 320
    for button in ("#new", "#language", "#open-settings", "#send"):
        box = page.locator(button).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 320
    page.click("#open-settings")
    assert page.locator("#settings").bounding_box()["width"] <= 320


def test_a_model_without_a_chat_template_goes_on_with_the_text(visit):
    service = FakeService()
    with running_app(service) as app:
        page = visit(app)
        expect(page.locator("#empty")).to_contain_text("goes on with the text")
        settings(page, max_tokens="4")
        ask(page, "从前")
        expect(page.locator(".assistant .body")).to_have_text("从前从前")
        expect(page.locator(".numbers")).to_contain_text("4 tokens")
        ask(page, "有")
        expect(page.locator(".numbers")).to_have_count(2)
        assert service.submitted[-1][0] == tuple(service.encode("从前从前从前有"))


def test_what_goes_wrong_is_said_and_can_be_tried_again(visit):
    service = ChatService("好", max_running=0)
    with running_app(service) as app:
        page = visit(app)
        ask(page, "你好")
        expect(page.locator(".error")).to_contain_text("too many requests are waiting")
        service._max_running = 9
        page.click(".error button")
        expect(page.locator(".assistant .body")).to_have_text("好")
        assert page.locator(".error").count() == 0 and page.locator(".user").count() == 1
        service._max_running = 0
        ask(page, "问一")
        expect(page.locator(".error")).to_be_visible()
        service._max_running = 9
        ask(page, "问二")
        expect(page.locator(".assistant")).to_have_count(2)
        assert wait_until(lambda: "问二" in service.prompts[-1])  # the page shows an answer before it has asked for it
        assert "问一" not in service.prompts[-1], "a question without an answer is not asked beside the next"
        page.context.set_offline(True)
        ask(page, "还在吗")
        expect(page.locator(".error")).to_contain_text("can’t be reached")


def test_a_server_with_keys_asks_for_one(visit, tmp_path):
    ring = Keyring(tmp_path)
    key = ring.add()
    with running_app(ChatService("好"), guard=ring.guard()) as app:
        page = visit(app)
        expect(page.locator("#settings")).to_be_visible()
        expect(page.locator(".error")).to_contain_text("an API key is needed")
        page.fill("#key", "密钥")
        page.click("#settings button")
        expect(page.locator(".error")).to_contain_text("the API key is not valid")
        expect(page.locator("#settings")).to_be_visible()
        page.fill("#key", f" {key} ")
        page.click("#settings button")
        expect(page.locator(".error")).to_have_count(0)
        ask(page, "你好")
        expect(page.locator(".assistant .body")).to_have_text("好")
        assert key not in page.evaluate("JSON.stringify(localStorage)") and key not in page.content()
