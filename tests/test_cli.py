"""The command line as a process: exit codes, messages, and no traceback for a user's mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from yrunner.cli import app, main

YRUN = [sys.executable, "-m", "yrunner.cli"]


def yrun(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*YRUN, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_a_faulty_recipe_ends_with_code_2_and_clickable_lines(tmp_path: Path):
    (tmp_path / "x.yaml").write_text("name: x\ntuning:\n  kind: lora\n  rnak: 8\n")
    result = yrun("train", "x.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert 'x.yaml:4:3: tuning.rnak: unknown key, did you mean "rank"?' in result.stderr
    assert "x.yaml:1:1: data: " in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_recipe_that_does_not_exist_ends_with_code_2():
    result = yrun("train", "nowhere.yaml")
    assert result.returncode == 2
    assert "nowhere.yaml: no such file" in result.stderr


def test_an_unknown_command_or_option_ends_with_code_2():
    assert yrun("trian").returncode == 2
    assert yrun("train", "x.yaml", "--resmue").returncode == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("yrun tr", ["train"]),
        ("yrun train --re", ["--resume"]),
        ("yrun serve x.yaml --engine ", ["transformers", "vllm", "llama.cpp", "ollama"]),
        ("yrun convert x.yml --from tr", ["trl"]),
        ("yrun train reci", []),  # the shell completes file names itself
    ],
)
def test_a_shell_completes_commands_options_and_choices(words, expected, monkeypatch, capsys):
    number = len(words.split()) - (not words.endswith(" "))
    for name, value in {"COMP_WORDS": words, "COMP_CWORD": str(number)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_YRUN_COMPLETE", "complete_bash")
    with pytest.raises(SystemExit) as ended:
        app(prog_name="yrun")
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == expected


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path):
    result = yrun("train", "x.yaml", "--resume", "--overwrite", cwd=tmp_path)
    assert result.returncode == 2
    assert "--resume and --overwrite cannot be combined. Choose one" in result.stderr


def test_the_schema_goes_into_a_pipe_that_closes_early_silently():
    result = subprocess.run(
        f"{sys.executable} -m yrunner.cli schema | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "{\n"
    assert result.stderr == ""


def test_a_bug_of_ours_ends_with_code_1_a_traceback_and_where_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("yrunner.cli.app", lambda: 1 / 0)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    errors = capsys.readouterr().err
    assert "ZeroDivisionError" in errors
    assert "please report it" in errors


def test_an_interrupt_ends_with_code_130(monkeypatch: pytest.MonkeyPatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("yrunner.cli.app", interrupted)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130


def test_init_copies_recipes_that_load(tmp_path: Path):
    result = yrun("init", "mine", cwd=tmp_path)
    assert result.returncode == 0
    assert "yrun train mine/legal_sft.yaml" in result.stdout
    from yrunner.recipe.load import load_recipe

    assert load_recipe(tmp_path / "mine" / "legal_sft.yaml").name == "legal-sft"
    again = yrun("init", "mine", cwd=tmp_path)
    assert again.returncode == 2
    assert "mine already exists. Name a new folder" in again.stderr


def test_a_full_disk_is_a_sentence_and_not_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full() -> None:
        raise OSError(28, "No space left on device", "outputs/x/metrics.jsonl")

    monkeypatch.setattr("yrunner.cli.app", full)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    sentence = "outputs/x/metrics.jsonl: No space left on device. Free some disk space"
    assert errors.startswith(sentence)
    assert "Traceback" not in errors


def test_an_interrupt_during_heavy_imports_ends_with_code_130_and_one_word():
    program = (
        "import signal; from yrunner.process import exiting_on_interrupt\n"
        "with exiting_on_interrupt():\n    signal.raise_signal(signal.SIGINT)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (130, "stopped\n")


@pytest.mark.parametrize(("loaded", "is_frozen"), [("no_such_module", True), ("torch", False)])
def test_what_the_first_imports_made_is_not_searched_for_garbage_again(loaded, is_frozen):
    program = (
        "import gc, sys; from yrunner.process import exiting_on_interrupt\n"
        f"sys.modules['{loaded}'] = gc; usual = gc.get_threshold()\n"
        "with exiting_on_interrupt():\n    within = gc.get_threshold()\n"
        "print(gc.get_threshold() == usual, within > usual, gc.get_freeze_count() > 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"True {is_frozen} {is_frozen}\n"


def test_train_says_at_once_what_it_trains(tmp_path: Path):
    recipe = tmp_path / "x.yaml"
    rows = "data: {train: [{file: x.jsonl}]}"
    recipe.write_text(f"name: x\noutput: there\nmodel: {{base: ./base}}\n{rows}\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "x.jsonl").touch()
    program = (
        "import sys; from yrunner.cli import main\n"
        "sys.modules['torch'] = None; sys.argv = ['yrun', 'train', 'x.yaml']; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout == "x: sft of base, tuning lora, loss plain, to there\n"


@pytest.fixture(scope="module")
def imported() -> subprocess.CompletedProcess[str]:
    """A process that imports what a command needs, adds an adapter, and imports everything."""
    program = (
        "import sys; from yrunner.cli import main; sys.argv = ['yrun', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "from yrunner.process import exiting_on_interrupt\n"
        "with exiting_on_interrupt():\n    import yrunner.commands.train\n"
        "print(sorted({'matplotlib', 'sacrebleu'} & sys.modules.keys()))\n"
        "import accelerate.utils, peft.import_utils, transformers.utils\n"
        "from peft import LoraConfig, get_peft_model\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)\n"
        "model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))\n"
        "get_peft_model(model, LoraConfig(target_modules='all-linear'))\n"
        "print(sorted({'bitsandbytes', 'deepspeed', 'scipy'} & sys.modules.keys()))\n"
        "print(peft.import_utils.is_bnb_available(), accelerate.utils.is_bnb_available(), "
        "transformers.utils.is_bitsandbytes_available())\n"
        "import bitsandbytes, deepspeed, sklearn; print('imported')"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )


def test_commands_import_no_library_that_they_may_not_need(imported):
    assert "\n[]\nTrue True True\n" in imported.stdout


def test_a_training_draws_nothing_before_its_report(imported):
    assert "\n[]\n[]\nTrue True True\n" in imported.stdout


def test_harmless_warnings_are_silent_on_import(imported):
    assert "gemm_4bit" not in imported.stderr
    assert imported.stdout.endswith("imported\n")


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    from typer.testing import CliRunner

    from yrunner.cli import app

    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"yrunner {version('yrunner')}\n")


def test_a_program_ends_with_its_code_after_all_that_is_due(tmp_path: Path):
    program = (
        "import atexit, sys, threading, time\n"
        "from yrunner.process import run_program\n"
        "class Dear:\n"
        "    def __del__(self): print('taken apart')\n"
        "dear = Dear()\n"
        "def main():\n"
        "    atexit.register(print, 'tracker has sent all')\n"
        "    later = lambda: (time.sleep(0.2), print('thread has ended'))\n"
        "    threading.Thread(target=later).start()\n"
        "    sys.exit(int(sys.argv[1]))\n"
        "run_program(main)"
    )
    for code in (0, 3):
        result = subprocess.run(
            [sys.executable, "-c", program, str(code)], capture_output=True, text=True, check=False
        )
        assert result.returncode == code
        assert result.stdout == "thread has ended\ntracker has sent all\n"
