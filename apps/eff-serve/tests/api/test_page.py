"""The chat page in Chromium: markdown, code, stopping, editing, history over a reload, and nothing that is markup."""

import os
import shutil
import time

import pytest
from eff_http.testing import served_in_a_thread
from eff_serve.api import Settings, create_app

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]
ANSWER = """# A title

Some **bold** and *slanted* words, `code`, and [a link](https://example.com/a?b=c).

1. one
2. two
   - inner

> said

```python
def f(x):
    return x < 1 and "<b>"
```

| a | b |
| - | - |
| 1 | 2 |

<img src=x onerror="document.title='hit'"><script>document.title='hit'</script> [bad](javascript:alert(1))
"""


@pytest.fixture
def address(engine, tokenizer):
    settings = Settings(model_id="fake", quantization="int8")
    engine.max_model_len = 20000
    with served_in_a_thread(create_app(engine, tokenizer, settings)) as address:
        yield address


def until(page, expression):
    """Wait for an expression; the page's policy forbids the polling by eval that Playwright does itself."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


@pytest.fixture
def page(address):
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.problems, page.asked = [], []
        page.on("console", lambda m: page.problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        until(page, "document.querySelector('#model').textContent.includes('fake')")
        yield page
        assert page.problems == []
        assert all(url.startswith((address, "data:")) for url in page.asked)
        browser.close()


def say(page, text, turns):
    page.fill("#prompt", text)
    page.click("#send")
    until(page, f"document.querySelectorAll('.turn.assistant').length === {turns}")


def test_markdown_is_shown_and_markup_is_text(page, engine):
    engine.text = ANSWER
    say(page, "<b>hello</b>", 1)
    assert "int8" in page.inner_text("#model")
    box = page.locator(".message.assistant")
    assert box.locator("h3").inner_text() == "A title"
    assert box.locator("strong").inner_text() == "bold"
    assert box.locator("em").inner_text() == "slanted"
    assert box.locator("ol > li").count() == 2
    assert box.locator("ol ul li").inner_text() == "inner"
    assert box.locator("blockquote").inner_text() == "said"
    assert box.locator("pre code").inner_text() == 'def f(x):\n    return x < 1 and "<b>"'
    assert box.locator("td").all_inner_texts() == ["1", "2"]
    assert box.locator("a").get_attribute("href") == "https://example.com/a?b=c"
    assert box.locator("a").count() == 1
    assert "<script>" in box.inner_text()
    assert box.locator("img, script").count() == 0
    assert page.locator(".message.user").inner_text() == "<b>hello</b>"
    assert page.title() == "eff-serve"
    assert "tokens/s" in page.inner_text(".note")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".code button")
    assert page.evaluate("navigator.clipboard.readText()") == 'def f(x):\n    return x < 1 and "<b>"'


def test_edit_regenerate_and_history_over_a_reload(page, engine):
    engine.text = "First."
    say(page, "one", 1)
    say(page, "two", 2)
    engine.text = "Second."
    page.click(".turn.assistant >> nth=1 >> text=Regenerate")
    until(page, "document.querySelectorAll('.turn.assistant')[1]?.innerText.includes('Second.')")
    assert bytes(engine.submitted[-1][0]) == b"user:one|assistant:First.|user:two|assistant:"
    page.click(".turn.user >> nth=0 >> text=Edit")
    page.fill(".turn.user textarea", "changed")
    page.click("text=Ask again")
    until(page, "document.querySelectorAll('.turn.assistant').length === 1")
    assert bytes(engine.submitted[-1][0]) == b"user:changed|assistant:"
    page.click("#settings summary")
    page.fill("#system", "Be kind.")
    page.dispatch_event("#system", "change")
    page.reload()
    until(page, "document.querySelectorAll('.turn.assistant').length === 1")
    assert page.locator(".message.user").inner_text() == "changed"
    assert page.input_value("#system") == "Be kind."
    say(page, "more", 2)
    assert bytes(engine.submitted[-1][0]).startswith(b"system:Be kind.|user:changed|assistant:Second.|user:more")
    page.click("#reset")
    assert page.locator(".message").count() == 0
    say(page, "another", 1)
    page.click("#open-chats")
    assert page.locator("#chat-list li").count() == 2
    page.click("#chat-list li >> nth=1 >> button >> nth=0")
    until(page, "document.querySelectorAll('.turn.assistant').length === 2")
    page.click("#open-chats")
    page.click("#chat-list li >> nth=1 >> button[title^=Delete]")
    assert page.locator("#chat-list li").count() == 1
    assert page.locator(".message").count() == 0


def test_stop_and_a_question_without_an_answer(page, engine):
    from eff_serve.engine.types import Step

    engine.steps = [Step(token=72), Step(token=105), None]
    page.fill("#prompt", "one")
    page.click("#send")
    until(page, "document.querySelector('.message.assistant')?.innerText === 'Hi'")
    page.click("#send")
    until(page, "document.querySelector('#status').innerText.includes('stopped')")
    assert page.locator(".turn.assistant .message").inner_text() == "Hi"
    engine.steps = None
    engine.refusal = ValueError("no room")
    page.fill("#prompt", "two")
    page.click("#send")
    page.wait_for_selector(".message.error")
    assert "no room" in page.inner_text(".message.error")
    assert page.input_value("#prompt") == "two"
    page.problems[:] = [p for p in page.problems if "400" not in p]


def test_thoughts_are_apart(page, engine, tokenizer):
    tokenizer.thinks = True
    engine.text = "<think>\nHm.</think>\n\nTwo."
    say(page, "one and one?", 1)
    assert page.locator(".thoughts p").text_content() == "Hm."
    assert page.locator(".message.assistant > p").inner_text() == "Two."


def test_a_phone_needs_no_scrolling_sideways(page, engine):
    engine.text = ANSWER + "\n\n```\n" + "long " * 60 + "\n```\n"
    page.set_viewport_size({"width": 360, "height": 740})
    say(page, "a question that is somewhat longer than the screen is wide", 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#send").is_visible()
