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
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        content = metadata_load(card)
    except yaml.YAMLError:
        return None  # an invalid card names no licence
    named = content.get("license") if isinstance(content, dict) else None
    return named if isinstance(named, str) else None
