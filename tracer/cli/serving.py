"""The server of ``tracer serve``: a page and JSON answers from one store, computed by one thread in small parts."""

from __future__ import annotations

import asyncio
import secrets
import threading
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import Template
from markupsafe import Markup
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tracer._core.validation import check_choice, check_count
from tracer.cli.output import json_value
from tracer.cli.stores import class_of, known_labels
from tracer.errors import InputError, TracerError
from tracer.scoring.estimators import ESTIMATORS, Estimate
from tracer.scoring.readiness import finalized_revisions
from tracer.scoring.scorer import KINDS, Scorer
from tracer.scoring.top_queries import TopKQuery
from tracer.store import Store
from tracer.types import TopK

_PARTS = 50  # into which a question is divided, after each of which it can be cancelled
_KEPT = 16  # answers in memory; they are in the store too
_MOST_K = 1000

Answer = tuple[TopK, TopK] | np.ndarray
Target = Annotated[int, Query(ge=0)]
Count = Annotated[int, Query(ge=1, le=_MOST_K)]
Wait = Annotated[float, Query(ge=0, le=60)]


class Cancelled(Exception):
    """A question was cancelled."""


@dataclass
class Job:
    """A question that is waiting, running or answered, and how far it is."""

    name: str
    future: Future[Answer] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: int = 0
    total: int = 0

    def state(self) -> dict[str, Any]:
        """Return state and progress as JSON values."""
        if not self.future.done():
            state = "cancelling" if self.cancelled.is_set() else "running"
        else:
            error = self.future.exception()
            state = "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"
        return {"job": self.name, "state": state, "done": self.done, "total": self.total}


class Jobs:
    """Questions in the order in which they came; the same question is computed once, whoever asks."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracer-serve")
        self._lock = threading.Lock()
        self._jobs: OrderedDict[tuple, Job] = OrderedDict()

    def ask(self, question: tuple, compute: Callable[[Job], Answer]) -> Job:
        """Return the job of a question, and begin it unless it was asked before."""
        with self._lock:
            found = self._jobs.get(question)
            if found is None or (found.future.done() and found.future.exception()):
                found = self._jobs[question] = Job(uuid.uuid4().hex)
                self._pool.submit(self._run, found, compute)
            self._jobs.move_to_end(question)
            finished = [key for key, job in self._jobs.items() if job.future.done()]
            for key in finished[:-_KEPT]:
                del self._jobs[key]
            return found

    def named(self, name: str) -> Job | None:
        """Return a job by its name."""
        with self._lock:
            return next((job for job in self._jobs.values() if job.name == name), None)

    def close(self) -> None:
        """Cancel everything."""
        with self._lock:
            for job in self._jobs.values():
                job.cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _run(job: Job, compute: Callable[[Job], Answer]) -> None:
        try:
            if job.cancelled.is_set():
                raise Cancelled
            job.future.set_result(compute(job))
        except BaseException as error:  # the future carries it to whoever waits
            job.future.set_exception(error)


class StoreAnswers:
    """Answers questions about one store, each by a `Job`."""

    def __init__(self, store: Store, device: Any) -> None:
        self.store, self.device, self.jobs = store, device, Jobs()
        ids = store.catalog.checkpoint_ids()
        if not ids:
            raise InputError(f"{store.path} has no checkpoint yet; featurize first, for example with `tracer run`.")
        self.labels = known_labels(store.checkpoint(ids[0]))
        self.ids = store.ids().listed(store.manifest.train_set_size)

    def describe(self) -> dict[str, Any]:
        """Return what can be asked."""
        catalog = self.store.catalog
        return {
            "store": str(self.store.path).rstrip("/").rpartition("/")[2],
            "model": self.store.manifest.info.get("model"),
            "task": self.store.manifest.settings["task"]["name"],
            "train_set_size": self.store.manifest.train_set_size,
            "checkpoints": catalog.checkpoint_ids(),
            "targets": {name: self.num_targets(name) for name in catalog.exp_names()},
            "estimators": ESTIMATORS,
            "kinds": KINDS,
        }

    def num_targets(self, exp_name: str) -> int:
        """Return the number of targets of a set."""
        return self.store.targets(exp_name, self.store.catalog.target_ids(exp_name)[0]).num_rows

    def describe_target(self, exp_name: str, target: int) -> dict[str, Any]:
        """Return a target's index, id and class, None if they are unknown."""
        first = self.store.catalog.target_ids(exp_name)[0]
        ids = self.store.ids(exp_name).listed(self.num_targets(exp_name))
        label = class_of(known_labels(self.store.targets(exp_name, first)), target)
        return {"target": target, "id": None if ids is None else ids[target], "label": label}

    def check_targets(self, exp_name: str | None, target: int) -> str:
        """Return the name of a set of targets, without one that of the first, which has this target."""
        known = self.store.catalog.exp_names()
        if not known:
            raise InputError("The store has no targets; score some first, for example with `tracer run`.")
        name = known[0] if exp_name is None else exp_name
        check_choice("exp_name", name, known)
        if target >= self.num_targets(name):
            raise InputError(f"target={target}; {name!r} has targets 0 to {self.num_targets(name) - 1}.")
        return name

    def top(self, exp_name: str, k: int, estimator: str) -> Job:
        """Ask for the strongest examples of all targets of a set."""
        estimate = Estimate(estimator)
        k = min(check_count(k, "k"), self.store.manifest.train_set_size)

        def compute(job: Job) -> Answer:
            scorer = self._scorer()
            query = scorer.top_query(exp_name, k, estimate, None, range(scorer.num_rows))
            return _in_parts(query, job, self.store.chunk_rows)

        return self.jobs.ask(("top", exp_name, k, estimator, self._version(exp_name)), compute)

    def self_influence(self, estimator: str) -> Job:
        """Ask for the self-influence of all training examples."""
        estimate = Estimate(estimator)
        if estimate.is_cosine:
            raise InputError("Every gradient's cosine with itself is 1; choose another estimator.")

        def compute(job: Job) -> Answer:
            return self._scorer().self_influence(None, estimate)

        return self.jobs.ask(("self-influence", estimator, self._version()), compute)

    def rows(self, indices: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
        """Return training examples with their scores and, if known, ids and labels."""
        return [
            {
                "index": index,
                "id": None if self.ids is None else self.ids[index],
                "score": score,
                "label": class_of(self.labels, index),
            }
            for index, score in zip(indices.tolist(), scores.tolist(), strict=True)
        ]

    def _version(self, exp_name: str | None = None) -> tuple:
        """Return what changes with the stored examples and their learning rates, so that old answers are not shown."""
        revisions = finalized_revisions(self.store, None, exp_name)
        rates = [self.store.table_attributes(each).get("learning_rate") for each in revisions.model_ids]
        return (*revisions.tables.items(), *rates)

    def _scorer(self) -> Scorer:
        return Scorer(Store.open_existing(self.store.path), self.device, progress=False)


def _in_parts(query: TopKQuery, job: Job, chunk_rows: int) -> tuple[TopK, TopK]:
    """Compute a query part by part, each of which is stored; stop between two if the job is cancelled."""
    num_rows = query.scorer.num_rows
    step = chunk_rows * max(1, -(-num_rows // (_PARTS * chunk_rows)))
    job.total = num_rows
    for start in range(0, num_rows, step):
        if job.cancelled.is_set():
            raise Cancelled
        query.compute([(start, min(start + step, num_rows))])
        job.done = min(start + step, num_rows)
    return query.result()


async def answered(job: Job, wait: float, show: Callable[[Any], dict[str, Any]]) -> Response:
    """Return a job's answer, or after ``wait`` seconds its progress with status 202."""
    try:
        found = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(job.future)), wait)
    except TimeoutError:
        return JSONResponse(job.state(), 202)
    except Cancelled:
        return JSONResponse(job.state(), 409)
    return JSONResponse(json_value({**job.state(), **show(found)}))


def make_app(store: Store, device: Any, hosts: list[str]) -> FastAPI:
    """Return the application: ``/`` is the page, ``/api`` has the answers.

    Args:
        store: The store. Nothing else on this machine is read.
        device: The device of the products.
        hosts: The host names that requests may have, so that pages of other sites cannot ask under a name of their own.

    Returns:
        The application.
    """
    answers = StoreAnswers(store, device)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        answers.jobs.close()

    # The pages of documentation that FastAPI has load scripts from elsewhere.
    app = FastAPI(title="tracer", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.include_router(_questions(answers), prefix="/api")
    app.include_router(_jobs(answers.jobs), prefix="/api/jobs")
    page = Template(resources.files("tracer.cli").joinpath("serve.html").read_text("utf-8"), autoescape=True)
    css = Markup(resources.files("tracer.report").joinpath("assets/report.css").read_text("utf-8"))  # the page's own

    @app.exception_handler(TracerError)
    async def refuse(_: Request, error: TracerError) -> Response:
        return JSONResponse({"detail": str(error)}, 400)

    @app.middleware("http")
    async def add_headers(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await proceed(request)
        response.headers.update({"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})
        return response

    @app.get("/", response_class=HTMLResponse)
    def index() -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = [
            "default-src 'none'",
            "img-src data:",
            "connect-src 'self'",
            f"script-src 'nonce-{nonce}'",
            f"style-src 'nonce-{nonce}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
        text = page.render(nonce=nonce, store=answers.describe(), css=css)
        return HTMLResponse(text, headers={"Content-Security-Policy": "; ".join(policy)})

    return app


def _questions(answers: StoreAnswers) -> APIRouter:
    """Return the routes that answer questions."""
    routes = APIRouter()

    @routes.get("/store")
    def describe() -> Any:
        return json_value(answers.describe())

    @routes.get("/top")
    async def top(
        target: Target = 0,
        k: Count = 10,
        kind: str = KINDS[0],
        estimator: str = "cosine",  # as proponents are ranked by default elsewhere
        exp_name: str | None = None,
        wait: Wait = 10,
    ) -> Response:
        check_choice("kind", kind, KINDS)
        name = answers.check_targets(exp_name, target)

        def show(found: tuple[TopK, TopK]) -> dict[str, Any]:
            ends = found[KINDS.index(kind)]
            rows = answers.rows(ends.indices[target], ends.scores[target])
            return {"exp_name": name, **answers.describe_target(name, target), "rows": rows}

        return await answered(answers.top(name, k, estimator), wait, show)

    @routes.get("/self-influence")
    async def self_influence(k: Count = 20, estimator: str = ESTIMATORS[0], wait: Wait = 10) -> Response:
        def show(values: np.ndarray) -> dict[str, Any]:
            order = np.argsort(-values, kind="stable")[:k]
            return {"rows": answers.rows(order, values[order])}

        return await answered(answers.self_influence(estimator), wait, show)

    return routes


def _jobs(jobs: Jobs) -> APIRouter:
    """Return the routes that show and cancel jobs."""
    routes = APIRouter()

    @routes.get("/{name}")
    def state(name: str) -> Any:
        return _found(jobs, name).state()

    @routes.delete("/{name}")
    def cancel(name: str) -> Any:
        job = _found(jobs, name)
        if not job.future.done():
            job.cancelled.set()
        return job.state()

    return routes


def _found(jobs: Jobs, name: str) -> Job:
    if (job := jobs.named(name)) is None:
        raise HTTPException(404, "There is no such job; its answer may have been dropped: ask again.")
    return job
