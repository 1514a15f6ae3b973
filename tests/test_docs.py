"""Everything that the docs name exists: links, pages, commands, benchmarks, recipes and keys."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from jsonschema import Draft202012Validator

from yrunner.cli import app
from yrunner.recipe.messages import recipe_json_schema

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "recipes", "deepspeed_configs", "benchmarks")
PAGES = sorted(
    {*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))}
)
INDEXES = [
    ROOT / "docs/guide/README.md",
    ROOT / "docs/guide/zh/README.md",
    ROOT / "docs/results/README.md",
]
CHINESE = sorted((ROOT / "docs/guide/zh").glob("*.md"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
INLINE_CODE = re.compile(r"`[^`]+`")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\byrun ([a-z]+)\b([^\n`#]*)")
OPTION = re.compile(r"(?<!\S)(--?[a-z][a-z-]*)")
BENCHMARK = re.compile(r"python -m (benchmarks(?:\.\w+)+)")
RECIPE_FILE = re.compile(r"recipes/(\w+\.yaml)")

schema = recipe_json_schema()
commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
KEY = re.compile(rf"(?<![\w/.-])({'|'.join(schema['properties'])})((?:\.[a-z_0-9]+)+)(?![\w/])")
FILE_SUFFIXES = {"md", "py", "json", "jsonl", "yaml", "html", "txt", "csv"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The files and anchors that a page links to; what is on the web is not visited."""
    for target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield (page.parent / file).resolve() if file else page, anchor


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = HEADING.findall(FENCE.sub("", page.read_text("utf-8")))
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


def code(page: Path) -> str:
    """Everything on a page that is set as code, but for what commands print."""
    text = page.read_text("utf-8")
    blocks = [block for block in FENCE.findall(text) if not block.startswith("```\n")]
    return "\n".join([*blocks, *INLINE_CODE.findall(FENCE.sub("", text))])


def can_be_run(module: str) -> bool:
    """Whether `python -m module` finds a file."""
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def has_key(node: dict[str, Any], path: list[str]) -> bool:
    """Whether a part of the JSON Schema has a key, in any of its variants."""
    if "$ref" in node:
        return has_key(schema["$defs"][node["$ref"].rpartition("/")[2]], path)
    if not path:
        return True
    key, *rest = path
    variants = [*node.get("anyOf", ()), *node.get("oneOf", ())]
    if key in node.get("properties", {}):
        variants.append(node["properties"][key])
        return any(has_key(variant, rest) for variant in variants[-1:])
    if key.isdigit() and "items" in node:
        return has_key(node["items"], rest)
    return any(has_key(variant, path) for variant in variants)


@each_page
def test_every_link_resolves(page: Path):
    for file, anchor in links(page):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), f"{file.name}#{anchor}"


@pytest.mark.parametrize("index", INDEXES, ids=lambda path: path.parent.name)
def test_every_page_is_in_its_index(index: Path):
    listed = {file for file, _ in links(index)}
    assert set(index.parent.glob("*.md")) - {index} <= listed


def test_every_page_of_the_docs_is_in_a_folder_with_an_index():
    pages = set((ROOT / "docs").rglob("*.md"))
    assert {page.parent for page in pages} == {index.parent for index in INDEXES}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "README_zh.md"], ids=lambda p: p.name)
def test_the_readmes_link_to_both_indexes(page: Path):
    assert {index for index in INDEXES if index not in CHINESE} <= {file for file, _ in links(page)}


@pytest.mark.parametrize("page", CHINESE, ids=lambda path: path.name)
def test_a_chinese_page_has_the_commands_of_the_english_one_and_each_links_to_the_other(page: Path):
    english = ROOT / "docs/guide" / page.name
    assert page in {file for file, _ in links(english)}
    assert english in {file for file, _ in links(page)}
    here, there = (
        [line.partition("#")[0].strip() for block in SHELL.findall(each.read_text("utf-8"))
         for line in block.splitlines()]
        for each in (page, english)
    )  # fmt: skip
    assert here == there


@each_page
def test_every_command_and_option_exists(page: Path):
    for name, rest in COMMAND.findall(code(page)):
        assert name in commands, f"yrun {name}"
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(OPTION.findall(rest)) <= known | {"--help"}, f"yrun {name}{rest}"


@each_page
def test_every_benchmark_exists(page: Path):
    for name in BENCHMARK.findall(page.read_text("utf-8")):
        assert can_be_run(name), name


@each_page
def test_every_recipe_exists(page: Path):
    for name in RECIPE_FILE.findall(page.read_text("utf-8")):
        assert (ROOT / "recipes" / name).is_file(), name


@each_page
def test_every_recipe_key_exists(page: Path):
    for section, rest in KEY.findall(code(page)):
        path = [section, *rest[1:].split(".")]
        if path[-1] not in FILE_SUFFIXES:
            assert has_key(schema, path), ".".join(path)


@each_page
def test_every_yaml_block_is_a_valid_part_of_a_recipe(page: Path):
    whole = yaml.safe_load((ROOT / "recipes/legal_sft.yaml").read_text("utf-8"))
    for block in YAML.findall(page.read_text("utf-8")):
        part = yaml.safe_load(block)
        if "train" not in part.get("data", {"train": []}):
            part["data"] = {**whole["data"], **part["data"]}
        Draft202012Validator(schema).validate({**whole, **part})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_comments_of_recipes_name_what_exists(recipe: Path):
    comments = "\n".join(re.findall(r"#.*", recipe.read_text("utf-8")))
    for page in re.findall(r"docs/[\w/-]+\.md", comments):
        assert (ROOT / page).is_file(), page
    for name in BENCHMARK.findall(comments):
        assert can_be_run(name), name


def test_every_file_that_contributing_names_exists():
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    named = re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+(?:\.py|/))`", tables)
    assert len(named) > 30
    missing = [
        name for name in named if not any((ROOT / top / name).exists() for top in ("yrunner", ""))
    ]
    assert not missing
