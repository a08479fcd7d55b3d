"""Check that every link within the built site leads to a page, and to an anchor that it has.

``python docs/check_links.py docs/_build/html``. Links to other sites cannot be checked without a
network and are not.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.anchors |= {v for k in ("id", "name") if (v := named.get(k))}
        self.links += [v for k in ("href", "src") if (v := named.get(k))]


def broken_links(site: Path) -> list[str]:
    """Return ``page: link`` for every link within the site that leads nowhere."""
    pages = {
        path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")
    }
    if not pages:
        return [f"{site}: no pages"]
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = pages.get(target)
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and there and anchor not in there.anchors):
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    return sorted(broken)


def main() -> int:
    """Print the broken links; 1 if there are any."""
    broken = broken_links(Path(sys.argv[1]))
    print("\n".join(broken) or "All links within the site lead somewhere.")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
