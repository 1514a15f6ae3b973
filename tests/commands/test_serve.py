"""`yrun serve`: an OpenAI client gets the answers of `yrun chat`, and Ctrl-C leaves no process."""

import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pytest

from yrunner.commands.chat import chat
from yrunner.commands.merge.command import merge
from yrunner.commands.serve import serve
from yrunner.commands.train import train
from yrunner.errors import MissingError, RunError
from yrunner.models.export.serving import (
    adapter_rank,
    served_name,
    serving_lines,
    vllm_command,
)

TUNED = Path("tuned.yaml")
QUESTION = "Capital of Aru, question 20?"
MOST_TOKENS = 12
SECONDS_TO_START = 240


@pytest.fixture
def tuned(trained_base: Path) -> Path:
    train(TUNED, ["eval={}", "train.epochs=4"], resume=False, overwrite=False)
    return trained_base


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children_of(process: "subprocess.Popen[bytes]") -> list[int]:
    """The ids of the processes that a process has started."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8")
    return [int(child) for child in listed.split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[Any, "subprocess.Popen[bytes]"]]:
    """A client of a server that has started, and its process."""
    from openai import OpenAI

    port = free_port()
    command = [sys.executable, "-m", "yrunner.cli", "serve", *arguments, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    without_proxy = build_opener(ProxyHandler({}))
    try:
        for _ in range(4 * SECONDS_TO_START):
            assert server.poll() is None, server.communicate()[0].decode()
            try:
                without_proxy.open(f"{address}/health", timeout=10)
                break
            except URLError:
                time.sleep(0.25)
        yield OpenAI(base_url=f"{address}/v1", api_key="none"), server
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)


def ask(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(
        model="tuned",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=MOST_TOKENS,
        **options,
    )


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_client_gets_the_answers_of_chat_streamed_and_not(
    is_merged, tuned, forks, monkeypatch, capsys
):
    pytest.importorskip("openai", reason="pip install 'yrunner[serve]'")
    pytest.importorskip("fastapi", reason="pip install 'yrunner[serve]'")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    capsys.readouterr()
    chat(TUNED, [], max_new_tokens=MOST_TOKENS)
    expected = capsys.readouterr().out.strip()
    assert expected
    if is_merged:
        merge(TUNED, [])
    temporary = tuned / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("HF_HOME", str(tuned / "no cache yet"))
    with serving("tuned.yaml") as (client, server):
        assert list(client.models.list()) is not None, "programs ask which models there are"
        whole = ask(client)
        assert whole.choices[0].message.content.strip() == expected
        pieces = [piece.choices[0].delta.content for piece in ask(client, stream=True)]
        assert "".join(piece or "" for piece in pieces).strip() == expected
        assert len([piece for piece in pieces if piece]) > 1
        children = children_of(server)
        assert children
        assert list(temporary.glob("yrun-serve-*"))
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 128 + signal.SIGINT
        output = server.communicate()[0].decode()
    assert "Traceback" not in output
    assert output.splitlines()[-1] == "stopped"
    assert output.count("stopped") == 1
    assert 'client.chat.completions.create(model="tuned"' in output
    assert not list(temporary.glob("yrun-serve-*"))
    assert not any(map(is_running, children)), "no process is left"


def test_a_killed_command_takes_its_server_with_it(tuned, forks):
    pytest.importorskip("openai", reason="pip install 'yrunner[serve]'")
    pytest.importorskip("fastapi", reason="pip install 'yrunner[serve]'")
    with serving("tuned.yaml") as (_, server):
        children = children_of(server)
        assert children
        server.kill()
        server.wait()
        for _ in range(100):
            if not any(map(is_running, children)):
                break
            time.sleep(0.2)
        assert not any(map(is_running, children))


def test_the_command_of_each_engine_is_printed(tuned, capsys):
    serve(TUNED, [], engine="vllm", only_print=True)
    words = shlex.split(capsys.readouterr().out.replace("\n", " "))
    assert words[:4] == ["vllm", "serve", str(tuned / "outputs/base/model"), "--enable-lora"]
    options = dict(pairwise(words))
    adapter = tuned / "outputs/tuned/model"
    assert options["--lora-modules"] == f"tuned={adapter}"
    assert options["--max-lora-rank"] == "8", "the lowest that vLLM takes and the adapter fits in"
    assert options["--chat-template"] == str(adapter / "chat_template.jinja")
    assert options["--generation-config"] == options["--tokenizer"] == str(adapter)
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "8000")
    for engine in ("llama.cpp", "ollama"):
        with pytest.raises(RunError, match=r"no GGUF file.*yrun merge tuned\.yaml merge\.gguf="):
            serve(TUNED, [], engine=engine, only_print=True)
    with pytest.raises(RunError, match=r"is an adapter.*yrun merge tuned\.yaml first"):
        serve(TUNED, [], only_print=True)
    merge(TUNED, ["merge.gguf=q8_0"])
    capsys.readouterr()
    serve(TUNED, [], only_print=True, host="0.0.0.0", port=81)
    merged = tuned / "outputs/tuned/merged"
    assert f"transformers serve {merged} --host 0.0.0.0 --port 81" in _joined(capsys)
    serve(TUNED, [], engine="vllm", only_print=True)
    assert f"vllm serve {merged} --served-model-name tuned" in _joined(capsys)
    serve(TUNED, [], engine="llama.cpp", only_print=True)
    assert "llama-server --model" in (said := _joined(capsys))
    assert f"--jinja --chat-template-file {merged / 'chat_template.jinja'}" in said
    serve(TUNED, [], engine="ollama", only_print=True)
    assert f"ollama create tuned -f {tuned / 'outputs/tuned/gguf/Modelfile'}" in _joined(capsys)


def test_without_llama_server_the_one_of_llama_cpp_python_is_taken(tuned, monkeypatch, capsys):
    merge(TUNED, ["merge.gguf=q8_0"])
    monkeypatch.setattr("shutil.which", lambda _: None)
    said = []
    for is_there in (True, False):
        monkeypatch.setattr("yrunner.commands.serve.find_spec", lambda _, found=is_there: found)
        capsys.readouterr()
        serve(TUNED, [], engine="llama.cpp", only_print=True)
        said.append(shlex.split(capsys.readouterr().out))
    assert said[0][:3] == [sys.executable, "-m", "llama_cpp.server"]
    options = dict(pairwise(said[0]))
    assert options["--model"] == str(tuned / "outputs/tuned/gguf/tuned-q8_0.gguf")
    assert (options["--model_alias"], options["--n_ctx"]) == ("tuned", "0")
    assert options["--verbose"] == "false"
    assert said[1][0] == "llama-server"


def _joined(capsys: Any) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_what_is_missing_is_named_with_how_to_get_it(tuned, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(MissingError, match=r"vllm is not installed here.*[Pp]ip install vllm"):
        serve(TUNED, [], engine="vllm")
    monkeypatch.setattr("yrunner.commands.serve.find_spec", lambda _: None)
    with pytest.raises(MissingError, match=r"needs fastapi, .*yrunner\[serve\]"):
        serve(TUNED, [])


def test_an_installed_engine_is_started_and_its_failure_is_told(tuned, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" > called.txt\nexit 3\n', "utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RunError, match="vllm ended with exit code 3"):
        serve(TUNED, [], engine="vllm", port=free_port())
    assert "--enable-lora" in Path("called.txt").read_text("utf-8")


def test_a_port_in_use_is_refused_before_a_model_loads(tuned, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=rf"127\.0\.0\.1:{port} cannot be used.*--port"):
            serve(TUNED, [], engine="vllm", port=port)


def test_a_recipe_without_a_result_is_not_served(trained_base):
    with pytest.raises(RunError, match="has no result"):
        serve(TUNED, [])


@pytest.mark.parametrize(
    ("config", "rank"),
    [({"r": 16}, 16), ({"r": 4, "rank_pattern": {"q": 60}}, 60), ({"r": 0}, 1)],
)
def test_the_rank_for_vllm_is_that_of_the_largest_layer(config, rank, tmp_path):
    assert adapter_rank(config) == rank
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    command = vllm_command(str(tmp_path), "m", adapter_on="org/base")
    assert int(command[command.index("--max-lora-rank") + 1]) >= rank


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"trainable_token_indices": [1]}, {"r": 1024}]
)
def test_an_adapter_that_vllm_cannot_load_is_to_be_merged(config, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8} | config), "utf-8")
    with pytest.raises(RunError, match=r"[Mm]erge it first: yrun merge"):
        vllm_command(str(tmp_path), "m", adapter_on="org/base")


def test_the_card_has_three_lines_that_serve_the_folder_and_ask_it():
    assert served_name("my run@2: 法律") == "my-run-2-法律"
    for adapter_on in (None, "org/base"):
        lines = serving_lines("my run", adapter_on=adapter_on, rank=12).splitlines()
        assert len(lines) == 3
        assert ("--max-lora-rank 16" in lines[1]) == (adapter_on is not None)
        assert json.loads(shlex.split(lines[2])[-1])["model"] == "my-run"


def test_an_adapter_on_an_adapter_is_to_be_merged(tuned, monkeypatch):
    (tuned / "outputs/base/model/config.json").unlink()
    for engine in ("vllm", "transformers"):
        monkeypatch.setattr("yrunner.commands.serve.find_spec", lambda _: True)
        with pytest.raises(RunError, match=r"is itself an adapter.*yrun merge tuned\.yaml first"):
            serve(TUNED, [], engine=engine, port=free_port())
