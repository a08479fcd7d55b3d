"""Open the built site in a browser: the first links work, nothing overflows, dark is readable.

``python docs/check_browser.py docs/_build/html``. Each page is loaded as wide as a phone and as a
desktop. Says so and succeeds where there is no Chromium.
"""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from html import unescape
from pathlib import Path
from typing import Any

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (390, 1280)
LINKS = 10
CONTRAST = 3.0  # of large text and of what is highlighted, by WCAG 2.1; text itself has more
CHECK = "__check__.html"

SCRIPT = """
<iframe id="frame" style="height: 900px; border: 0"></iframe><pre id="found"></pre>
<script>
const pages = PAGES, widths = WIDTHS, found = [], frame = document.getElementById("frame");
const load = (page, width) => new Promise(done => {
  frame.style.width = width + "px";
  frame.onload = () => done(frame.contentDocument);
  frame.src = page;
});
const numbers = color => color.match(/[\\d.]+/g).map(Number);
const light = color => {
  const [r, g, b] = numbers(color).map(c => (c /= 255) <= 0.03928 ? c / 12.92 :
    ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = element => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if ((numbers(color)[3] ?? 1) > 0.5) return color;
  }
  return "rgb(255, 255, 255)";
};
const unreadable = doc => {
  for (const element of doc.querySelectorAll("article *, .sidebar-tree *")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !element.getClientRects().length) continue;
    const pair = [light(getComputedStyle(element).color), light(behind(element))];
    const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (contrast < CONTRAST) return element.textContent.slice(0, 40);
  }
};
(async () => {
  const first = await load("index.html", widths[0]);
  const links = [...first.querySelectorAll("a[href]")].map(a => a.href.split("#")[0]);
  const own = [...new Set(links)].filter(href => href.startsWith(location.origin));
  for (const href of own.slice(0, LINKS)) {
    const there = await load(href, widths[0]), is = (await fetch(href)).ok;
    if (!is || !there.querySelector("h1")) found.push(`index.html: ${href} leads nowhere`);
  }
  for (const page of pages) for (const width of widths) {
    const doc = await load(page, width), room = doc.documentElement.clientWidth;
    const wide = doc.documentElement.scrollWidth;
    if (wide > room) found.push(`${page}: ${wide} pixels wide where there are ${room}`);
    if (width != widths[0]) continue;
    for (const theme of ["light", "dark"]) {
      doc.body.dataset.theme = theme;
      const text = unreadable(doc);
      if (text) found.push(`${page}: ${theme}, not readable: ${text}`);
    }
  }
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>
"""


def browser() -> str | None:
    """Return the command of a browser, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def faults(site: Path, command: str) -> list[str]:
    """Return what is wrong with the pages of a site."""
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    pages = [page for page in pages if not page.startswith(("_modules", "_static"))]
    check = SCRIPT.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    check = check.replace("LINKS", str(LINKS)).replace("CONTRAST", str(CONTRAST))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != f"/{CHECK}":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(check.encode())
            return None

        def log_message(self, *args: Any) -> None:
            """Say nothing of each file."""

    handler = functools.partial(Handler, directory=str(site))
    with (
        http.server.ThreadingHTTPServer(("localhost", 0), handler) as server,
        tempfile.TemporaryDirectory() as profile,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",  # MathJax is elsewhere
            "--virtual-time-budget=600000",
            "--dump-dom",
        ]
        url = f"http://localhost:{server.server_port}/{CHECK}"
        shown = subprocess.run(
            [command, *options, url], capture_output=True, text=True, timeout=300, check=True
        ).stdout
        server.shutdown()
    result = re.search(r'<pre id="found">(.+?)</pre>', shown, re.DOTALL)
    if result is None:
        return ["the browser did not come to an end"]
    found: list[str] = json.loads(unescape(result[1]))
    return found


def main() -> int:
    """Print the faults; 1 if there are any."""
    command = browser()
    if command is None:
        print("No browser: the site was not looked at in one.")
        return 0
    found = faults(Path(sys.argv[1]), command)
    print("\n".join(found) or "The site is right in a browser.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
