"""The site's search works where its pages are opened from a folder, and nothing is asked from anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.support.browser import chromium

ROOT = Path(__file__).parents[2]
PAGE = """<!doctype html><title>waiting</title><script src="iframe-worker.js"></script><script>
const worker = new Worker("parts/worker.js");
worker.addEventListener("message", (event) => { document.title = event.data; });
worker.postMessage(20);
</script>"""
WORKER = """
self.addEventListener("message", async (event) => {
  await importScripts("double.js");
  self.postMessage(`found ${double(event.data)}`);
});
"""


def test_a_worker_runs_in_a_page_that_was_opened_from_a_folder(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs/iframe-worker.js", tmp_path)
    (tmp_path / "page.html").write_text(PAGE)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/worker.js").write_text(WORKER)
    (tmp_path / "parts/double.js").write_text("function double(x) { return 2 * x; }\n")
    with chromium() as browser:
        page: Any = browser.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_function("document.title !== 'waiting'", timeout=10000)
        assert page.title() == "found 40"


def test_the_site_asks_no_server_for_a_script() -> None:
    extra = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["extra"]
    assert extra["polyfills"] == ["iframe-worker.js"]  # else the offline plugin adds one from elsewhere
