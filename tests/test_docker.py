"""What the Dockerfiles copy and install exists."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]


def test_there_is_one_for_processors_and_one_for_gpus():
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_image_gets_all_that_the_package_is_built_of(path: Path):
    text = path.read_text("utf-8")
    copied = {word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for name in copied:
        assert (ROOT / name).exists(), name
        assert not any(fnmatch(name, pattern) for pattern in ignored)
    assert copied >= {"pyproject.toml", "README.md", "LICENSE", "yrunner", "recipes"}
    assert "deepspeed_configs" in copied, "the wheel carries it"
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert set(extras.split(",")) <= set(EXTRAS)
    assert 'ENTRYPOINT ["yrun"]' in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_commands_in_the_comments_build_and_run_this_image(path: Path):
    comments = "\n".join(re.findall(r"^# (.*)$", path.read_text("utf-8"), re.M))
    (image,) = re.findall(r"-t (\S+) \.", comments)
    assert f"docker build -f docker/{path.name} -t {image} ." in comments
    assert re.search(rf"docker run .* {image} ", comments)
