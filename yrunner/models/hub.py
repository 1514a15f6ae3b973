"""Whether the Hub is within reach; without it, only what is in the cache is looked for.

Under which licence a model was published, as its model card says.
"""

import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import yaml
from huggingface_hub import constants, metadata_load


def only_cached(source: str) -> bool:
    """True where `source` is no folder and the Hub cannot be asked: pass it as `local_files_only`.

    Asked all the same, the Hub's client would try again for a minute, with a line for each time.
    """
    return not Path(source).is_dir() and not _hub_has_an_address()


@cache
def _hub_has_an_address() -> bool:
    if getproxies():
        return True  # the proxy looks names up, this machine may not be able to
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def read_license(folder: Path) -> str | None:
    """The licence id in the front matter of a model's README.md; None where it names none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        content = metadata_load(card)
    except yaml.YAMLError:
        return None  # a card that cannot be read names no licence
    named = content.get("license") if isinstance(content, dict) else None
    return named if isinstance(named, str) else None
