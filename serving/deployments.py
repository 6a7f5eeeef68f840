"""The deployments of Ray Serve: replicas that hold the model and batch what waits, and the ingress that speaks HTTP.

Ray Serve queues, batches, balances and restarts; here is what a request means. The ingress refuses what it can before a
replica sees it, tells a client to come again where the queue is full, and hands a request to another replica once if
its own dies before an answer had begun.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from perceptiongpt.inference import load
from perceptiongpt.serving.answering import answer_requests, stream_answer
from perceptiongpt.serving.messages import (
    ChatRequest,
    Chunks,
    Limits,
    RequestError,
    completion,
    error_body,
    read_request,
    refused,
    sse,
)


APPLICATION = "perceptiongpt"
RETRY_AFTER = 1  # seconds, for a client that finds the queue full
TRIES = 2
LARGEST_INGRESS = 10_000  # requests in the ingress, which does nothing but wait: the queue of replicas is the bound


@dataclass(frozen=True)
class Settings:
    """Of a server.

    Attributes:
        model, revision, dtype, trust_remote_code: as in `inference.load`.
        name: of the model, for clients.
        replicas: processes that hold the model.
        cpus, gpus: of each, may be fractions.
        batch_size: the most requests that a replica answers at once.
        batch_wait: seconds that the first of them waits for others.
        queue: the most requests that wait for a replica.
        limits: of a request.
    """

    model: str
    name: str
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    batch_size: int = 8
    batch_wait: float = 0.01
    queue: int = 64
    limits: Limits = Limits()


@serve.deployment
class Replica:
    """One copy of the model; it answers one batch, or one stream, at a time."""

    def __init__(self, settings: Settings):
        self.model, self.processor = load(
            settings.model,
            dtype=settings.dtype,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
        self.worker, self.turn = ThreadPoolExecutor(max_workers=1), asyncio.Lock()
        self.answer.set_max_batch_size(settings.batch_size)
        self.answer.set_batch_wait_timeout_s(settings.batch_wait)

    @serve.batch
    async def answer(self, requests: list[ChatRequest]) -> list[dict]:
        """The result of each request, see `answer_requests`."""
        loop = asyncio.get_running_loop()
        async with self.turn:
            return await loop.run_in_executor(self.worker, answer_requests, self.model, self.processor, requests)

    async def stream(self, request: ChatRequest) -> AsyncIterator[dict]:
        """The events of one request, see `stream_answer`. A client that goes away ends the generation."""
        loop, events, gone = asyncio.get_running_loop(), asyncio.Queue(), Event()

        def run() -> None:
            try:
                for event in stream_answer(self.model, self.processor, request, gone):
                    loop.call_soon_threadsafe(events.put_nowait, event)
                last = None
            except Exception as error:
                last = error  # raised where the events are read
            loop.call_soon_threadsafe(events.put_nowait, last)

        async with self.turn:
            running = loop.run_in_executor(self.worker, run)
            try:
                while (event := await events.get()) is not None:
                    if isinstance(event, Exception):
                        raise event
                    yield event
            finally:
                gone.set()
                await running


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request, of which no more is read than the limits allow."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limits.body_bytes:
            raise RequestError(f"the request has more than {limits.body_bytes:,} bytes", 413)
    return bytes(body)


def unavailable(message: str) -> JSONResponse:
    """503, for a client that may come again."""
    return JSONResponse(error_body(message, "server_error"), 503, headers={"Retry-After": str(RETRY_AFTER)})


app = FastAPI(title="PerceptionGPT", docs_url=None, redoc_url=None)


@serve.deployment
@serve.ingress(app)
class Ingress:
    """HTTP in, requests for replicas out; see `serving.messages` for the form of both."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings):
        self.replicas, self.name, self.limits = replicas, settings.name, settings.limits

    @app.get("/v1/models")
    async def models(self) -> dict:
        """The one model that there is."""
        return {"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": APPLICATION}]}

    @app.post("/v1/chat/completions")
    async def complete(self, request: Request) -> Response:
        """Answer a conversation, at once or as server-sent events."""
        try:
            body = await read_body(request, self.limits)
            chat = await asyncio.to_thread(read_request, body, self.limits)
            if chat.stream:
                return await self._stream(chat)
            result = await self._answer(chat)
            if "error" in result:
                raise refused(result["error"])
            return JSONResponse(completion(result, self.name))
        except RequestError as error:
            return JSONResponse(error_body(error.message, param=error.param), error.status)
        except BackPressureError:
            return unavailable("the queue is full; try again")
        except (RayActorError, DeploymentUnavailableError):
            return unavailable("the answer was lost with the process that gave it; try again")

    async def _answer(self, chat: ChatRequest) -> dict:
        for number in range(TRIES):
            try:
                return await self.replicas.answer.remote(chat)
            except RayActorError:
                if number == TRIES - 1:
                    raise

    async def _stream(self, chat: ChatRequest) -> Response:
        """The first event decides on the status, and on another try."""
        for number in range(TRIES):
            events = self.replicas.options(stream=True).stream.remote(chat)
            try:
                first = await anext(aiter(events))
                break
            except RayActorError:
                if number == TRIES - 1:
                    raise
        if first["type"] == "error":
            raise refused(first["error"])
        return StreamingResponse(self._lines(first, events), media_type="text/event-stream")

    async def _lines(self, first: dict, events) -> AsyncIterator[str]:
        chunks = Chunks(self.name)
        yield chunks.start()
        try:
            event = first
            while event["type"] != "end":
                yield chunks.event(event)
                event = await anext(events)
            yield chunks.end(event["finished"])
        except RayActorError:
            yield sse(error_body("the answer was lost with the process that gave it", "server_error"))
        finally:
            events.cancel()


def application(settings: Settings) -> serve.Application:
    """The ingress in front of the replicas, for `serve.run`."""
    replicas = Replica.options(
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=2 * settings.batch_size,  # a batch is gathered while another is answered
        max_queued_requests=settings.queue,
    ).bind(settings)
    return Ingress.options(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=LARGEST_INGRESS).bind(
        replicas, settings
    )


def start(settings: Settings, host: str, port: int) -> None:
    """Start the server and return once it answers; Ray is started where it does not run yet."""
    serve.start(http_options={"host": host, "port": port})
    serve.run(application(settings), name=APPLICATION, route_prefix="/")
