"""The wheel's own words: package READMEs as data, README.md as the long description without links that lead nowhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from support.house import PACKAGES
from support.servers.real_server import ROOT

BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of this checkout."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, "."], cwd=checkout, check=True, capture_output=True, timeout=120)
    (file,) = checkout.glob("*.whl")
    return zipfile.ZipFile(file)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]*)\)", text)


def test_each_package_carries_its_readme(wheel: zipfile.ZipFile) -> None:
    for package in PACKAGES:
        assert wheel.read(f"{package}/README.md") == (ROOT / package / "README.md").read_bytes()


def test_without_a_repository_the_long_description_is_the_readme_with_web_links_alone(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    said = wheel.read(metadata).decode()
    assert "Description-Content-Type: text/markdown" in said and "## Quick start" in said
    assert "client/README.md" in said
    assert links(said) and all(link.startswith("https://") for link in links(said))


def test_with_a_repository_its_links_are_absolute() -> None:
    spec = spec_from_file_location("setup", ROOT / "setup.py")
    assert spec and spec.loader
    setup = module_from_spec(spec)
    spec.loader.exec_module(setup)
    here = "https://example.org/us/lightreasoner"
    said = setup.long_description("![a](deploy/b.png) [c](#d) [e](client/README.md#f) [g](https://h.org)", here)
    assert said == (
        f"![a]({here}/raw/HEAD/deploy/b.png) [c]({here}/blob/HEAD/README.md#d) "
        f"[e]({here}/blob/HEAD/client/README.md#f) [g](https://h.org)"
    )
