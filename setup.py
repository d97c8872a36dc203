"""Makes README.md the package's long description; everything else about the package is in pyproject.toml.

In: README.md, and `Repository` of pyproject.toml's `project.urls` where there is one. Out: the same text, with each
link into the checkout made absolute, or, without a repository, left as its words: relative links lead nowhere on a
package index.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
RELATIVE = re.compile(r"(?P<picture>!?)\[(?P<words>[^\]]*)\]\((?!\w+:)(?P<path>[^)]*)\)")


def long_description(text: str, repository: str | None) -> str:
    """`text` for a reader who has no checkout."""

    def absolute(link: re.Match[str]) -> str:
        if repository is None:
            return link["words"]
        way = "raw" if link["picture"] else "blob"
        path = f"README.md{link['path']}" if link["path"].startswith("#") else link["path"]
        return f"{link['picture']}[{link['words']}]({repository}/{way}/HEAD/{path})"

    return RELATIVE.sub(absolute, text)


if __name__ == "__main__":
    readme = HERE / "README.md"
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=long_description(
            readme.read_text(encoding="utf-8"), project.get("urls", {}).get("Repository")
        ),
        long_description_content_type="text/markdown",
    )
