"""The READMEs hold: links lead somewhere, commands are ones that exist, tables of options say what the programs do.

Commands are parsed by the programs' own command lines and not run; `make demo` runs those of the main job.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from support.commands import program
from support.house import PACKAGES
from support.servers.real_server import ROOT

from server.settings import ServerSettings

READMES = sorted([*ROOT.glob("*.md"), *(f for d in (*PACKAGES, "tests", "deploy") for f in (ROOT / d).rglob("*.md"))])
SHELL = {
    "cd",
    "curl",
    "until",
    "kill",
    "kubectl",
    "source",
    "pip",
    "docker",
    "cp",
    "mkdir",
    "sbatch",
    "scancel",
    "ray",
    "serve",
}
"""Programs of others that the READMEs call."""
OURS = re.compile(r"(?:lightreasoner-|-m )(client|server|trainer)")
README_NAMES_IN_DEMO = {
    "problems.jsonl": "$OUT/sample.jsonl", "unseen.jsonl": "$OUT/test.jsonl", "runs/first": "$OUT/run",
    "report.html": "$OUT/report.html", "adapter": "$OUT/adapter", "results.json": "$OUT/results.json",
    "8000": "$PORT", "%1": "$server", "server.log": "$OUT/server.log",
    "1000": "$PROBLEMS",
}  # fmt: skip
ONLY_IN_DEMO = {"--port", "$PORT", "--run", "$OUT/run", ">", "$OUT/server.log", "2>&1", "&", "${@:3}"}
NO_OPTION_OF_OURS = {"--help", "--version", "--install-completion", "--show-completion"}


def tokens(file: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(file.read_text())


def anchors(file: Path) -> set[str]:
    """The headings of a page, as the links to them are written."""
    made = tokens(file)
    heads = [after.content for token, after in pairwise(made) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links(file: Path) -> Iterator[str]:
    for token in tokens(file):
        for child in token.children or ():
            if child.type in ("link_open", "image"):
                yield str(child.attrs["href" if child.type == "link_open" else "src"])


def statements(file: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, word by word, with the variables that a block sets filled in."""
    found = []
    for token in tokens(file):
        if token.type != "fence" or token.info:
            continue
        text = re.sub(r"(?m)(^|\s)#\s.*", "", token.content.replace("\\\n", " "))
        for name, value in re.findall(r"""\b([A-Z]+)=(".*?"|[^\s;$]+)""", text):
            text = re.sub(rf"\${name}\b", value.strip('"'), text)
        text = re.sub(r"\b[A-Z]+=\$\((.*?)\)", r"\1", text)
        for line in re.split(r"\n|; (?!do |done)", text):  # a loop is one command
            words = [word for word in shlex.split(line) if word != "&"]
            words = list(dropwhile(re.compile(r"[A-Z_]+=").match, words))
            if words:
                found.append(words)
    return found


@cache
def command(words: str) -> Any:
    """A command by its name as the READMEs write it, as `lightreasoner-client sample`."""
    name, _, rest = words.removeprefix("lightreasoner-").partition(" ")
    return program(name).commands[rest] if rest else program(name)


def option_tables(package: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The commands whose options a table of a package's README lists, and the table's rows."""
    made = tokens(ROOT / package / "README.md")
    for index, token in enumerate(made):
        if token.type == "inline" and token.content.startswith("Options of `"):
            names = re.findall(r"`(lightreasoner-[a-z ]+)`", token.content)
            header, *rows = table_after(made, index)
            assert header == ["option", "default", "meaning"], f"the table of {names}"
            yield names, rows


def table_after(made: list[Token], index: int) -> list[list[str]]:
    """Cells of the table that follows a token, row by row, as they are written."""
    assert made[index + 2].type == "table_open", f"no table follows {made[index].content!r}"
    rows: list[list[str]] = []
    for token, after in pairwise(made[index + 2 :]):
        if token.type == "table_close":
            break
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("th_open", "td_open"):
            rows[-1].append(after.content)
    return rows


def default_of(parameter: Any) -> str:
    """An option's default as a table writes it."""
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    value = parameter.default
    if value is None or value is False or value == () or value == []:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_leads_somewhere(file: Path) -> None:
    for link in links(file):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_command_is_one_that_exists(file: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in statements(file):
        said = shlex.join(words)
        if ours := OURS.search(said):
            given = shlex.split(said[ours.end() :].partition(" > ")[0])
            line = program(ours[1])
            if ours[1] != "server" or given[0] in line.commands:
                line = line.commands[given.pop(0)]
            line.make_context(line.name, given)  # raises what the command line itself would say
        elif words[0] == "make":
            assert words[1] in targets, said
        elif words[0] in ("python", ".venv/bin/python") and words[1] != "-m":
            source = (ROOT / words[1]).read_text()
            assert all(f'"{word}"' in source for word in words[2:] if word.startswith("--")), said
        elif "/" in words[0] or words[0] in ("bash", "sh"):
            assert (ROOT / words[-1 if words[0] in ("bash", "sh") else 0]).exists(), said
        else:
            assert words[0] in SHELL or words[:3] == [".venv/bin/python", "-m", "pytest"], said


@pytest.mark.parametrize(("given", "workers"), [([], "2"), (["WORKERS="], "2"), (["WORKERS=0"], "0")])
def test_make_test_runs_in_as_many_processes_as_are_named_and_else_in_two(given: list[str], workers: str) -> None:
    command = ["env", "--unset=WORKERS", "make", "-n", "test", *given]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f" --numprocesses {workers} --dist " in said


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_extra_is_one_that_can_be_installed(file: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for wanted in re.findall(r"(?:lightreasoner|\.)\[([a-z,]+)\]", file.read_text()):
        assert set(wanted.split(",")) <= set(extras), wanted


def test_the_readme_is_short_and_its_ten_commands_are_explained_one_by_one() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    section = text.partition("## From a model to a better one")[2].partition("\n## ")[0]
    block, sentences = section.split("```")[1:3]
    assert len(block.strip().splitlines()) == len(re.findall(r"^\d+\. ", sentences, re.M)) == 10


def demo_commands() -> list[list[str]]:
    """The commands that `make demo` runs, word by word; it calls its folder $OUT."""
    lines = (ROOT / "deploy" / "demo" / "run.sh").read_text().replace("\\\n", " ").splitlines()
    ran = (line.removeprefix("run ") for line in lines)
    return [shlex.split(line, comments=True) for line in ran if re.match(r"(python|lightreasoner-|kill) ?", line)]


def test_the_readmes_ten_commands_are_those_of_the_demo() -> None:
    """But for the wait and `merge`, which tests/e2e/test_demo.py runs. The demo has options beside them."""
    ten = [words for words in statements(ROOT / "README.md") if words[0] not in ("make", "pip")]
    assert len(ten) == 10
    ran, compared = demo_commands(), 0
    for words in ten:
        if words[0] == "until" or words[1] == "merge":
            continue
        for name, in_demo in README_NAMES_IN_DEMO.items():
            words = [re.sub(rf"(?<![\w-]){name}(?![\w-])", in_demo, word) for word in words]
        left = [[word for word in command if word not in words] for command in ran if set(words) <= set(command)]
        assert len(left) == 1 and set(left[0]) <= ONLY_IN_DEMO, (words, left)
        compared += 1
    assert compared == 8
    assert ' PROBLEMS="${2:-1000}"\n' in (ROOT / "deploy" / "demo" / "run.sh").read_text()


@pytest.mark.parametrize("package", PACKAGES)
def test_tables_of_options_name_ones_that_exist_with_their_defaults(package: str) -> None:
    for names, rows in option_tables(package):
        for options, default, _ in rows:
            for option in re.findall(r"`(-[\w-]+)`", options):
                having = [p for name in names for p in command(name).params if option in p.opts]
                assert having, f"{names} have no {option}"
                for parameter in having:
                    assert default.strip("`") == default_of(parameter), f"{names} {option}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_option_stands_in_the_table_of_its_command(package: str) -> None:
    told: dict[str, set[str]] = {}
    for names, rows in option_tables(package):
        for name in names:
            told.setdefault(name, set()).update(word for row in rows for word in re.findall(r"`(-[\w-]+)`", row[0]))
    line = program(package)
    every = {f"lightreasoner-{package} {name}" for name in line.commands}
    assert set(told) - {"lightreasoner-server"} == every
    for name, options in told.items():
        takes = {option for p in command(name).params for option in p.opts if option.startswith("--")}
        assert takes - NO_OPTION_OF_OURS <= options, name


def test_the_table_of_server_yaml_has_every_key_with_its_default() -> None:
    made = tokens(ROOT / "server" / "README.md")
    (start,) = (index for index, token in enumerate(made) if token.type == "inline" and token.content == "key")
    header, *rows = table_after(made, start - 6)
    assert header == ["key", "variable", "default", "meaning"]
    told = {}
    for keys, variables, default, _ in rows:
        for key, variable in zip(re.findall("`(.*?)`", keys), re.findall("`(.*?)`", variables), strict=True):
            assert variable == f"LIGHTREASONER_{key.upper().replace('.', '__')}"
            told[key] = default.strip("`")
    assert told == dict(flat(ServerSettings))


def flat(model: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of settings with its default as the table writes it; a section by its keys."""
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from flat(field.annotation, f"{prefix}{name}.")
        else:
            value = field.get_default(call_default_factory=True)
            shown = "" if value is None or value == {} else f"{value:g}" if isinstance(value, float) else str(value)
            yield prefix + name, shown
