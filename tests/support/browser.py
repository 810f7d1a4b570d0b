"""A headless Chromium that reports everything a page should not do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESKTOP = (390, 844), (1280, 900)


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser; skips the test where there is none."""
    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser here: install one of {', '.join(CHROMIUM)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """One page, opened at a size and in a colour scheme.

    Attributes:
        page: playwright's.
        complaints: console messages, exceptions, dialogs and requests for anything but the file itself.
    """

    def __init__(self, browser: Any, file: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.width = size[0]
        mobile = size == PHONE
        self.page = browser.new_page(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, has_touch=mobile, is_mobile=mobile
        )
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        self.page.on("dialog", self._dialog)
        self.page.on("request", self._request)
        self.page.goto(file.absolute().as_uri())

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        if request.resource_type != "document" and not request.url.startswith("data:"):
            self.complaints.append(f"request: {request.url}")

    @property
    def overflow(self) -> int:
        """By how many pixels the page is wider than the screen; a phone's window grows with a page that is too wide."""
        return int(self.page.evaluate("document.documentElement.scrollWidth")) - self.width
