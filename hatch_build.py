"""The package's metadata that depends on where the project is: its URLs, and the README's links.

``[tool.hatch.metadata.hooks.custom] repository`` in ``pyproject.toml`` is the one place for the
public address. While it is empty there are no URLs, and the description that a package index shows
has the README's text without links to files, which would lead nowhere there, and without pictures.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Code is kept as it is; the others are pictures and links, whose text has no brackets.
PARTS = re.compile(r"(```.*?```|`[^`\n]*`)|(!?)\[([^\]]*)\]\(([^)\s]+)\)\n*", re.DOTALL)


def description(readme: str, repository: str) -> str:
    """Return the README with links that work from anywhere."""

    def replaced(found: re.Match[str]) -> str:
        code, picture, text, link = found.groups()
        whole = found[0]
        end = whole[len(whole.rstrip("\n")) :]
        if code or re.match(r"\w+:|#", link):
            return whole
        if not repository:
            return "" if picture else text + end
        kind = "raw" if picture else "blob"
        return f"{picture}[{text}]({repository}/{kind}/main/{link}){end}"

    return PARTS.sub(replaced, readme)


def urls(repository: str) -> dict[str, str]:
    """Return the addresses that a package index shows beside the description."""
    if not repository:
        return {}
    places = {"Changelog": "/blob/main/CHANGELOG.md", "Issues": "/issues", "Source": ""}
    return {name: repository + place for name, place in places.items()}


class CustomMetadataHook(MetadataHookInterface):
    """What hatchling calls."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the description and the URLs."""
        repository = str(self.config.get("repository", "")).rstrip("/")
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = description(readme, repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        if repository:
            metadata["urls"] = urls(repository)
