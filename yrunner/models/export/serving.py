"""Commands of kept servers for a saved model: transformers serve, vLLM, llama.cpp and Ollama.

Each says where the weights are, by which name clients ask for the model, and which chat template
and end marks it has.
"""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from yrunner.errors import RunError

LOCALHOST, PORT = "127.0.0.1", 8000
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""
ADAPTER_CONFIG = "adapter_config.json"
TEMPLATE = "chat_template.jinja"


def served_name(name: str) -> str:
    """A recipe's name as clients may write it: servers split names at @ and colons."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def transformers_options(
    *, host: str = LOCALHOST, port: int = PORT, dtype: str = "auto", trust_remote_code: bool = False
) -> list[str]:
    """The options of `transformers serve`."""
    trusts = ["--trust-remote-code"] if trust_remote_code else []
    return ["--host", host, "--port", str(port), "--dtype", dtype, *trusts]


def vllm_command(
    folder: str,
    name: str,
    *,
    adapter_on: str | None = None,
    host: str = LOCALHOST,
    port: int = PORT,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> list[str]:
    """The command that serves a folder with vLLM; `adapter_on` is the base of an adapter.

    Raises `RunError` for an adapter that vLLM cannot load, and for one of too high a rank.
    """
    options = ["--host", host, "--port", str(port), "--dtype", dtype]
    options += ["--trust-remote-code"] if trust_remote_code else []
    if adapter_on is None:
        return ["vllm", "serve", folder, "--served-model-name", name, *options]
    template = ["--chat-template", str(Path(folder, TEMPLATE))]
    return [
        *("vllm", "serve", adapter_on, "--enable-lora", "--lora-modules", f"{name}={folder}"),
        *("--max-lora-rank", str(_vllm_rank(Path(folder)))),
        # Of an adapter vLLM reads neither the template nor the end marks.
        *(template if Path(folder, TEMPLATE).exists() else []),
        *("--generation-config", folder, "--tokenizer", folder, *options),
    ]


def llama_cpp_command(
    file: Path, name: str, folder: Path, *, host: str = LOCALHOST, port: int = PORT
) -> list[str]:
    """The command that serves a GGUF file with llama.cpp; the template is that of `folder`."""
    template = folder / TEMPLATE
    return [
        *("llama-server", "--model", str(file), "--alias", name, "--jinja"),
        *(["--chat-template-file", str(template)] if template.exists() else []),
        *("--host", host, "--port", str(port)),
    ]


def llama_cpp_python_command(
    file: Path, name: str, *, host: str = LOCALHOST, port: int = PORT
) -> list[str]:
    """The same with the server of llama-cpp-python, which takes the template from the file."""
    return [
        *(sys.executable, "-m", "llama_cpp.server", "--model", str(file), "--model_alias", name),
        *("--n_ctx", "0"),  # as many tokens as the model reads, not 2,048
        *("--verbose", "false"),  # else it prints thousands of lines about its computation
        *("--host", host, "--port", str(port)),
    ]


def ollama_command(modelfile: Path, name: str) -> list[str]:
    """The command that gives a model with its Modelfile to Ollama, whose server is running."""
    return ["ollama", "create", name, "-f", str(modelfile)]


def serving_lines(name: str, *, adapter_on: str | None, rank: int | None) -> str:
    """Three lines of shell for a model card: serve its folder, in two ways, and ask it."""
    name = served_name(name)
    ask = {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
    url = f"http://{LOCALHOST}:{PORT}/v1/chat/completions"
    if adapter_on is None:
        lines = [f"transformers serve . --host {LOCALHOST}    # clients name it ."]
        lines += [shlex.join(vllm_command(".", name))]
    else:
        lines = ["yrun serve RECIPE    # transformers, with base and adapter"]
        command = ["vllm", "serve", adapter_on, "--enable-lora", "--lora-modules", f"{name}=."]
        highest = next((known for known in VLLM_RANKS if known >= (rank or 0)), rank)
        command += ["--max-lora-rank", str(highest)]
        command += ["--chat-template", TEMPLATE, "--generation-config", ".", "--tokenizer", "."]
        lines += [shlex.join([*command, "--host", LOCALHOST])]
    posted = shlex.quote(json.dumps(ask, ensure_ascii=False))
    lines += [f"curl {url} -H 'Content-Type: application/json' -d {posted}"]
    return "\n".join(lines) + "\n"


def adapter_rank(config: dict[str, Any]) -> int:
    """The highest rank of an adapter's layers, by its adapter_config.json."""
    return max(int(config.get("r", 0)), *map(int, (config.get("rank_pattern") or {}).values()), 1)


def _vllm_rank(adapter: Path) -> int:
    config = json.loads((adapter / ADAPTER_CONFIG).read_text("utf-8"))
    for key, what in (
        ("use_dora", "DoRA"),
        ("trainable_token_indices", "trained tokens"),
        ("modules_to_save", "whole trained layers"),
    ):
        if config.get(key):
            raise RunError(
                f"vLLM cannot serve an adapter with {what}", remedy="merge it first: yrun merge"
            )
    return _rank_for_vllm(adapter_rank(config))


def _rank_for_vllm(rank: int) -> int:
    fitting = [known for known in VLLM_RANKS if known >= rank]
    if not fitting:
        raise RunError(
            f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}, not {rank}",
            remedy="merge it first: yrun merge",
        )
    return fitting[0]


def join_adapter(adapter: Path, base: Path, folder: Path) -> None:
    """Make `folder` of links: a base with an adapter in it, which transformers loads as one model.

    Tokenizer, chat template and end marks are the adapter's.
    """
    folder.mkdir()
    own = {file.name: file for file in adapter.iterdir()}
    for name, file in ({file.name: file for file in base.iterdir()} | own).items():
        if not name.startswith("."):
            (folder / name).symlink_to(file.resolve())
