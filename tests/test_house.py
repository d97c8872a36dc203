"""The rules of the house that its sources can break: directions of imports, sizes of folders, one meaning a name."""

from __future__ import annotations

import re

import pytest
from support import house

FEWEST_FILES, MOST_FILES = 2, 9
LONGEST_FILE = 450
MEANT_TWICE = {"main", "program", "start", "Ints"}
"""Names that several modules may define: each command line's, what starts a helper process, an array of integers."""
MAY_IMPORT = {"client": {"client"}, "server": {"server", "client"}, "trainer": {"trainer", "client"}}


@pytest.mark.parametrize("package", house.PACKAGES)
def test_a_package_imports_itself_and_the_ground_floor_alone(package):
    files = [file for file in house.sources() if file.relative_to(house.ROOT).parts[0] == package]
    strangers = {
        f"{house.module_of(file)} imports {name}"
        for file in files
        for name in house.imports_of(file)
        if name.split(".")[0] not in MAY_IMPORT[package]
    }
    assert files and not strangers


def test_rooms_import_only_rooms_below_them():
    graph = house.arrows()
    assert len(graph) > 20 and house.circle(graph) == []


def test_rooms_import_what_stands_above_them_in_contributings_tables():
    text = (house.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    place: dict[str, int] = {}
    for package in house.PACKAGES:
        table = text.partition(f"| {package}/ | what it owns")[2].partition("\n\n")[0]
        for number, row in enumerate(table.splitlines()[2:]):
            for name in re.findall(r"`([\w.]+)/?`", row.split("|")[1]):
                place[f"{package}.{name.removesuffix('.py')}"] = number
    graph = house.arrows()
    assert graph.keys() <= place.keys()
    upward = [
        f"{here} imports {there}"
        for here, others in graph.items()
        for there in others
        if here.split(".")[0] == there.split(".")[0] and place[there] > place[here]
    ]
    assert upward == []


def test_no_module_is_in_a_circle():
    assert house.circle(house.module_arrows()) == []


def test_a_folder_is_one_subject_of_two_to_nine_files():
    sizes = house.folders()
    assert len(sizes) > 15
    assert {folder: size for folder, size in sizes.items() if not FEWEST_FILES <= size <= MOST_FILES} == {}


def test_no_file_is_too_long_for_one_sitting():
    long = {
        house.module_of(file): lines
        for file in house.sources()
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert long == {}


def test_a_name_means_one_thing():
    assert house.names_twice().keys() <= MEANT_TWICE, house.names_twice()


@pytest.fixture
def made_house(tmp_path):
    """A small house whose files a test writes: `made_house({"client/a.py": "…"})`; its root."""

    def made(files):
        for name, text in {
            "client/__init__.py": "",
            "server/__init__.py": "",
            "trainer/__init__.py": "",
            **files,
        }.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return made


def test_an_arrow_upward_is_a_circle_of_rooms(made_house):
    root = made_house(
        {
            "client/low/__init__.py": "",
            "client/low/one.py": "def f():\n    from client.high import two",
            "client/low/three.py": "",
            "client/high/__init__.py": "",
            "client/high/two.py": "from client.low.three import name",
        }
    )
    assert house.circle(house.arrows(root)) == ["client.high", "client.low", "client.high"]
    assert house.circle(house.module_arrows(root)) == []


def test_imports_are_found_in_every_spelling(made_house):
    root = made_house(
        {
            "client/errors.py": "",
            "client/runs/__init__.py": "",
            "client/runs/run.py": "",
            "server/app.py": "import client.runs.run\nfrom client import errors\nfrom client.runs import run as r\n"
            "def f():\n    from client.errors import RunError\nif TYPE_CHECKING:\n    from trainer import x\n",
        }
    )
    found = set(house.imports_of(root / "server" / "app.py", root))
    assert found == {"client.runs.run", "client.errors", "trainer"}


def test_a_name_that_two_modules_define_is_found(made_house):
    root = made_house(
        {"client/a.py": "class Row: ...\nX = 1", "server/b.py": "Row = dict\n(Y, Z) = 1, 2\ndef Y(): ..."}
    )
    assert house.names_twice(root) == {"Row": ["client.a", "server.b"]}
