"""The structure of the packages: imports between folders, sizes of folders and files, names that two modules define.

In: the three packages' folders. Out: folders (rooms) and imports between them (arrows), as plain values. Reads the
source files; imports none of them.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from support.servers.real_server import ROOT

PACKAGES = ("client", "server", "trainer")


def sources(root: Path = ROOT) -> list[Path]:
    """Every Python file of the three packages."""
    return sorted(file for package in PACKAGES for file in (root / package).rglob("*.py"))


def module_of(file: Path, root: Path = ROOT) -> str:
    """A file's dotted name; a package's `__init__` has the package's name."""
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str, root: Path = ROOT) -> str:
    """The folder of a module within its package, or the module itself if it lies at the package's top level."""
    parts = module.split(".")
    if len(parts) > 1 and (root / Path(*parts[:2])).is_dir():
        return ".".join(parts[:2])
    return ".".join(parts[:2])


def imports_of(file: Path, root: Path = ROOT) -> Iterator[str]:
    """The modules of the packages that a file imports, anywhere in the file: at the top, in a function, for a type."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in PACKAGES:
                yield _as_module(name, root)


def _as_module(name: str, root: Path) -> str:
    """The module that a dotted name belongs to: client.errors for `client.errors.RunError`."""
    parts = name.split(".")
    while len(parts) > 1 and not _is_module(root / Path(*parts)):
        parts.pop()
    return ".".join(parts)


def _is_module(path: Path) -> bool:
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def arrows(root: Path = ROOT) -> dict[str, set[str]]:
    """For each room, the rooms that its files import. Leaves out the packages' own `__init__` files."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in sources(root):
        module = module_of(file, root)
        if module in PACKAGES:
            continue
        for imported in imports_of(file, root):
            here, there = room_of(module, root), room_of(imported, root)
            if here != there and there not in PACKAGES:
                found[here].add(there)
    return dict(found)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path from a node back to itself; [] if the graph has none."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if found := walk(following, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def module_arrows(root: Path = ROOT) -> dict[str, set[str]]:
    """For each module the modules that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in sources(root):
        found[module_of(file, root)] |= set(imports_of(file, root)) - {module_of(file, root), *PACKAGES}
    return dict(found)


def names_twice(root: Path = ROOT) -> dict[str, list[str]]:
    """Names that more than one module defines at its top, each with those modules."""
    homes: dict[str, list[str]] = defaultdict(list)
    for file in sources(root):
        for name in _top_names(ast.parse(file.read_text(encoding="utf-8"))):
            homes[name].append(module_of(file, root))
    return {name: modules for name, modules in sorted(homes.items()) if len(modules) > 1}


def _top_names(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def longest_class(root: Path = ROOT) -> tuple[int, str]:
    """The number of lines of the longest class, and its dotted name."""
    classes = (
        (node.end_lineno - node.lineno + 1, f"{module_of(file, root)}.{node.name}")
        for file in sources(root)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.end_lineno
    )
    return max(classes)


def folders(root: Path = ROOT) -> dict[str, int]:
    """How many Python files each folder holds, `__init__` left out."""
    found: dict[str, int] = defaultdict(int)
    for file in sources(root):
        found[str(file.parent.relative_to(root))] += file.name != "__init__.py"
    return dict(found)


def main() -> None:
    """Print the figures of the packages' structure."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines, name = longest_class()
    longest = max((len(file.read_text(encoding="utf-8").splitlines()), module_of(file)) for file in sources())
    for folder, count in folders().items():
        print(f"{folder}: {count} files")
    print(f"longest class: {name}, {lines} lines; longest file: {longest[1]}, {longest[0]} lines")
    print(f"names that more than one module defines: {len(names_twice())}")
    print(f"README.md: {len(readme.splitlines())} lines, {len(readme.split())} words")
    print(f"circle between rooms: {' → '.join(circle(arrows())) or 'none'}")


if __name__ == "__main__":
    main()
