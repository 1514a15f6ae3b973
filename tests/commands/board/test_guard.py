"""Nobody but the page itself gets anything from a board, and the page nothing from outside."""

import http.client
import json
import os
import socket
from pathlib import Path

import pytest

from tests.commands.board.conftest import RunningBoard, needs_extra

pytestmark = needs_extra

OWN = {"method": "GET", "path": "/api/runs"}
CHANGE = {
    "method": "POST",
    "path": "/api/start",
    "body": b'{"command": "train", "recipe": "r.yaml"}',
    "Content_Type": "application/json",
}
HOSTILE = {
    "no cookie": {**OWN, "Cookie": ""},
    "a wrong cookie": {**OWN, "Cookie": "yrun_board_{port}=guess"},
    "the cookie of another port": {**OWN, "Cookie": "yrun_board_1={session}"},
    "the address's token as the cookie": {**OWN, "Cookie": "yrun_board_{port}={token}"},
    "a wrong token": {**OWN, "path": "/?token=guess", "Cookie": ""},
    "the token at another address": {**OWN, "path": "/api/runs?token={token}", "Cookie": ""},
    "a name that was made to point here": {**OWN, "Host": "evil.example:{port}"},
    "our name at another port": {**OWN, "Host": "127.0.0.1:1"},
    "no port": {**OWN, "Host": "127.0.0.1"},
    "a name that begins like ours": {**OWN, "Host": "127.0.0.1.evil.example:{port}"},
    "another page reads": {**OWN, "Origin": "https://evil.example"},
    "a page without an origin": {**OWN, "Origin": "null"},
    "another port of this machine": {**OWN, "Origin": "http://127.0.0.1:1"},
    "a link on another page": {**OWN, "Sec_Fetch_Site": "cross-site"},
    "an image on another port": {**OWN, "Sec_Fetch_Site": "same-site"},
    "a frame with the token": {**OWN, "path": "/?token={token}", "Sec_Fetch_Site": "cross-site"},
    "a change without its origin": {**CHANGE, "X_Yrun_Board": "{key}"},
    "a change of another origin": {
        **CHANGE,
        "X_Yrun_Board": "{key}",
        "Origin": "https://evil.example",
    },
    "a change without the page's key": {**CHANGE, "Origin": "{origin}"},
    "a change with a wrong key": {**CHANGE, "Origin": "{origin}", "X_Yrun_Board": "guess"},
    "a form": {
        **CHANGE,
        "Origin": "{origin}",
        "X_Yrun_Board": "{key}",
        "Content_Type": "application/x-www-form-urlencoded",
    },
    "a huge body": {
        **CHANGE,
        "Origin": "{origin}",
        "X_Yrun_Board": "{key}",
        "Content_Length": str(10**12),
    },
    "a body of a strange length": {
        **CHANGE,
        "Origin": "{origin}",
        "X_Yrun_Board": "{key}",
        "Content_Length": "1, 2",
    },
    "a read as a change": {**CHANGE, "path": "/api/runs"},
    "a change as a read": {**OWN, "path": "/api/start"},
    "a method to remove": {**OWN, "method": "DELETE"},
    "a method to write": {**OWN, "method": "PUT"},
    "a method to trace": {**OWN, "method": "TRACE"},
    "a question for permission": {**OWN, "method": "OPTIONS", "Origin": "https://evil.example"},
    "a very long address": {**OWN, "path": "/?" + "a" * 5000},
    "a folder above": {**OWN, "path": "/static/../board.html"},
    "an encoded folder above": {**OWN, "path": "/static/%2e%2e/command.py"},
    "an encoded slash": {**OWN, "path": "/static/..%2fguard.py"},
    "a file of the package": {**OWN, "path": "/static/uPlot.LICENSE"},
    "a run above": {**OWN, "path": "/api/run?id=.."},
    "a run above the run": {**OWN, "path": "/api/run?id=one/../.."},
    "an encoded run above": {**OWN, "path": "/api/run?id=%2e%2e%2f%2e%2e"},
    "a run at an absolute path": {**OWN, "path": "/api/run?id=/etc"},
    "a run with a zero byte": {**OWN, "path": "/api/run?id=one%00"},
    "a page that is no page": {**OWN, "path": "/page?id=one&page=../../secret.txt"},
    "a page that is a link to the outside": {**OWN, "path": "/page?id=one&page=eval"},
    "a page of no run": {**OWN, "path": "/page?id=..&page=report"},
    "curves of no run": {**OWN, "path": "/events?id=../.."},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_gets_nothing(name: str, board: RunningBoard):
    known = {
        "port": str(board.port),
        "token": board.address.partition("token=")[2],
        "session": board.cookie.partition("=")[2],
        "key": board.key,
        "origin": board.origin,
    }
    request = dict(HOSTILE[name])
    body = request.pop("body", None)
    filled = {key: _filled(value, known) for key, value in request.items()}
    status, headers, content = board.ask(filled.pop("method"), filled.pop("path"), body, **filled)
    assert 400 <= status < 500, content
    assert "set-cookie" not in headers
    assert "access-control-allow-origin" not in headers
    assert b"secret-outside" not in content and b"outputs" not in content
    assert not (board.root / ".board").exists(), "something was started"


def _filled(text: str, known: dict[str, str]) -> str:
    for name, value in known.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def test_the_page_itself_gets_its_answer(board: RunningBoard):
    assert {run["id"] for run in board.get("/api/runs")["runs"]} == {"one", "two"}
    status, said = board.post("/api/start", {"command": "train", "recipe": "none.yaml"})
    assert status == 400
    assert said["error"] == "there is no recipe 'none.yaml' here"


def test_two_headers_that_contradict_each_other_are_refused(board: RunningBoard):
    with socket.create_connection((board.host, board.port)) as talk:
        evil = f"GET /api/runs HTTP/1.1\r\nHost: {board.host}:{board.port}\r\n"
        evil += f"Host: evil.example\r\nCookie: {board.cookie}\r\n\r\n"
        talk.sendall(evil.encode())
        assert talk.recv(100).startswith(b"HTTP/1.1 400")


def test_a_body_that_lies_about_its_length_is_cut_off(board: RunningBoard):
    connection = http.client.HTTPConnection(board.host, board.port)
    headers = {
        "Origin": board.origin,
        "Cookie": board.cookie,
        "X-Yrun-Board": board.key,
        "Content-Type": "application/json",
        "Transfer-Encoding": "chunked",
    }
    chunks = (b"[" * 2**20 for _ in range(8))
    try:
        connection.request("POST", "/api/mend", chunks, headers, encode_chunked=True)
        status = connection.getresponse().status
    except OSError:
        status = 0  # the connection was closed while we were sending
    assert status == 0 or status >= 400
    assert board.get("/api/runs")["runs"]


def test_a_body_that_is_no_object_is_refused_in_one_sentence(board: RunningBoard):
    for body in (b"[]", b"{", b"\xff", b"[" * 100_000):
        status, _, said = board.ask(
            "POST",
            "/api/start",
            body,
            Origin=board.origin,
            X_Yrun_Board=board.key,
            Content_Type="application/json",
        )
        assert status == 400 and "the request is not" in json.loads(said)["error"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["--overwrite"],
        ["output=/tmp/elsewhere"],
        ["output=outputs/../.."],
        ["model.trust_remote_code=true"],
        ["model={base: x, trust_remote_code: true}"],
        ["a=b\nc=d"],
        ["seed"],
        ["seed=1"] * 100,
        "seed=1",
        [1],
    ],
)
def test_an_override_is_a_key_and_a_value_and_stays_in_the_folder(
    board: RunningBoard, overrides: object
):
    recipe = board.root.parent / "r.yaml"
    recipe.write_text("name: r\n")
    content = {"command": "train", "recipe": "r.yaml", "overrides": overrides}
    status, said = board.post("/api/start", content)
    recipe.unlink()
    assert status == 400 and said["error"]
    assert not (board.root / ".board").exists()


def test_a_page_of_a_run_is_locked_into_a_sandbox(board: RunningBoard):
    _, headers, content = board.ask("GET", "/page?id=one&page=report")
    assert b"owned" in content
    policy = headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts allow-downloads; default-src 'none'")
    assert "allow-same-origin" not in policy


def test_links_and_pipes_in_a_run_folder_are_never_read(board: RunningBoard, tmp_path: Path):
    run = board.root / "planted"
    run.mkdir()
    secret = tmp_path / "recipe.resolved.yaml"
    secret.write_text("name: secret-outside")
    (run / "recipe.resolved.yaml").symlink_to(secret)
    os.mkfifo(run / "metrics.jsonl")
    (board.root / "elsewhere").symlink_to(tmp_path)
    try:
        assert "elsewhere" not in {run["id"] for run in board.get("/api/runs")["runs"]}
        known = board.get("/api/run?id=planted")
        assert known["recipe"] is None
        assert "secret-outside" not in json.dumps(known)
        assert board.get("/api/curves?id=planted") == {}
    finally:
        (board.root / "elsewhere").unlink()
        for path in run.iterdir():
            path.unlink()
        run.rmdir()
