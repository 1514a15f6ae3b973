"""Download the data files of a Hub dataset, or find them in the local Hub cache."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# From httpx or httpx2, depending on the version of the client.
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

from yrunner.data.readers.files import KINDS, is_data_file
from yrunner.errors import DataError

SHOWN_FILES = 10


def hub_files(name: str, *, files: str | None = None, revision: str | None = None) -> list[Path]:
    """Local paths of the data files of a dataset, sorted by name.

    `files` is a name or a glob inside the repository. It defaults to the only data file, or to
    those of the split train. Without a network the cached files are used. Raises `DataError` if the
    dataset is not available, or if it is unclear which of its files to use.
    """
    with _explained_failure(name, revision):
        listed, only_cached = _list_files(name, revision)
        known = sorted(path for path in listed if is_data_file(Path(path)))
        chosen = _choose(name, known, files)
        folder = snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[escape(path) for path in chosen],
            # Otherwise the client would retry for half a minute.
            local_files_only=only_cached,
        )
    return [Path(folder, path) for path in chosen]


def _list_files(name: str, revision: str | None) -> tuple[list[str], bool]:
    """Every file of the dataset, and whether this list comes from the cache."""
    try:
        siblings = HfApi().dataset_info(name, revision=revision).siblings
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (NetworkError, OfflineModeIsEnabled):
        tree = get_cached_repo_tree(name, repo_type="dataset", revision=revision)
        return [file.path for file in tree], True
    return [sibling.rfilename for sibling in siblings or []], False


def _choose(name: str, known: Sequence[str], files: str | None) -> list[str]:
    if not known:
        raise DataError(
            Path(name),
            "this Hub dataset has no data files",
            remedy=f"choose a dataset with files of these kinds: {KINDS}",
        )
    if files is not None:
        chosen = [path for path in known if path == files or fnmatchcase(path, files)]
        problem = f'no data file of this Hub dataset matches files: "{files}"'
    else:
        chosen = list(known) if len(known) == 1 else _train_split(known)
        problem = "this Hub dataset has several data files and no clear train split"
    if chosen:
        return chosen
    shown = ", ".join(known[:SHOWN_FILES])
    more = f" and {len(known) - SHOWN_FILES:,} more" if len(known) > SHOWN_FILES else ""
    raise DataError(
        Path(name), f"{problem}: {shown}{more}", remedy=f"choose with files: {known[0]}"
    )


def _train_split(known: Sequence[str]) -> list[str]:
    """The files named after the split train, if they are the numbered parts of one table.

    Empty otherwise: a repository may hold several datasets, or one in several kinds of file.
    """
    train = [path for path in known if "train" in re.split(r"[^a-z]+", path.lower())]
    parts = {
        (PurePosixPath(path).parent, re.sub(r"\d+", "", PurePosixPath(path).name)) for path in train
    }
    return train if len(parts) == 1 else []


@contextmanager
def _explained_failure(name: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of the Hub client into a `DataError` that names the dataset."""
    dataset = Path(name)
    try:
        yield
    except GatedRepoError as error:
        raise DataError(
            dataset,
            "this Hub dataset is gated",
            remedy="request access on its page, then run: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            dataset,
            "the Hub has no dataset with this name",
            remedy="check the spelling; for a private dataset run: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(
            dataset,
            f'this Hub dataset has no revision "{revision}"',
            remedy="use a branch, a tag or a full commit hash",
        ) from error
    except (LocalEntryNotFoundError, CachedRepoTreeNotFoundError) as error:
        raise DataError(
            dataset,
            f"{_why_not_asked(error)}, and this dataset is not fully cached",
            remedy="check the connection, or use local files with file: ...",
        ) from error
    except NetworkError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            dataset, f"the download from the Hub failed ({reason})", remedy="try again"
        ) from error


def _why_not_asked(error: Exception) -> str:
    match error.__cause__ or error.__context__:
        case HfHubHTTPError() as answer:
            return f"the Hub answered with status {answer.response.status_code}"
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set"
        case _:
            return "the Hub is unreachable"
