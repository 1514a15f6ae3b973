"""Remote code never runs without a red warning."""

from pathlib import Path

from yrunner.recipe.load import load_recipe, warn_of_remote_code

LINE = "model.trust_remote_code: Python code from"


def test_no_recipe_trusts_unless_it_says_so(folder: Path, valid: str, capsys):
    Path("recipe.yaml").write_text(valid)
    warn_of_remote_code(load_recipe(Path("recipe.yaml")))
    assert capsys.readouterr().err == ""


def test_a_recipe_that_trusts_warns_on_standard_error(folder: Path, valid: str, capsys):
    Path("recipe.yaml").write_text(valid)
    warn_of_remote_code(load_recipe(Path("recipe.yaml"), ["model.trust_remote_code=true"]))
    assert f"warning: {LINE} {folder / 'base'} runs here" in capsys.readouterr().err


def test_the_trust_of_a_base_warns_too(folder: Path, valid: str, capsys):
    trusting = valid.replace("  base: ./base\n", "  base: ./base\n  trust_remote_code: true\n")
    Path("lower.yaml").write_text(trusting)
    Path("recipe.yaml").write_text(valid.replace("./base", "lower.yaml"))
    warn_of_remote_code(load_recipe(Path("recipe.yaml")))
    assert LINE in capsys.readouterr().err


def test_on_a_terminal_the_line_is_red(folder: Path, valid: str, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("yrunner.console.is_terminal", lambda stream=None: True)
    Path("recipe.yaml").write_text(valid)
    warn_of_remote_code(load_recipe(Path("recipe.yaml"), ["model.trust_remote_code=true"]))
    assert capsys.readouterr().err.startswith("\x1b[1;31mwarning: model.trust_remote_code")
