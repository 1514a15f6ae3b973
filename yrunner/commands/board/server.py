"""The page's server: what it shows of runs, and what it starts."""

import asyncio
import contextlib
import json
import math
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from yrunner.commands.board.guard import FRAME, Guard
from yrunner.commands.board.jobs import Jobs
from yrunner.commands.board.rows import SortedRows, save_row
from yrunner.commands.board.talk import Worker
from yrunner.errors import RunError, YRunnerError
from yrunner.process import DISK_REMEDIES
from yrunner.storage.found_runs import FoundRun, FoundRuns, RunFiles
from yrunner.storage.metric_curves import GrowingMetrics, last_records
from yrunner.storage.run_dir import differences
from yrunner.storage.run_files import open_inside, read_inside

STATIC = {
    "board.html": "text/html; charset=utf-8",
    "board.css": "text/css; charset=utf-8",
    "uPlot.min.css": "text/css; charset=utf-8",
    "uPlot.iife.min.js": "text/javascript; charset=utf-8",
    **{
        f"{name}.js": "text/javascript; charset=utf-8"
        for name in (
            *("main", "words", "page", "runs", "run", "curves", "compare", "text", "rows"),
            *("clusters", "cluster_picture"),
        )
    },
}
"""Files of the package that are served, and nothing else."""
OF_REPORTS = ("cluster_picture.js",)
"""Those that pages of other commands have too."""
SECONDS_BETWEEN_LOOKS = 1.0
MOST_STREAMS = 64
TEXT_FILES = 2 * 2**20
"""Bytes of the largest recipe or record that the page shows."""
ROLES = ("system", "user", "assistant")


class Board:
    """One page: its folder, its guard, and the state behind its addresses."""

    def __init__(self, folder: Path, host: str) -> None:
        self._host, here = host, Path.cwd().resolve()
        self._runs = FoundRuns(folder)
        self._root = self._runs.root
        self._jobs = Jobs(self._root, here)
        self._worker = Worker(self._root, here)
        self._num_streams = 0
        self._is_closing = False
        self.guard = Guard(self._app(), host)

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return self.guard.address

    @contextlib.contextmanager
    def listening(self, port: int) -> Iterator[socket.socket]:
        """The socket of the page; port 0: any free one. Raises `RunError` if it is taken."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((self._host, port))
            except (OSError, OverflowError) as error:
                raise RunError(
                    f"{self._host}:{port} cannot be used: {error}",
                    remedy="choose another with --port, or leave --port out",
                ) from error
            listener.listen()  # a browser may come before the server has started
            self.guard.port = listener.getsockname()[1]
            yield listener

    def close_streams(self) -> None:
        """Let what follows a growing file end, as the server does."""
        self._is_closing = True

    def _app(self) -> Starlette:
        reads = {
            "/": self._shell,
            "/static/{name}": self._static,
            "/page": self._page,
            "/events": self._events,
            "/api/runs": _json(self._list),
            "/api/run": _json(self._run),
            "/api/curves": _json(self._curves),
            "/api/compare": _json(self._compare),
            "/api/jobs": _json(self._list_jobs),
            "/api/rows": _json(self._rows),
            "/api/clusters": _json(self._clusters),
        }
        changes = {
            "/api/start": _json(self._start),
            "/api/stop": _json(self._stop),
            "/api/resume": _json(self._resume),
            "/api/mend": _json(self._mend),
            "/api/save": _json(self._save),
            "/api/ask": self._ask,
        }
        return Starlette(
            routes=[
                *(Route(path, answer, methods=["GET"]) for path, answer in reads.items()),
                *(Route(path, answer, methods=["POST"]) for path, answer in changes.items()),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        # The first look reads a little of every run: before the browser asks.
        looking = asyncio.create_task(run_in_threadpool(self._runs.look))
        yield
        looking.cancel()
        await self._worker.close()

    # The page itself

    def _shell(self, _: Request) -> Response:
        page = _packaged("board.html").replace("{{ key }}", self.guard.request_key)
        return Response(page, media_type=STATIC["board.html"])

    def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC or name == "board.html":
            return _missing()
        return Response(_packaged(name), media_type=STATIC[name])

    def _page(self, request: Request) -> Response:
        """A page that a command has written about a run."""
        asked = request.query_params
        path = self._runs.page(asked.get("id", ""), asked.get("page", ""))
        if path is None:
            return _missing()
        try:
            content = read_inside(path, self._root)
        except FileNotFoundError:
            return _missing()
        return Response(
            content,
            media_type="text/html; charset=utf-8",
            headers={"Content-Security-Policy": FRAME},
        )

    # What is read

    def _list(self, _: Any) -> dict[str, Any]:
        return {
            "folder": str(self._root),
            "runs": [run.as_json() for run in self._runs.look().values()],
        }

    def _run(self, request: Request) -> dict[str, Any]:
        id_ = request.query_params.get("id", "")
        run_files = self._files(id_)
        run, sort = run_files.run, run_files.sort
        is_trained = run.recipe.exists()
        environment = self._text(run.environment if is_trained else sort.environment)
        return {
            "run": self._runs.look()[id_].as_json(),
            "folder": str(run_files.folder),
            "recipe": self._text(run.recipe if is_trained else sort.recipe),
            "environment": _loaded(environment),
            "result": _loaded(self._text(run.result)),
            "explosion": _loaded(self._text(run.explosion)),
            "figures": self._figures(run_files),
            "has_rows": sort.scores.is_file(),
        }

    def _curves(self, request: Request) -> dict[str, Any]:
        metrics = self._metrics(request.query_params.get("id", ""))
        metrics.read_more()
        return metrics.as_json()

    def _compare(self, request: Request) -> dict[str, Any]:
        """Two runs: the keys of their recipes that differ, and their last figures."""
        pair = [self._files(request.query_params.get(name, "")) for name in ("a", "b")]
        recipes = [self._recipe(one) for one in pair]
        return {
            "recipe": [
                {"key": key, "values": [_at(recipe, key) for recipe in recipes]}
                for key in differences(recipes[0], recipes[1])
            ],
            "figures": [self._figures(one) for one in pair],
        }

    def _recipe(self, run_files: RunFiles) -> dict[str, Any]:
        try:
            found = yaml.safe_load(self._text(run_files.run.recipe) or "")
        except yaml.YAMLError:
            found = None
        return found if isinstance(found, dict) else self._runs.recipe(run_files)

    def _figures(self, run_files: RunFiles) -> dict[str, float]:
        """The last of every figure that was logged, and what the evaluation has measured."""
        figures: dict[str, float] = {}
        with contextlib.suppress(FileNotFoundError):
            with open_inside(run_files.run.metrics, self._root) as file:
                for record in last_records(file):
                    figures |= record
        found = _loaded(self._text(run_files.run.eval, largest=64 * 2**20))
        models = found.get("models") if isinstance(found, dict) else None
        for model in models if isinstance(models, list) else []:
            for task, measured in model.get("tasks", {}).items():
                for name, value in measured.get("figures", {}).items():
                    if type(value) in (int, float):
                        figures[f"{task} {name}, {model.get('description')}"] = value
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def _rows(self, request: Request) -> dict[str, Any]:
        asked = request.query_params
        start = asked.get("start", "0")
        if not start.isdigit() or len(start) > 9:
            raise RunError("start must be a number")
        rows = SortedRows(self._files(asked.get("id", "")), self._root)
        return rows.shown(asked.get("by"), int(start))

    def _clusters(self, request: Request) -> dict[str, Any]:
        return SortedRows(self._files(request.query_params.get("id", "")), self._root).clusters()

    def _list_jobs(self, _: Any) -> dict[str, Any]:
        return {"jobs": self._jobs.listed(), "recipes": list(self._jobs.recipes())}

    # What is changed

    def _start(self, asked: dict[str, Any]) -> dict[str, Any]:
        overrides = asked.get("overrides", [])
        if not isinstance(overrides, list) or not all(isinstance(it, str) for it in overrides):
            raise RunError("overrides must be a list of texts")
        command, recipe = str(asked.get("command", "")), str(asked.get("recipe", ""))
        overwrite = asked.get("overwrite") is True
        return {"id": self._jobs.start(command, recipe, overrides, overwrite=overwrite).id}

    def _stop(self, asked: dict[str, Any]) -> dict[str, Any]:
        if "job" in asked:
            self._jobs.stop_job(str(asked["job"]))
        else:
            self._jobs.stop(self._files(asked.get("id")))
        return {}

    def _resume(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"id": self._jobs.resume(self._files(asked.get("id"))).id}

    def _mend(self, asked: dict[str, Any]) -> dict[str, Any]:
        changes, shares = asked.get("changes"), asked.get("shares", {})
        if not isinstance(changes, dict) or not isinstance(shares, dict):
            raise RunError("changes and shares must be objects")
        return SortedRows(self._files(asked.get("id")), self._root).mend(changes, shares)

    def _save(self, asked: dict[str, Any]) -> dict[str, Any]:
        messages = asked.get("messages")
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise RunError("messages must be a list of roles and contents")
        kept = [{"role": it["role"], "content": it["content"]} for it in messages]
        return save_row(self._files(asked.get("id")), self._root, kept)

    async def _ask(self, request: Request) -> Response:
        """Have the models of a run do something."""
        try:
            asked = await _body(request)
            run_files = await run_in_threadpool(self._files, asked.pop("id", None))
            return _strict(await self._worker.ask(run_files.folder, asked))
        except (YRunnerError, OSError) as error:
            return _refused(error)

    # What grows

    async def _events(self, request: Request) -> Response:
        """Server-sent events: the new records of one run, or without an id changes of the list."""
        if self._num_streams >= MOST_STREAMS:
            return Response("too many pages are open", 503)
        id_ = request.query_params.get("id")
        try:
            follow = self._follow_list() if id_ is None else self._follow(id_, self._metrics(id_))
        except RunError as error:
            return _refused(error)
        return StreamingResponse(self._counted(follow), media_type="text/event-stream")

    async def _counted(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        self._num_streams += 1
        try:
            async for event in events:
                yield event
        finally:
            self._num_streams -= 1

    async def _follow(self, id_: str, metrics: GrowingMetrics) -> AsyncIterator[str]:
        await run_in_threadpool(metrics.read_more)
        yield _event("curves", metrics.as_json())
        before: FoundRun | None = None
        async for _ in self._ticks():
            is_new, records = await run_in_threadpool(metrics.read_more)
            if is_new:
                yield _event("curves", metrics.as_json())
            elif records:
                yield _event("records", records)
            run = (await run_in_threadpool(self._runs.look)).get(id_)
            if run is not None and run != before:
                yield _event("run", run.as_json())
                before = run
            yield ": \n\n"  # a closed connection is noticed by writing

    async def _follow_list(self) -> AsyncIterator[str]:
        before = await run_in_threadpool(self._runs.look)
        async for _ in self._ticks():
            now = await run_in_threadpool(self._runs.look)
            changed = [run.as_json() for id_, run in now.items() if before.get(id_) != run]
            gone = [id_ for id_ in before if id_ not in now]
            before = now
            if changed or gone:
                yield _event("runs", {"changed": changed, "gone": gone})
            else:
                yield ": \n\n"

    async def _ticks(self) -> AsyncIterator[None]:
        while not self._is_closing:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            yield

    def _files(self, id_: Any) -> RunFiles:
        """The files of a run that was found. Raises `RunError` for any other name."""
        found = self._runs.files(id_) if isinstance(id_, str) else None
        if found is None:
            raise RunError("there is no such run")
        return found

    def _metrics(self, id_: str) -> GrowingMetrics:
        return GrowingMetrics(self._files(id_).run.metrics, self._root)

    def _text(self, path: Path, largest: int = TEXT_FILES) -> str | None:
        try:
            return read_inside(path, self._root, largest).decode("utf-8", "replace")
        except FileNotFoundError:
            return None


def serve(board: Board, listener: socket.socket) -> None:
    """Answer until Ctrl-C."""
    config = uvicorn.Config(
        board.guard,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        lifespan="on",
        ws="none",
    )
    server = _Server(config, board)
    server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Ends the streams before it waits for them."""

    def __init__(self, config: uvicorn.Config, board: Board) -> None:
        super().__init__(config)
        self._board = board

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._board.close_streams()
        super().handle_exit(sig, frame)


def _json(answer: Callable[[Any], dict[str, Any]]) -> Callable[[Request], Any]:
    """An address that answers with JSON; what a user can mend becomes its sentence."""

    async def endpoint(request: Request) -> Response:
        try:
            asked = await _body(request) if request.method == "POST" else request
            return _strict(await run_in_threadpool(answer, asked))
        except (YRunnerError, OSError) as error:
            return _refused(error)

    return endpoint


async def _body(request: Request) -> dict[str, Any]:
    try:
        content = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise RunError("the request is not JSON") from error
    if not isinstance(content, dict):
        raise RunError("the request is not an object")
    return content


def _strict(content: Any) -> Response:
    return JSONResponse(_without_nan(content))


def _without_nan(content: Any) -> Any:
    """Data files may hold NaN, which JSON does not know."""
    match content:
        case float():
            return content if math.isfinite(content) else None
        case dict():
            return {str(key): _without_nan(value) for key, value in content.items()}
        case list() | tuple():
            return [_without_nan(value) for value in content]
        case str() | int() | None:
            return content
    return str(content)


def _refused(error: YRunnerError | OSError) -> Response:
    if isinstance(error, OSError):
        remedy = DISK_REMEDIES.get(error.errno or 0, "")
        error = RunError(f"{error.filename or 'writing'}: {error.strerror}", remedy=remedy)
    return JSONResponse({"error": str(error)}, 400)


def _missing() -> Response:
    return Response("not found", 404)


def _event(name: str, content: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(_without_nan(content))}\n\n"


def _packaged(name: str) -> str:
    if name in OF_REPORTS:
        return files("yrunner.reports").joinpath(name).read_text("utf-8")
    return files("yrunner.commands.board").joinpath("static", name).read_text("utf-8")


def _loaded(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None


def _at(recipe: Any, key: str) -> Any:
    """The value of a dotted key; None without one."""
    for part in key.split("."):
        recipe = recipe.get(part) if isinstance(recipe, dict) else None
    return recipe


def _is_message(said: Any) -> bool:
    return (
        isinstance(said, dict)
        and said.get("role") in ROLES
        and isinstance(said.get("content"), str)
        and len(said["content"]) <= 100_000
    )
