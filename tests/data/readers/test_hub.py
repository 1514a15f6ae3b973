"""Data of the Hub: downloaded once, found again without a network, every failure a sentence.

A server on this machine answers as the Hub does, so that the real client is what is tested.
"""

import json
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

from yrunner.data.readers.files import read_rows
from yrunner.data.readers.hub import hub_files
from yrunner.errors import DataError

COMMIT = "1234567890" * 4
ROW = b'{"text": "a"}\n'
DATASETS = {
    "fog/one": ["README.md", "dataset_infos.json", "rows.jsonl"],
    "fog/split": ["train-0-of-2.jsonl", "train-1-of-2.jsonl", "test.jsonl", "notes/map.txt"],
    "fog/kinds": ["train.jsonl", "train.csv"],
    "fog/sets": ["en/train.jsonl", "zh/train.jsonl", *(f"old/{n}.jsonl" for n in range(10))],
    "fog/parts": ["train_sft-0.jsonl", "train_gen-0.jsonl", "constrained.jsonl"],
    "fog/signs": ["[a]*.jsonl", "a1.jsonl"],
    "fog/pictures": ["a.png"],
    "fog/cut": ["rows.jsonl"],
}


class Hub(BaseHTTPRequestHandler):
    """The few pages of the Hub that a download asks for; `asked` holds every request."""

    asked: list[str]

    def do_GET(self) -> None:
        self.answer(self.path)

    def do_HEAD(self) -> None:
        self.answer(self.path)

    def answer(self, path: str) -> None:
        self.asked.append(f"{self.command} {path}")
        path = unquote(path.split("?")[0]).removeprefix("/api").removeprefix("/datasets/")
        owner, name, page, *rest = [*path.split("/"), "", ""]
        files = DATASETS.get(f"{owner}/{name}", [])
        if name == "secret":
            self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif name == "broken":
            self.send(500, b"")
        elif not files:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif not page or (page == "revision" and rest[0] in ("main", COMMIT)):
            siblings = [{"rfilename": file} for file in files]
            self.send_json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings})
        elif page == "tree":
            oid = sha1(ROW).hexdigest()
            self.send_json(
                [{"type": "file", "path": file, "size": len(ROW), "oid": oid} for file in files]
            )
        elif name == "cut" and page == "resolve" and self.command == "GET":
            self.close_connection = True
        elif page == "resolve" and "/".join(rest[1:-2]) in files:
            self.send(200, ROW, {"X-Repo-Commit": COMMIT, "ETag": f'"{sha1(ROW).hexdigest()}"'})
        else:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def point_to(monkeypatch, tmp_path):
    """Make the Hub's client ask another address, with an empty cache of its own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)  # before the client tries again
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def point(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return point


@pytest.fixture
def asked(point_to, address, monkeypatch) -> list[str]:
    """What the server was asked for."""
    point_to(address)
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    return Hub.asked


def refusal(name: str, **choice: str) -> str:
    with pytest.raises(DataError) as refused:
        hub_files(name, **choice)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def names(name: str, **choice: str) -> list[str]:
    return [path.name for path in hub_files(name, **choice)]


def test_the_only_data_file_is_downloaded_and_read(asked):
    (path,) = hub_files("fog/one")
    assert [row for _, row in read_rows(path)] == [{"text": "a"}]
    assert not any("README" in request for request in asked)


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_second_time_nothing_is_downloaded_and_no_network_is_needed(revision, asked, point_to):
    first = hub_files("fog/split", revision=revision)
    asked.clear()
    assert hub_files("fog/split", revision=revision) == first
    assert not any("resolve" in request for request in asked)
    point_to("http://127.0.0.1:9")
    assert hub_files("fog/split", revision=revision) == first
    assert refusal("fog/split", files="test.jsonl", revision=revision).startswith(
        "fog/split: the Hub is unreachable, and this dataset is not fully cached"
    )


def test_offline_by_wish_the_cache_is_enough(asked, monkeypatch):
    first = hub_files("fog/one")
    asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_files("fog/one") == first
    assert refusal("fog/split").startswith("fog/split: HF_HUB_OFFLINE is set, and")
    assert asked == []


def test_without_a_choice_the_parts_of_the_train_split_are_meant(asked):
    assert names("fog/split") == ["train-0-of-2.jsonl", "train-1-of-2.jsonl"]


def test_files_chooses_by_name_or_by_glob(asked):
    assert names("fog/split", files="test.jsonl") == ["test.jsonl"]
    assert names("fog/sets", files="zh/*") == ["train.jsonl"]
    assert names("fog/kinds", files="*.csv") == ["train.csv"]
    assert names("fog/signs", files="[a]*.jsonl") == ["[a]*.jsonl", "a1.jsonl"]


def test_a_commit_may_be_named_as_the_revision(asked):
    assert names("fog/one", revision=COMMIT) == ["rows.jsonl"]


@pytest.mark.parametrize("name", ["fog/kinds", "fog/sets", "fog/parts"])
def test_files_that_are_no_parts_of_one_table_must_be_chosen(name, asked):
    message = refusal(name)
    assert f"{name}: this Hub dataset has several data files and no clear train split: " in message


def test_at_most_ten_files_are_listed(asked):
    shown = ", ".join(["en/train.jsonl", *(f"old/{number}.jsonl" for number in range(9))])
    assert refusal("fog/sets", files="*.parquet") == (
        'fog/sets: no data file of this Hub dataset matches files: "*.parquet": '
        f"{shown} and 2 more. Choose with files: en/train.jsonl"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fog/none", "the Hub has no dataset with this name. Check the spelling"),
        ("fog/secret", "this Hub dataset is gated. Request access on its page"),
        ("fog/broken", "the Hub answered with status 500, and this dataset is not fully"),
        ("fog/cut", "the download from the Hub failed ("),
        ("fog/pictures", "this Hub dataset has no data files. Choose a dataset"),
    ],
)
def test_what_cannot_be_had_is_said(name, expected, asked):
    assert refusal(name).startswith(f"{name}: {expected}")


def test_an_unknown_revision_is_named(asked):
    assert refusal("fog/one", revision="v9").startswith(
        'fog/one: this Hub dataset has no revision "v9". Use a branch'
    )


def test_without_a_network_and_a_cache_it_is_said_at_once(point_to):
    point_to("http://127.0.0.1:9")
    assert refusal("fog/one").startswith("fog/one: the Hub is unreachable, and this dataset")
