"""Upload a folder to the Hub. The token is read by the Hub's client and never shown."""

# Of httpx or httpx2, whichever this version of the client stands on.

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

from yrunner.errors import YRunnerError
from yrunner.models.errors import quiet_libraries
from yrunner.models.hub import only_cached

LOG_IN = "log in with: hf auth login"

REFUSALS = {
    401: ("the Hub does not know the token", LOG_IN),
    403: ("the token may not write there", "log in with a token that may write: hf auth login"),
    404: ("there is no such owner", "check the spelling of merge.push"),
}
"""What the Hub means by a status, and what to do."""


def check_upload(repository: str) -> None:
    """Raise `YRunnerError` where nothing can be uploaded: offline, or nobody is logged in."""
    if constants.HF_HUB_OFFLINE:
        raise YRunnerError(
            "merge.push: HF_HUB_OFFLINE forbids asking the Hub",
            remedy="unset it, or leave out push",
        )
    if only_cached(repository):
        raise YRunnerError(
            "merge.push: the Hub cannot be reached",
            remedy="check the connection, or leave out push",
        )
    if get_token() is None:
        raise YRunnerError("merge.push: nobody is logged in to the Hub", remedy=LOG_IN)
    with _explained(repository):
        HfApi().whoami()


def upload(folders: Mapping[str, Path], repository: str, *, private: bool) -> str:
    """Upload folders under these names ("" is the top) to a repository, made if it is missing.

    Returns its address. Raises `YRunnerError` where the Hub refuses.
    """
    api = HfApi()
    with quiet_libraries(keep_progress=True), _explained(repository):
        address = api.create_repo(repository, private=private, exist_ok=True)
        for place, folder in folders.items():
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                path_in_repo=place or None,
                commit_message=f"Upload {place or 'model'} with yrunner",
            )
    return str(address)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Say in a sentence what the Hub's client raises; its own words may hold addresses of ours."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        what, remedy = REFUSALS.get(
            status, (f"the Hub answers with status {status}", "try again later")
        )
        raise YRunnerError(f"merge.push: {repository}: {what}", remedy=remedy) from error
    except (NetworkError, OSError) as error:
        raise YRunnerError(
            f"merge.push: {repository}: the Hub cannot be reached", remedy="try again later"
        ) from error
