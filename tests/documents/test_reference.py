"""The reference pages are made from the package, and nothing of it is missing there or on the one page."""

from __future__ import annotations

import re

import pytest
import yaml

import rankalloc as ra
from docs.generators import api, commands, configuration, docstrings, included, methods
from rankalloc.experiments.config import RunConfig
from rankalloc.experiments.file_task import FileTask
from rankalloc.methods import methods_table

from .blocks import PAGES, ROOT


def test_every_method_and_every_part_of_one_has_a_section():
    page = methods.page()
    assert methods_table() in page
    for name in ra.METHODS:
        assert f"### {name} {{ #{name} }}" in page, name
    for kind, (_, registry, _) in methods.PARTS.items():
        for name in registry:
            assert f"{{ #{kind}-{name} }}" in page, (kind, name)
    anchors = re.findall(r"\{ #([\w-]+) \}", page)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([\w-]+)\)", page)) <= set(anchors)


def test_a_method_that_comes_from_outside_is_on_the_page():
    ra.METHODS["mine"] = ra.Method("mine", "what | it does", score="energy", source="here", cost="none", weakness="x")
    try:
        assert "### mine { #mine }" in methods.page() and "score [`energy`](#score-energy)" in methods.page()
    finally:
        del ra.METHODS["mine"]


def test_every_command_has_all_its_options():
    sections = dict(re.findall(r"^## (.+?) \{.*?\}$(.*?)(?=^## |\Z)", commands.page(), re.M | re.S))
    found = {" ".join(path): command for path, command in commands.commands(commands.root())}
    assert set(sections) == set(found) and {"train", "shrink", "ls methods"} <= set(found)
    for name, command in found.items():
        for parameter in command.params:
            if "--help" not in parameter.opts and not parameter.hidden:
                shown = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar
                assert shown in sections[name], (name, shown)


def keys(tree: dict, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Dotted paths of a tree of settings."""
    return {path + (key,) for key in tree} | {
        inner for key, value in tree.items() if isinstance(value, dict) for inner in keys(value, path + (key,))
    }


def test_every_key_of_a_configuration_is_there_with_its_default():
    page = configuration.page()
    sections = dict(re.findall(r"^## .+? \{ #([\w-]+) \}$(.*?)(?=^## |\Z)", page, re.M | re.S))
    for *section, key in keys(RunConfig().model_dump()):
        assert f"| `{key}` |" in sections["-".join(section) or "top-level"], (section, key)
    for key in FileTask.model_fields:
        assert f"| `{key}` |" in sections["task"]
    assert "| `rank` | whole number ≥ 1 | `12` |" in sections["adapter"]
    assert "`linear`, `cosine`" in sections["training"] and "< 4,294,967,296" in sections["top-level"]
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    assert yaml.safe_load(block) == yaml.safe_load(RunConfig().to_yaml())


def test_every_public_name_is_in_the_api_reference_once():
    text = "\n".join(api.pages().values())
    shown = re.findall(r"heading: ra\.(\w+)|^## ra\.(\w+)", text, re.M)
    assert sorted(a or b for a, b in shown) == sorted(set(ra.__all__) - {"__version__"})
    assert api.public_paths()["rankalloc.load"] == "rankalloc.storage.loading.load"
    assert api.public_paths()["rankalloc.SCORES"] == "rankalloc.methods.scores.SCORES"


def test_the_one_page_has_every_public_name_and_every_command_once():
    rows = [line for line in PAGES["docs/one-page.md"].splitlines() if line.startswith("| `")]
    first = [re.match(r"\| `([^`]+)`", row)[1] for row in rows]
    assert sorted(name for name in first if name.startswith("ra.")) == sorted(f"ra.{name}" for name in ra.__all__)
    lines = [" ".join(line.split()[1:]) for line in first if line.startswith("rankalloc ")]
    for path, _ in commands.commands(commands.root()):
        assert sum(line.startswith(" ".join(path)) for line in lines) == 1, path
    assert len(lines) == len(list(commands.commands(commands.root())))


PUBLIC = {"rankalloc.load": "rankalloc.storage.loading.load", "rankalloc.Run": "rankalloc.training.run.Run"}


@pytest.mark.parametrize("role, target, shown", [
    (":func:<code>rankalloc.load</code>", "rankalloc.storage.loading.load", "rankalloc.load"),
    (":class:<code>Run</code>", "rankalloc.training.run.Run", "Run"),
    (":meth:<code>rankalloc.Run.step</code>", "rankalloc.training.run.Run.step", "rankalloc.Run.step"),
    (":func:<code>~rankalloc.methods.base.fill</code>", "rankalloc.methods.base.fill", "fill"),
    (":mod:<code>rankalloc.storage</code>", "rankalloc.storage", "rankalloc.storage"),
    (":meth:<code>observe</code>", "rankalloc.training.run.Run.observe", "observe"),
    (":data:\n<code>SCALES</code>", "rankalloc.training.run.Run.SCALES", "SCALES"),
])
def test_a_role_becomes_a_link_or_code(role, target, shown):
    html = f'<h2 id="rankalloc.training.run.Run.step"></h2><p>see {role}.</p>'
    made = docstrings.linked(html, PUBLIC)
    assert f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>.</p>' in made
    assert not re.search(r":\w+:\s*<", made)


def test_examples_in_docstrings_are_read_as_code():
    text = "Do it.\n\nExample:\n    >>> 1\n    1\n"
    assert docstrings.readable(text) == text.replace("Example:", "Examples:")
    text = "Do it.\n\nExample::\n\n    library = 1\n    library.use()\n"
    assert docstrings.readable(text) == "Do it.\n\n```python\nlibrary = 1\nlibrary.use()\n```\n"


def test_files_from_outside_docs_are_pages_whose_links_still_lead_somewhere():
    found = included.included()
    assert {"index.md", "changelog.md", "contributing.md", "findings/default.md"} <= set(found)
    assert "findings/default/forest.png" in found and "reports/demo.png" in found
    handwritten = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    for path, content in found.items():
        if isinstance(content, str):
            for target in re.findall(r"\]\(([^)#:\s]+)\)", content):
                parts: list[str] = []
                for part in [*path.split("/")[:-1], *target.split("/")]:
                    parts = parts[:-1] if part == ".." else [*parts, part]
                assert "/".join(parts) in set(found) | handwritten, (path, target)


def test_every_page_is_in_the_navigation():
    nav = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    handwritten = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert len(nav) == len(set(nav)) and handwritten <= set(nav) and set(api.pages()) <= set(nav)
