"""The Hub: whether it is reachable, and the licence in a model card."""

import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import yaml
from huggingface_hub import constants, metadata_load


def only_cached(source: str) -> bool:
    """Whether `source` is a Hub id and the Hub is unreachable; pass it as `local_files_only`.

    Otherwise the Hub's client would retry for a minute, with a line each time.
    """
    return not Path(source).is_dir() and not _hub_resolves()


@cache
def _hub_resolves() -> bool:
    if getproxies():
        return True  # the proxy resolves names; this machine may be unable to
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def read_license(folder: Path) -> str | None:
    """The licence id in the front matter of a model's README.md; None if there is none."""
    return read_card(folder, "license")


def read_card(folder: Path, key: str) -> str | None:
    """A text in the front matter of a model's README.md, or the only one of a list, if any."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        content = metadata_load(card)
    except yaml.YAMLError:
        return None  # an invalid card says nothing
    named = content.get(key) if isinstance(content, dict) else None
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    return named if isinstance(named, str) else None
