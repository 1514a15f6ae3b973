"""A board that runs in a process of its own, over small run folders."""

import http.client
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from yrunner.storage.run_dir import RunDir, SortDir, write_json, write_text

HANGS_AFTER = 60
"""Seconds after which an answer hangs."""

needs_extra = pytest.mark.skipif(
    not (find_spec("starlette") and find_spec("uvicorn")),
    reason="starlette and uvicorn are not installed: pip install 'yrunner[board]'",
)


def make_run(root: Path, name: str, records: int = 30, **recipe: Any) -> RunDir:
    """A run folder as a training leaves it behind, without a model."""
    run = RunDir(root / name)
    run.folder.mkdir(parents=True)
    content = {
        "name": name,
        "model": {"base": "some/base"},
        "tuning": {"kind": "lora"},
        "loss": {"kind": "nlirg"},
        "train": {"stage": "sft", "epochs": 2, "max_steps": None},
        **recipe,
    }
    write_text(run.recipe, json.dumps(content))  # JSON is YAML too
    write_json(run.fingerprint, {"recipe": content})
    write_json(run.environment, {"versions": {"torch": "2"}, "device": "CPU", "command": ["yrun"]})
    write_text(run.metrics, "".join(record_line(step, records) for step in range(1, records + 1)))
    return run


def record_line(step: int, last: int) -> str:
    """One line of metrics.jsonl."""
    figures = {
        "loss": 3 / step,
        "zone_easy": 0.5,
        "zone_learning": 0.5,
        "learning_rate": 1e-4,
        "memory_gib": 1.5,
        "reward_accuracy": 0.75,
        "targets": 100,
        "targets_per_second": 50.0,
        "epoch": 2 * step / (2 * last),
    }
    return json.dumps({"step": step, **figures}) + "\n"


def make_sort(run: RunDir, rows: int = 6) -> SortDir:
    """A finished sort of a run: the last row is dropped."""
    sort = SortDir(run.sort, ".jsonl")
    sort.folder.mkdir()
    write_text(sort.recipe, run.recipe.read_text())
    lines = [json.dumps({"instruction": f"Q{n}?", "output": f"A{n}"}) for n in range(1, rows + 1)]
    order = [*range(2, rows), 1]  # the first row is the last of the sorted corpus
    write_text(sort.sorted, "".join(f"{lines[number - 1]}\n" for number in order))
    write_text(sort.dropped, f"{lines[-1]}\n")
    write_text(sort.reasons, json.dumps({"file": "a.jsonl", "row": rows, "reason": "bad"}) + "\n")
    scores = [
        {
            "file": "a.jsonl",
            "row": number,
            "place": order.index(number) + 1 if number in order else None,
            "dropped": None if number in order else "bad",
            "num_targets": 2,
            "scores": {"excess": float(number), "similarity": 0.1},
            "cluster": 1 if number <= 4 else 0,
            "plane": [number, -number % 3],
            "worst": None,
        }
        for number in range(1, rows + 1)
    ]
    write_text(sort.scores, "".join(json.dumps(score) + "\n" for score in scores))
    typical = [{"file": "a.jsonl", "row": number} for number in (3, 1)]
    clusters = [
        {"cluster": 1, "rows": 4, "suspicious": 0, "words": ["tea", "茶叶"], "typical": typical},
        {"cluster": 0, "rows": 2, "suspicious": 1, "words": [], "typical": []},
    ]
    write_text(sort.clusters, json.dumps({"deciding": "excess", "clusters": clusters}))
    write_text(sort.report, "<!doctype html><title>sorted</title><p>the sort")
    return sort


@dataclass
class RunningBoard:
    """A board's process, and a browser's part of the talk with it."""

    address: str
    process: subprocess.Popen[str]
    root: Path
    cookie: str = ""
    key: str = ""
    host: str = field(init=False)
    port: int = field(init=False)

    def __post_init__(self) -> None:
        found = re.fullmatch(r"http://([\d.]+):(\d+)/\?token=[\w-]{40,}", self.address)
        assert found, self.address
        self.host, self.port = found[1], int(found[2])

    @property
    def origin(self) -> str:
        return f"http://{self.host}:{self.port}"

    def log_in(self) -> None:
        """What a browser does with the address."""
        status, headers, _ = self.ask("GET", self.address.removeprefix(self.origin))
        assert status == 303 and headers["location"] == "/"
        assert {"HttpOnly", "SameSite=strict"} <= set(headers["set-cookie"].split("; "))
        self.cookie = headers["set-cookie"].split(";")[0]
        page = self.ask("GET", "/")[2].decode()
        found = re.search(r'name="request-key" content="([\w-]+)"', page)
        assert found
        self.key = found[1]

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content; `headers` with _ for -, an empty one is left out."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {"Cookie": self.cookie, **given}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host="Host" in sent)
            if body is not None and "Content-Length" not in sent:
                sent["Content-Length"] = str(len(body))
            for name, value in sent.items():
                if value:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, _, content = self.ask("GET", path)
        assert status == 200, content
        return json.loads(content)

    def post(self, path: str, content: Any) -> tuple[int, Any]:
        """A request of the page itself."""
        status, _, said = self.ask(
            "POST",
            path,
            json.dumps(content).encode(),
            Origin=self.origin,
            Content_Type="application/json",
            X_Yrun_Board=self.key,
        )
        return status, json.loads(said)


StartBoard = Callable[..., RunningBoard]


@pytest.fixture(scope="module")
def start_board() -> Iterator[StartBoard]:
    """Start `yrun board` on a folder; `cwd` is where it runs."""
    processes: list[subprocess.Popen[str]] = []

    def start(root: Path, cwd: Path) -> RunningBoard:
        process = subprocess.Popen(
            [sys.executable, "-m", "yrunner.cli", "board", str(root)],
            cwd=cwd,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        board = RunningBoard(process.stdout.readline().split()[-1], process, root)
        board.log_in()
        return board

    yield start
    for process in processes:
        process.terminate()
        process.wait(timeout=HANGS_AFTER)


@pytest.fixture(scope="module")
def board(start_board: StartBoard, tmp_path_factory: pytest.TempPathFactory) -> RunningBoard:
    """A board over two runs, one of them sorted."""
    here = tmp_path_factory.mktemp("here")
    root = here / "outputs"
    one = make_run(root, "one")
    make_sort(one)
    write_text(
        one.report, "<!doctype html><title>x</title><script>parent.document.title='owned'</script>"
    )
    make_run(root, "two", records=12, loss={"kind": "plain"})
    (here / "secret.txt").write_text("secret-outside")
    (root / "one" / "eval.html").symlink_to(here / "secret.txt")
    return start_board(root, here)
