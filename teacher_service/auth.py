"""Who is calling: keys, and the interceptor that lets no call through without one.

Keys are ``mekd_<id>_<256 random bits>``; the books keep their SHA-256 (they are random, so nothing slower is needed).
A key is looked up again at most ``CACHE_SECONDS`` after it was last seen good, so a revoked one stops an open stream.
"""

import functools
import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import grpc

from protos.errors import Reason, Refusal
from teacher_service.ledger import Key, Ledger, LedgerError, LedgerUnavailable, Role

CACHE_SECONDS = 5.0
CACHE_KEYS = 4096

_KEY = re.compile(r"mekd_([0-9a-f]{16})_([0-9a-f]{64})")

# Method -> roles that may call it; None: no credential needed. What is not listed here is denied.
_EVERY_ROLE = frozenset(Role)
_CUSTOMER, _TEACHER, _ADMIN = (frozenset({role}) for role in (Role.CUSTOMER, Role.TEACHER, Role.ADMIN))
ALLOWED: dict[str, frozenset[Role] | None] = {
    "/mekd.v1.TeacherInference/Describe": _EVERY_ROLE,
    "/mekd.v1.TeacherInference/Infer": _CUSTOMER,
    # Of every role's own account; ``MAY_NAME_ACCOUNTS`` of any.
    "/mekd.v1.QuotaLedger/GetBalance": _EVERY_ROLE,
    "/mekd.v1.QuotaLedger/ListStatement": _EVERY_ROLE,
    "/mekd.v1.QuotaLedger/StreamStatement": _EVERY_ROLE,
    "/mekd.v1.QuotaLedger/WatchBalance": _EVERY_ROLE,
    "/mekd.v1.QuotaLedger/Hold": _TEACHER,
    "/mekd.v1.QuotaLedger/LookupPost": _TEACHER,
    "/mekd.v1.QuotaLedger/Post": _TEACHER,
    "/mekd.v1.QuotaLedger/Void": _TEACHER,
    "/mekd.v1.QuotaLedger/RenewLease": _TEACHER,
    "/mekd.v1.QuotaLedger/EndLease": _TEACHER,
    "/mekd.v1.QuotaLedger/LookupKey": _TEACHER | _ADMIN,
    "/mekd.v1.QuotaLedger/GetAccount": _TEACHER | _ADMIN,
    "/mekd.v1.QuotaLedger/ListAccounts": _ADMIN,
    "/mekd.v1.QuotaLedger/CreateAccount": _ADMIN,
    "/mekd.v1.QuotaLedger/Grant": _ADMIN,
    "/mekd.v1.QuotaLedger/CreateKey": _ADMIN,
    "/mekd.v1.QuotaLedger/ListKeys": _ADMIN,
    "/mekd.v1.QuotaLedger/RevokeKey": _ADMIN,
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.health.v1.Health/List": None,
}
# A teacher reads what its own customers may ask it for.
MAY_NAME_ACCOUNTS = _TEACHER | _ADMIN

T = TypeVar("T")
# gRPC calls a method, with its two serializers, a handler; at run time the class takes no parameters.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Caller:
    """The account behind a credential. It comes from the credential alone, never from a request."""

    account: str
    role: Role


def new_key(account: str, role: Role = Role.CUSTOMER) -> tuple[str, Key]:
    """A fresh credential: the text to show once, and what the books keep."""
    key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    stored = Key(key_id=key_id, account=account, role=role, secret_sha256=_sha256(secret))
    return f"mekd_{key_id}_{secret}", stored


class Authenticator:
    """Credential -> caller, through a small cache of keys seen good."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._good: OrderedDict[bytes, tuple[float, Caller]] = OrderedDict()

    async def identify(self, metadata: Metadata | None) -> Caller:
        """The caller behind ``authorization: Bearer KEY``. Refusal: UNAUTHENTICATED, LEDGER_UNAVAILABLE."""
        header = next((value for name, value in metadata or () if name == "authorization"), None)
        if not isinstance(header, str):
            raise Refusal.of(Reason.UNAUTHENTICATED, got="no such header")
        scheme, _, text = header.partition(" ")
        found = _KEY.fullmatch(text.strip())
        if scheme.lower() != "bearer" or found is None:
            raise Refusal.of(Reason.UNAUTHENTICATED, got="another form")
        cached_under = _sha256(text.strip())  # the cache holds no secret
        until, caller = self._good.get(cached_under, (0.0, None))
        if caller is not None and self._clock() < until:
            return caller
        self._good.pop(cached_under, None)
        try:
            stored = await self._ledger.key(found[1])
        except LedgerUnavailable:
            raise Refusal.of(Reason.LEDGER_UNAVAILABLE) from None
        if stored is None or not hmac.compare_digest(stored.secret_sha256, _sha256(found[2])):
            raise Refusal.of(Reason.UNAUTHENTICATED, got="an unknown key")
        if stored.revoked:
            raise Refusal.of(Reason.UNAUTHENTICATED, got=f"key {stored.key_id}, which was revoked")
        caller = Caller(stored.account, stored.role)
        self._good[cached_under] = (self._clock() + CACHE_SECONDS, caller)
        if len(self._good) > CACHE_KEYS:
            self._good.popitem(last=False)
        return caller


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Denies unlisted methods and calls without a valid key of an allowed role, before any handler runs."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        handler = await continuation(details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return handler
        try:
            if details.method not in ALLOWED:
                raise Refusal.of(Reason.PERMISSION_DENIED, method=details.method)
            roles = ALLOWED[details.method]
            if roles is not None:
                caller = await self._authenticator.identify(details.invocation_metadata)
                if caller.role not in roles:
                    raise Refusal.of(Reason.PERMISSION_DENIED, method=details.method)
        except Refusal as refusal:
            return _refuse_all(handler, refusal)
        except LedgerError:
            return _refuse_all(handler, Refusal.of(Reason.LEDGER_UNAVAILABLE))
        return handler


async def abort(context: Any, refusal: Refusal) -> None:
    """Ends an RPC with a refusal, its details included. Always raises."""
    status = refusal.to_status()
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    trailing = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, status.message, trailing_metadata=trailing)


def refusals_as_status(handler: Callable[[Any, Any, Any], Awaitable[T]]) -> Callable[[Any, Any, Any], Awaitable[T]]:
    """A unary handler whose Refusals, and whose ledger's failures, end the RPC with their status."""

    @functools.wraps(handler)
    async def guarded(self: Any, request: Any, context: Any) -> T:
        try:
            return await handler(self, request, context)
        except (Refusal, LedgerError) as error:
            await abort(context, _refusal_of(error))
            raise

    return guarded


def refusals_as_stream_status(
    handler: Callable[[Any, Any, Any], AsyncIterator[T]],
) -> Callable[[Any, Any, Any], AsyncIterator[T]]:
    """The same for a handler that streams its responses."""

    @functools.wraps(handler)
    async def guarded(self: Any, request: Any, context: Any) -> AsyncIterator[T]:
        try:
            async for response in handler(self, request, context):
                yield response
        except (Refusal, LedgerError) as error:
            await abort(context, _refusal_of(error))

    return guarded


def _refusal_of(error: Refusal | LedgerError) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, LedgerUnavailable):
        return Refusal.of(Reason.LEDGER_UNAVAILABLE)
    return Refusal.of(Reason.LEDGER_REFUSED, problem=error)


def _refuse_all(handler: "Handler", refusal: Refusal) -> "Handler":
    async def refuse(_request: Any, context: Any) -> None:
        await abort(context, refusal)

    async def refuse_stream(_request: Any, context: Any) -> Any:
        await abort(context, refusal)
        yield  # makes this an async generator, as a streaming handler must be

    make = {
        (False, False): (grpc.unary_unary_rpc_method_handler, refuse),
        (False, True): (grpc.unary_stream_rpc_method_handler, refuse_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, refuse),
        (True, True): (grpc.stream_stream_rpc_method_handler, refuse_stream),
    }
    build, behaviour = make[handler.request_streaming, handler.response_streaming]
    return build(behaviour, handler.request_deserializer, handler.response_serializer)


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
