"""The page with two columns in a browser: what a user does on it, against the running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from browser import LOOKS, chromium, faults, ink, overhang, pixels, shown, with_browser
from served import KEY, Running, two_models

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

pytestmark = with_browser
PROMPT = "def main():\n    return"
PATIENCE = 60_000  # milliseconds, for a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with two_models(
        tmp_path_factory, waiting=20
    ) as server:  # what was broken off waits, too, until the worker takes notice
        yield server


def says(page: Page, place: str, text: str) -> None:
    from playwright.sync_api import expect

    expect(page.locator(f"#{place}")).to_contain_text(text, timeout=PATIENCE)


def give_key(page: Page) -> None:
    from playwright.sync_api import expect

    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Tab")
    expect(page.get_by_role("combobox", name="Second model")).to_have_value("b", timeout=PATIENCE)
    expect(page.get_by_role("combobox", name="First model")).to_have_value("a")


def ask(page: Page, tokens: int, temperature: float = 0) -> None:
    page.get_by_role("textbox", name="Prompt").fill(PROMPT)
    page.get_by_label("Tokens").fill(str(tokens))
    page.get_by_label("Temperature").fill(str(temperature))
    page.get_by_role("button", name="Ask both").click()


def another_seed_for_b(route: Route) -> None:
    asked = json.loads(route.request.post_data or "")
    asked["seed"] += asked["model"] == "b"
    route.continue_(post_data=json.dumps(asked))


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_it_can_be_used(browser: Any, running: Running, scheme: str, width: int) -> None:
    """Two models of the same weights say the same, and what transformers says is in test_serve.py."""
    with shown(browser, running.url, scheme, width, bears="401") as page:
        says(page, "said", "no API key")
        assert faults(page) == []
        give_key(page)
        ask(page, 12)
        says(page, "said", "Both say the same.")
        texts = [page.locator(f"#{side}-text").inner_text() for side in ("first", "second")]
        wanted = running.client().completions.create(model="a", prompt=PROMPT, max_tokens=12, temperature=0)
        assert texts == [wanted.choices[0].text] * 2
        says(page, "first-end", "12 tokens, ended by: length")
        assert faults(page) == []
        assert overhang(page) <= 0
        assert ink(pixels(page.locator("#first-text"))) > 0.01


def test_where_they_part_is_marked(browser: Any, running: Running) -> None:
    with shown(browser, running.url, bears="401") as page:
        give_key(page)
        page.route("**/v1/completions", another_seed_for_b)
        ask(page, 40, temperature=1.5)
        says(page, "said", "characters are the same.")
        texts = [page.locator(f"#{side}-text").inner_text() for side in ("first", "second")]
        same = int(page.locator("#said").inner_text().split()[2])
        assert texts[0][:same] == texts[1][:same]
        assert texts[0][same : same + 1] != texts[1][same : same + 1]
        assert [page.locator(f"#{side}-text mark").inner_text() for side in ("first", "second")] == [
            t[same:] for t in texts
        ]
        assert faults(page) == []


def test_one_that_cannot_answer_says_why(browser: Any, running: Running) -> None:
    with shown(browser, running.url, bears="40") as page:
        give_key(page)
        page.get_by_label("Kind").select_option("chat")
        ask(page, 12)
        says(page, "said", "Not both have answered.")
        says(page, "first-end", "12 tokens")
        says(page, "second-end", "chat template")
        assert page.locator("#first-text").inner_text()
        assert page.locator("#second-text").inner_text() == ""


def test_it_can_be_stopped_and_asked_again(browser: Any, running: Running) -> None:
    with shown(browser, running.url, bears="") as page:
        give_key(page)
        ask(page, 200)
        page.get_by_role("button", name="Stop").click()
        says(page, "said", "Stopped.")
        assert page.get_by_role("button", name="Stop").is_disabled()
        ask(page, 4)
        says(page, "said", "Both say the same.")


def test_it_works_by_keyboard(browser: Any, running: Running) -> None:
    with shown(browser, running.url, bears="401") as page:
        give_key(page)
        page.get_by_label("Tokens").fill("4")
        page.get_by_role("textbox", name="Prompt").focus()
        page.keyboard.type("import os")
        for _ in range(6):
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Ask both"
        page.keyboard.press("Enter")
        says(page, "said", "Both say the same.")


def test_asked_twice_the_second_is_answered(browser: Any, running: Running) -> None:
    with shown(browser, running.url, bears="401") as page:
        give_key(page)
        seen: list[str] = []
        page.expose_function("note", lambda text: seen.append(text))  # Playwright marks what it is given
        page.evaluate("new MutationObserver(() => note(said.textContent)).observe(said, { childList: true })")
        ask(page, 20)
        page.get_by_role("button", name="Ask both").click(click_count=2)
        says(page, "said", "Both say the same.")
        says(page, "first-end", "20 tokens")
        assert "Stopped." not in seen


def test_an_answer_stands_below_the_model_that_gave_it(browser: Any, running: Running) -> None:
    """Another model chosen: what the one before has said, or is saying, is gone."""
    with shown(browser, running.url, bears="401") as page:
        give_key(page)
        ask(page, 4)
        says(page, "said", "Both say the same.")
        page.get_by_role("combobox", name="First model").select_option("b")
        assert page.locator("#first-text").inner_text() == page.locator("#said").inner_text() == ""
        assert page.locator("#second-text").inner_text() != ""
        ask(page, 200)
        says(page, "said", "Asking both.")
        page.get_by_role("combobox", name="Second model").select_option("a")
        says(page, "said", "Stopped.")
        assert page.locator("#second-text").inner_text() == ""


def test_a_server_that_is_gone_is_told(browser: Any, running: Running) -> None:
    with shown(browser, running.url, bears="") as page:
        give_key(page)
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        ask(page, 4, temperature=0.15)
        says(page, "said", "The server does not answer.")
        page.get_by_label("API key").fill("another")
        page.get_by_label("API key").press("Tab")
        says(page, "said", "The server does not answer.")
