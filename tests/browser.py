"""Renders pages in headless Chromium, without network access."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# disable the browser's own background activity
_QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--force-device-scale-factor=1", "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
_MEASURE = """
const results = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument;
    const box = element => { const r = element.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; };
    return {
        width: frame.clientWidth,
        scroll: [page.documentElement.scrollWidth, page.documentElement.scrollHeight],
        resources: frame.contentWindow.performance.getEntriesByType('resource').map(entry => entry.name),
        heading: page.querySelector('h1').textContent,
        active: page.querySelectorAll('script, iframe, img, object, embed, link[rel=stylesheet], base, form').length,
        charts: [...page.querySelectorAll('svg.chart')].map(chart => ({
            title: chart.getAttribute('aria-label'),
            box: box(chart),
            lines: [...chart.querySelectorAll('.line > path')].filter(path => path.getTotalLength() > 0).map(path => ({
                box: box(path), color: page.defaultView.getComputedStyle(path).stroke,
            })),
        })),
    };
});
document.getElementById('results').textContent = JSON.stringify(results);
"""


def find_browser() -> str:
    """Path of a browser; skips the test if none is installed."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if not found:
        pytest.skip("no Chromium or Chrome is installed (Debian: apt-get install chromium)")
    return found


def screenshot(page: Path, folder: Path, width: int, height: int) -> tuple[Path, list[str]]:
    """Screenshot of the page, and its console messages, where the browser reports errors."""
    picture = folder / f"{width}.png"
    said = _run(folder, f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri())
    return picture, [line for line in said.splitlines() if ":CONSOLE" in line]


def measure(page: Path, folder: Path, widths: list[int]) -> list[dict]:
    """Sizes of the page and its charts at several widths, and every resource that it loads; see `_MEASURE`."""
    source = html.escape(page.read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{source}"></iframe>' for width in widths
    )
    outer = folder / "measure.html"
    outer.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="margin:0">{frames}<pre id="results"></pre>'
        f"<script>addEventListener('load', () => {{{_MEASURE}}})</script>",
        encoding="utf-8",
    )
    shown = _run(folder, "--dump-dom", outer.as_uri())
    return json.loads(html.unescape(re.search(r'<pre id="results">(.*?)</pre>', shown, re.DOTALL)[1]))


def _run(folder: Path, *arguments: str) -> str:
    """The browser's output."""
    command = [find_browser(), *_QUIET, f"--user-data-dir={folder / 'profile'}", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr
