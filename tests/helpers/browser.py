"""Pages in a real browser: Debian's Chromium, driven by Playwright and looked over by axe-core. `make test-browser` has all three."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("playwright", "axe_playwright_python") if find_spec(name) is None]
with_browser = pytest.mark.skipif(
    bool(MISSING) or CHROMIUM is None,
    reason=f"no {' and no '.join([*MISSING, *([] if CHROMIUM else ['Chromium'])])} here: make test-browser",
)
NARROW, WIDE = 390, 1280  # a telephone and a desk
LOOKS = [(scheme, width) for scheme in ("light", "dark") for width in (NARROW, WIDE)]
FAULTS = ("serious", "critical")


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser. No sandbox, for tests run as root in containers; every page is ours."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def shown(browser: Any, url: str, scheme: str = "light", width: int = WIDE, bears: str = "\0") -> Iterator[Page]:
    """The page at `url`; it must not have complained of anything but what has `bears` in it, nor its policy have forbidden anything."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.extend(_failure(request)))
    page.goto(url)
    yield page
    context.close()
    amiss = [line for line in said if bears not in line]
    assert not amiss, amiss


def _failure(request: Any) -> list[str]:
    """Nothing where it was aborted: Chromium says so of a stream, too, that the page has read to its end before the network took note."""
    return [] if request.failure == "net::ERR_ABORTED" else [f"{request.url}: {request.failure}"]


def faults(page: Page) -> list[str]:
    """What axe-core finds of its two gravest kinds: rule and place."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html']}" for one in found if one["impact"] in FAULTS for node in one["nodes"]]


def overhang(page: Page) -> int:
    """Pixels that the page is wider than the window."""
    wide: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return wide


def pixels(place: Locator) -> Any:
    """What is seen of `place`: RGB of 0 to 255, [pixels, 3]."""
    from matplotlib.image import imread

    return (imread(io.BytesIO(place.screenshot()), format="png")[:, :, :3] * 255).round().astype(int).reshape(-1, 3)


def ink(seen: Any) -> float:
    """Share of `pixels` that are not the background, which is their commonest colour."""
    import numpy

    counts = numpy.unique(seen @ [65536, 256, 1], return_counts=True)[1]
    return float(1 - counts.max() / counts.sum())


def coloured(seen: Any, colour: str) -> float:
    """Share of `pixels` that are nearly `colour` (#rrggbb)."""
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return float((abs(seen - wanted).max(axis=1) < 24).mean())
