"""`yrun serve`: start a kept server on the trained model of a recipe."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.constants import HF_HUB_CACHE

from yrunner.assembly.run import Run
from yrunner.console import say, warn
from yrunner.distributed.launcher import COMMAND
from yrunner.errors import MissingError, RunError, Stopped
from yrunner.models.adapters import find_adapter
from yrunner.models.export.serving import (
    LOCALHOST,
    PORT,
    join_adapter,
    llama_cpp_command,
    llama_cpp_python_command,
    ollama_command,
    served_name,
    transformers_options,
    vllm_command,
)
from yrunner.models.load import choose_dtype
from yrunner.models.local import local_folder

NEEDED = ("fastapi", "uvicorn", "openai")
HOW_TO_GET = {
    "vllm": "pip install vllm",
    "llama-server": "install llama.cpp, such as with brew install llama.cpp, or run pip install "
    "'llama-cpp-python[server]', which has a server too",
    "ollama": "install Ollama from ollama.com",
}
OF_LLAMA_CPP_PYTHON = ("llama_cpp", "fastapi", "sse_starlette", "starlette_context",
                       "pydantic_settings")  # fmt: skip
"""What llama-cpp-python[server] brings."""
SECONDS_TO_END = 20
# `transformers serve`, which also ends when this process is killed.
TRANSFORMERS = (
    "from yrunner.distributed.launcher import die_with_command; die_with_command(); "
    "from transformers.cli.transformers import app; app()"
)


def serve(
    path: Path,
    overrides: list[str],
    *,
    engine: str = "transformers",
    host: str = LOCALHOST,
    port: int = PORT,
    only_print: bool = False,
) -> None:
    """Serve the result of a recipe until Ctrl-C; `only_print`: print the command instead.

    Raises `RunError` if there is no result in the engine's form, and `MissingError` for an engine
    that is not installed.
    """
    run = Run.load(path, overrides)
    run.require_result()
    name = served_name(run.recipe.name)
    if engine == "transformers":
        _serve_with_transformers(run, name, host, port, only_print=only_print)
        return
    command = _command(run, engine, name, host, port)
    say(shlex.join(command))
    if only_print:
        return
    if shutil.which(command[0]) is None:
        raise MissingError(
            f"{command[0]} is not installed here; the command above serves the model where it is",
            remedy=HOW_TO_GET[command[0]],
        )
    if engine == "ollama":
        _run(command)
        say(f"ask for {name} at http://{LOCALHOST}:11434/v1, or: ollama run {name}")
        return
    _check_address(host, port)
    _say_how_to_ask(run, name, host, port)
    _run(command)


def _serve_with_transformers(
    run: Run, name: str, host: str, port: int, *, only_print: bool
) -> None:
    model, merged = run.folder.model, run.folder.merged
    folder = merged if merged.exists() else model
    options = transformers_options(
        host=host,
        port=port,
        dtype=str(choose_dtype(run.recipe.model.dtype)).removeprefix("torch."),
        trust_remote_code=run.recipe.model.trust_remote_code,
    )
    is_adapter = find_adapter(str(folder)) is not None
    if only_print and is_adapter:
        raise RunError(
            f"{folder} is an adapter, which transformers serve does not take by itself",
            remedy=f"run yrun merge {run.options.arguments} first, or serve it without --print",
        )
    say(shlex.join(["transformers", "serve", str(folder), *options]))
    if only_print:
        return
    lacking = [package for package in NEEDED if find_spec(package) is None]
    if lacking:
        raise MissingError(
            f"transformers serve needs {', '.join(lacking)}",
            remedy="run pip install 'yrunner[serve]'",
        )
    _check_address(host, port)
    # The server lists the models of the Hub's cache, and fails if there is none.
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="yrun-serve-") as place:
        if is_adapter:
            join_adapter(folder, Path(_whole_base(run)), Path(place, name))
        else:
            Path(place, name).symlink_to(folder)
        _say_how_to_ask(run, name, host, port)
        # By a short name: transformers splits paths at @ and colons, and takes no other name.
        _run([sys.executable, "-c", TRANSFORMERS, "serve", name, *options], place)


def _command(run: Run, engine: str, name: str, host: str, port: int) -> list[str]:
    folder, arguments = run.folder, run.options.arguments
    if engine == "vllm":
        source = folder.merged if folder.merged.exists() else folder.model
        is_adapter = find_adapter(str(source)) is not None
        if is_adapter and run.recipe.tuning.kind == "qlora":
            raise RunError(
                "vLLM would load the base in full precision, not as this adapter was trained",
                remedy=f"run yrun merge {arguments} first",
            )
        dtype = choose_dtype(run.recipe.model.dtype)
        return vllm_command(
            str(source),
            name,
            adapter_on=_whole_base(run) if is_adapter else None,
            host=host,
            port=port,
            dtype=str(dtype).removeprefix("torch."),
            trust_remote_code=run.recipe.model.trust_remote_code,
        )
    files = sorted(folder.gguf.glob("*.gguf")) if folder.gguf.exists() else []
    if not files:
        raise RunError(
            f"{run.recipe.name} has no GGUF file, which {engine} serves",
            remedy=f"run yrun merge {arguments} merge.gguf=q8_0",
        )
    if engine == "ollama":
        return ollama_command(folder.gguf / "Modelfile", name)
    if shutil.which("llama-server") is None and all(map(find_spec, OF_LLAMA_CPP_PYTHON)):
        return llama_cpp_python_command(files[0], name, host=host, port=port)
    return llama_cpp_command(files[0], name, folder.merged, host=host, port=port)


def _whole_base(run: Run) -> str:
    """The folder of the base of an adapter. Raises `RunError` if it holds no whole model."""
    base = local_folder(run.base_source)
    if base is None or not (base / "config.json").is_file():
        raise RunError(
            f"the base {run.base_source} is not here, or is itself an adapter",
            remedy=f"run yrun merge {run.options.arguments} first",
        )
    return str(base)


def _check_address(host: str, port: int) -> None:
    """Raise `RunError` if another program has the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RunError(
                f"{host}:{port} cannot be used: {error.strerror}",
                remedy=f"choose another port, such as --port {port + 1}",
            ) from error
    if host not in (LOCALHOST, "localhost", "::1"):
        warn(f"{host} is open to whoever reaches this machine: the server asks for no password")


def _say_how_to_ask(run: Run, name: str, host: str, port: int) -> None:
    system = run.recipe.data.system
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "..."})
    reached = LOCALHOST if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    shown = json.dumps(messages, ensure_ascii=False)
    say("from openai import OpenAI")
    say(f'client = OpenAI(base_url="http://{reached}:{port}/v1", api_key="none")')
    say(f'client.chat.completions.create(model="{name}", temperature=0, messages={shown})')
    say("Ctrl-C stops the server")


def _run(command: list[str], folder: str | None = None) -> None:
    """Run a server until it ends or a signal comes, and leave no process of it.

    Raises `RunError` if it fails, and `Stopped` after a signal.
    """
    stopped_by: list[int] = []
    # In a session of its own Ctrl-C reaches it once, from here, and its own children end with it.
    child = subprocess.Popen(
        command, cwd=folder, env={**os.environ, COMMAND: str(os.getpid())}, start_new_session=True
    )

    def stop(number: int, _frame: object) -> None:
        stopped_by.append(number)
        child.send_signal(signal.SIGINT if len(stopped_by) == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = _wait(child, stopped_by)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopped_by:
        raise Stopped(stopped_by[0], remedy="")
    if code:
        raise RunError(
            f"{Path(command[0]).name} ended with exit code {code}", remedy="its own lines say why"
        )


def _wait(child: "subprocess.Popen[bytes]", stopped_by: list[int]) -> int:
    while not stopped_by:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=0.5)
    try:
        return child.wait(timeout=SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
