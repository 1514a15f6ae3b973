"""The Hub and ModelScope: whether they are reachable, downloads, and the licence in a card."""

import socket
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import yaml
from huggingface_hub import constants, metadata_load

from yrunner.errors import MissingError, ModelError
from yrunner.recipe.schema.section import MODELSCOPE

PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5"]
"""Files of ModelScope that are not downloaded."""


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


def modelscope_folder(source: str) -> str:
    """The folder of `modelscope:organisation/name`, or of a revision behind @; downloaded once.

    Pickled weights are left out, because they can run code. Raises `MissingError` without its
    package, and `ModelError` if it cannot be downloaded.
    """
    if find_spec("modelscope") is None:
        raise MissingError(
            f"{source} needs the package modelscope",
            remedy="run pip install 'yrunner[modelscope]'",
        )
    from modelscope import snapshot_download
    from modelscope.hub.errors import HubError

    name, _, revision = source.removeprefix(MODELSCOPE).partition("@")
    try:
        return str(snapshot_download(name, revision=revision or None, ignore_patterns=PICKLES))
    except (HubError, OSError, ValueError) as error:
        raise ModelError(
            f"{source} cannot be downloaded: {error}",
            remedy="check its name on modelscope.cn and the connection",
        ) from error


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
