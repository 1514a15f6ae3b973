"""Without a network a Hub id is answered at once, not after a minute of trying again."""

import socket

import pytest
import torch

from yrunner.errors import ModelError
from yrunner.models import hub
from yrunner.models.load import load_model, load_tokenizer


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def no_address(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_address)
    monkeypatch.setattr("yrunner.models.hub.getproxies", dict)
    hub._hub_resolves.cache_clear()
    yield
    hub._hub_resolves.cache_clear()


def test_a_hub_id_out_of_reach_is_named_at_once():
    with pytest.raises(ModelError, match="is not cached, and the Hub is unreachable"):
        load_tokenizer("nobody/no-such-model")
    with pytest.raises(ModelError, match="is not cached, and the Hub is unreachable"):
        load_model("nobody/no-such-model", dtype=torch.float32)


def test_a_folder_needs_no_hub(tmp_path):
    assert not hub.only_cached(str(tmp_path))
    assert hub.only_cached("nobody/no-such-model")


def test_behind_a_proxy_the_hub_is_asked(monkeypatch):
    monkeypatch.setattr("yrunner.models.hub.getproxies", lambda: {"https": "http://proxy:1"})
    assert not hub.only_cached("nobody/no-such-model")
