"""Uploading, against a stand-in for the Hub; the token is never shown."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from yrunner.errors import YRunnerError
from yrunner.models.export import upload as module
from yrunner.models.export.upload import check_upload, upload

TOKEN = "hf_secretsecretsecret"


class Hub(BaseHTTPRequestHandler):
    """What the Hub answers while a small folder is uploaded."""

    status = 200
    repositories: dict[str, dict] = {}  # noqa: RUF012  one for each test

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami-v2"):
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self.answer({"name": "me"} if known else {"error": "?"}, 200 if known else 401)
        else:
            self.answer({"error": "Entry not found"}, 404)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.status != 200:
            return self.answer({"error": f"refused {TOKEN}"}, self.status)
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.repositories[name] = {"seen_by": asked["visibility"], "files": {}}
            return self.answer({"url": f"{constants.ENDPOINT}/{name}"})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = json.loads(content)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in files
            ]
            return self.answer({"files": modes})
        if "/commit/" in self.path:
            for line in content.decode().splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    data = base64.b64decode(row["value"]["content"])
                    self.repositories[name]["files"][row["value"]["path"]] = data
            return self.answer(
                {"commitUrl": f"{constants.ENDPOINT}/{name}/commit/1", "commitOid": "1" * 40}
            )
        return self.answer({})

    def answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setattr(module, "only_cached", lambda _: False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(Hub, "status", 200)
    monkeypatch.setattr(Hub, "repositories", {})
    yield Hub
    server.shutdown()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("# model\n")
    return folder


@pytest.mark.parametrize("private", [True, False])
def test_folders_are_uploaded_under_their_names(private, hub, folder, tmp_path, capfd, caplog):
    caplog.set_level("DEBUG")
    more = tmp_path / "gguf"
    more.mkdir()
    (more / "Modelfile").write_text("FROM ./x\n")
    check_upload("fog/legal")
    address = upload({"": folder, "gguf": more}, "fog/legal", private=private)
    assert "fog/legal" in address
    made = hub.repositories["fog/legal"]
    assert made["seen_by"] == ("private" if private else "public")
    assert made["files"] == {
        "config.json": b"{}",
        "README.md": b"# model\n",
        "gguf/Modelfile": b"FROM ./x\n",
    }
    printed = capfd.readouterr()
    assert TOKEN not in address + printed.out + printed.err + caplog.text


def refusal(work):
    with pytest.raises(YRunnerError) as refused:
        work()
    assert TOKEN not in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_offline_it_is_refused_at_once(hub, monkeypatch):
    monkeypatch.setattr(module, "only_cached", lambda _: True)
    assert refusal(lambda: check_upload("fog/legal")).startswith(
        "merge.push: the Hub is unreachable. Check the connection"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(lambda: check_upload("fog/legal"))


def test_without_a_login_it_is_refused(hub, monkeypatch):
    monkeypatch.setattr(module, "get_token", lambda: None)
    assert refusal(lambda: check_upload("fog/legal")) == (
        "merge.push: not logged in to the Hub. Log in with: hf auth login"
    )


def test_a_token_that_the_hub_rejects_is_refused(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the Hub rejects the token. Log in" in refusal(lambda: check_upload("fog/legal"))


@pytest.mark.parametrize(
    ("status", "expected"),
    [(403, "the token has no write access"), (500, "the Hub returned status 500")],
)
def test_errors_of_the_hub_are_explained(status, expected, hub, folder, monkeypatch):
    monkeypatch.setattr(hub, "status", status)
    assert f"merge.push: fog/legal: {expected}" in refusal(
        lambda: upload({"": folder}, "fog/legal", private=True)
    )
