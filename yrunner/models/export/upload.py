"""Upload a folder to the Hub. The Hub's client reads the token; it is never shown."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

# Of httpx or httpx2, whichever this version of the client uses.
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

from yrunner.errors import YRunnerError
from yrunner.models.errors import silence_libraries
from yrunner.models.hub import only_cached

LOG_IN = "log in with: hf auth login"

REFUSALS = {
    401: ("the Hub rejects the token", LOG_IN),
    403: (
        "the token has no write access",
        "log in with one that has: hf auth login",
    ),
    404: ("this owner does not exist", "check the spelling of merge.push"),
}
"""Meaning of an HTTP status, and what to do."""


def check_upload(repository: str) -> None:
    """Raise `YRunnerError` if offline or not logged in."""
    if constants.HF_HUB_OFFLINE:
        raise YRunnerError(
            "merge.push: HF_HUB_OFFLINE is set",
            remedy="unset it, or remove push",
        )
    if only_cached(repository):
        raise YRunnerError(
            "merge.push: the Hub is unreachable",
            remedy="check the connection, or remove push",
        )
    if get_token() is None:
        raise YRunnerError("merge.push: not logged in to the Hub", remedy=LOG_IN)
    with _explained(repository):
        HfApi().whoami()


def upload(folders: Mapping[str, Path], repository: str, *, private: bool) -> str:
    """Upload folders under these names ("" is the root) to a repository, created if missing.

    Returns its URL. Raises `YRunnerError` if the Hub refuses.
    """
    api = HfApi()
    with silence_libraries(keep_progress=True), _explained(repository):
        address = api.create_repo(repository, private=private, exist_ok=True)
        for path, folder in folders.items():
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                path_in_repo=path or None,
                commit_message=f"Upload {path or 'model'} with yrunner",
            )
    return str(address)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn errors of the Hub's client into sentences; its own messages may show local paths."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        what, remedy = REFUSALS.get(
            status, (f"the Hub returned status {status}", "try again later")
        )
        raise YRunnerError(f"merge.push: {repository}: {what}", remedy=remedy) from error
    except (NetworkError, OSError) as error:
        raise YRunnerError(
            f"merge.push: {repository}: the Hub is unreachable", remedy="try again later"
        ) from error
