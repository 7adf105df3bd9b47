"""What happens to every call, whichever service it is for: counted first, and let in only while there is room.

The order is: count, then authenticate (``auth.AuthInterceptor``), then the gate, then see whether it can be read.
"""

import asyncio
import contextlib
import functools
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError

from protos.errors import Reason, Refusal
from teacher_service import unparsed
from teacher_service.auth import (
    ALLOWED,
    Authenticator,
    Handler,
    abort,
    around,
    behaviour_of,
    caller_of,
    refuse_all,
    with_behaviour,
)
from teacher_service.limits import Limits
from teacher_service.metrics import Metrics, RpcCounters

STREAMS_WITHOUT_CREDENTIAL = 256
"""Health watches and reflection, over all callers."""
MOST_BYTES_WITHOUT_CREDENTIAL = 4096
"""Of a message from whom nobody knows; a health watch keeps its own for as long as it lasts."""

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]


class _Wrapped:
    """The handlers that an interceptor made of others: gRPC asks for one with every call, and comes with the same."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Handler, Handler]] = {}

    def once(self, method: str, handler: "Handler", wrap: "Callable[[str, Handler], Handler]") -> "Handler":
        """``wrap(method, handler)``, as it was made before where the method's handler is still the same."""
        made = self._made.get(method)
        if made is None or made[0] is not handler:
            made = self._made[method] = handler, wrap(method, handler)
        return made[1]


class Gate(grpc.aio.ServerInterceptor):
    """Bounds the streams that are open, and lets nothing new in while the server drains. Behind authentication."""

    def __init__(self, authenticator: Authenticator, limits: Limits) -> None:
        self._authenticator = authenticator
        self._limits = limits
        self._without_credential = 0
        self.draining = False

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler = await continuation(details)
        if handler is None:
            return None
        if self.draining and ALLOWED.get(details.method) is not None:  # the others ask after the server's health
            return refuse_all(handler, Refusal.of(Reason.DRAINING))
        if not handler.response_streaming:
            return handler
        if ALLOWED.get(details.method) is None:
            return around(handler, self._place_without_credential)
        return around(handler, functools.partial(self._place, handler.request_streaming))

    @contextlib.asynccontextmanager
    async def _place(self, of_account: bool, context: Any) -> AsyncIterator[None]:
        """A place among the open streams; among the account's own, too, where it does not only listen."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                caller = await caller_of(self._authenticator, context)
                terms = caller.terms if of_account else None
                stack.enter_context(self._limits.stream(caller.account, terms))
            except Refusal as refusal:
                await abort(context, refusal)
            yield

    @contextlib.asynccontextmanager
    async def _place_without_credential(self, context: Any) -> AsyncIterator[None]:
        if self._without_credential >= STREAMS_WITHOUT_CREDENTIAL:
            whose = "callers without a key together"
            await abort(context, Refusal.of(Reason.TOO_MANY_STREAMS, whose=whose, limit=STREAMS_WITHOUT_CREDENTIAL))
        self._without_credential += 1
        try:
            yield
        finally:
            self._without_credential -= 1


class Readable(grpc.aio.ServerInterceptor):
    """Refuses bytes that are no message of their method, as any bad argument is. Innermost: who called is known.

    gRPC itself would say UNKNOWN, and each of them, from anybody at all, would put a traceback into the log.

    Args:
        bulk: by method, the fields of its messages that may be large, where those have parts without number: what is
            in no such field is bounded before it is parsed (``unparsed``).
    """

    def __init__(self, bulk: Mapping[str, unparsed.Bulk]) -> None:
        self._bulk = bulk
        self._wrapped = _Wrapped()

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler = await continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        return self._wrapped.once(details.method, handler, self._readable)

    def _readable(self, method: str, handler: "Handler") -> "Handler":
        return _readable(method, handler, self._bulk.get(method))


def _readable(method: str, handler: "Handler", bulk: unparsed.Bulk | None) -> "Handler":
    parse, behaviour = handler.request_deserializer, behaviour_of(handler)
    most_bytes = MOST_BYTES_WITHOUT_CREDENTIAL if ALLOWED.get(method) is None else None
    expected = f"a message of {method}"
    assert parse is not None

    def read(message: bytes) -> Any:
        if most_bytes is not None and len(message) > most_bytes:
            return _unlike(f"{expected}, at most {most_bytes} bytes", f"{len(message)} bytes")
        try:
            if bulk is not None and (more := unparsed.excess(message, bulk)):
                return _unlike(expected, more)
            return parse(message)
        except (DecodeError, ValueError):
            return _unlike(expected, f"{len(message)} bytes that are none")

    def given(request: Any) -> Any:
        return _ReadRequests(request) if handler.request_streaming else _unless_refused(request)

    async def answer(request: Any, context: Any) -> Any:
        try:
            return await behaviour(given(request), context)
        except Refusal as refusal:
            await abort(context, refusal)

    async def answer_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async with contextlib.aclosing(behaviour(given(request), context)) as responses:
                async for response in responses:
                    yield response
        except Refusal as refusal:
            await abort(context, refusal)

    guarded: Any = with_behaviour(handler, answer_stream if inspect.isasyncgenfunction(behaviour) else answer)
    readable: Handler = guarded._replace(request_deserializer=read)
    return readable


def _unlike(expected: str, got: str) -> Refusal:
    return Refusal.of(Reason.INVALID_REQUEST, field="message", expected=expected, got=got)


def _unless_refused(request: Any) -> Any:
    if isinstance(request, Refusal):  # in place of what could not be read
        raise request
    return request


class _ReadRequests:
    """A stream of requests that ends with a refusal where one could not be read."""

    def __init__(self, requests: Any) -> None:
        self._requests = aiter(requests)

    def __aiter__(self) -> "_ReadRequests":
        return self

    async def __anext__(self) -> Any:
        return _unless_refused(await anext(self._requests))


class RpcMetrics(grpc.aio.ServerInterceptor):
    """Counts calls and messages under the names of go-grpc-prometheus. Before everything else."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._wrapped = _Wrapped()

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler = await continuation(details)
        if handler is None:  # a name that a caller made up: gRPC answers UNIMPLEMENTED
            self._metrics.rpc_unknown()
            return None
        return self._wrapped.once(details.method, handler, self._counted)

    def _counted(self, name: str, handler: "Handler") -> "Handler":
        service, _, method = name.lstrip("/").partition("/")
        # Of the schema, not of the handler: one that refuses takes a stream, whatever the method does.
        found = descriptor_pool.Default().FindMethodByName(f"{service}.{method}")
        kind = {(False, False): "unary", (True, False): "client_stream", (False, True): "server_stream"}.get(
            (found.client_streaming, found.server_streaming), "bidi_stream"
        )
        return _counted(handler, self._metrics.rpc(kind, service, method))


def _counted(handler: "Handler", counters: RpcCounters) -> "Handler":
    behaviour = behaviour_of(handler)

    def received(request: Any) -> Any:
        if handler.request_streaming:
            return _CountedRequests(request, counters.received)
        counters.received()
        return request

    async def counted(request: Any, context: Any) -> Any:
        with _handling(counters, context):
            response = await behaviour(received(request), context)
            counters.sent()
            return response

    async def counted_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        with _handling(counters, context):
            async with contextlib.aclosing(behaviour(received(request), context)) as responses:
                async for response in responses:
                    yield response
                    counters.sent()

    return with_behaviour(handler, counted_stream if inspect.isasyncgenfunction(behaviour) else counted)


@contextlib.contextmanager
def _handling(counters: RpcCounters, context: Any) -> Iterator[None]:
    started = time.perf_counter()
    counters.started()
    code: grpc.StatusCode | None = grpc.StatusCode.UNKNOWN
    try:
        yield
        code = _code_of(context) or grpc.StatusCode.OK
    except grpc.aio.AbortError:
        code = _code_of(context)
        raise
    # The last of these is how a caller looks who left while it was being written to.
    except (asyncio.CancelledError, GeneratorExit, grpc.aio.InternalError):
        remaining = context.time_remaining()
        late = remaining is not None and remaining <= 0
        code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        raise
    finally:
        counters.handled((code or grpc.StatusCode.UNKNOWN).name, time.perf_counter() - started)


def _code_of(context: Any) -> grpc.StatusCode | None:
    """The code that a handler set; grpc.aio gives it as it was given, or as a bare number."""
    found = context.code()
    number = found.value[0] if isinstance(found, grpc.StatusCode) else found
    return next((code for code in grpc.StatusCode if code.value[0] == number), None)


class _CountedRequests:
    """A stream of requests that is counted as it is read."""

    def __init__(self, requests: Any, received: Callable[[], None]) -> None:
        self._requests = requests
        self._received = received

    def __aiter__(self) -> "_CountedRequests":
        return self

    async def __anext__(self) -> Any:
        request = await anext(self._requests)
        self._received()
        return request
