"""Who is calling: keys and certificates, and the interceptor that lets no call through without one.

Keys are ``mekd_<id>_<256 random bits>``; the books keep their SHA-256 (they are random, so nothing slower is needed).
A key is looked up again at most ``CACHE_SECONDS`` after it was last seen good: a revoked one ends an open stream at
its next batch after that, and buys nothing more. A key that nobody knows is refused without another look for
``UNKNOWN_SECONDS``, and strangers' keys are looked up ``MAX_LOOKUPS`` at a time: the books have more to do.

Where clients show certificates (``--tls-client-ca``), a call without a key is made by the certificate: its one DNS
name is the name of an account, and it acts as that account's customer, never more. A key, where one is given, wins.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import inspect
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import grpc

from protos.errors import Reason, Refusal
from teacher_service.ledger import Credential, Key, Ledger, LedgerError, LedgerUnavailable, Role
from teacher_service.terms import Terms

CACHE_SECONDS = 5.0
CACHE_KEYS = 4096
UNKNOWN_SECONDS = 1.0
MAX_LOOKUPS = 64
MOST_TOLD = 300  # characters of a refusal's variable, where it travels as metadata

KEY = re.compile(r"mekd_([0-9a-f]{16})_([0-9a-f]{64})")

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
    "/mekd.v1.QuotaLedger/SetTerms": _ADMIN,
    "/mekd.v1.QuotaLedger/CreateKey": _ADMIN,
    "/mekd.v1.QuotaLedger/ListKeys": _ADMIN,
    "/mekd.v1.QuotaLedger/RevokeKey": _ADMIN,
    "/inference.GRPCInferenceService/ServerLive": None,
    "/inference.GRPCInferenceService/ServerReady": None,
    "/inference.GRPCInferenceService/ModelReady": None,
    "/inference.GRPCInferenceService/ServerMetadata": _EVERY_ROLE,
    "/inference.GRPCInferenceService/ModelMetadata": _EVERY_ROLE,
    "/inference.GRPCInferenceService/ModelConfig": _EVERY_ROLE,
    "/inference.GRPCInferenceService/ModelStatistics": _EVERY_ROLE,
    "/inference.GRPCInferenceService/RepositoryIndex": _EVERY_ROLE,
    "/inference.GRPCInferenceService/ModelInfer": _CUSTOMER,
    "/inference.GRPCInferenceService/ModelStreamInfer": _CUSTOMER,
    # Of the protocol, and not offered: UNIMPLEMENTED to whoever has a key.
    "/inference.GRPCInferenceService/RepositoryModelLoad": _EVERY_ROLE,
    "/inference.GRPCInferenceService/RepositoryModelUnload": _EVERY_ROLE,
    "/inference.GRPCInferenceService/SystemSharedMemoryStatus": _EVERY_ROLE,
    "/inference.GRPCInferenceService/SystemSharedMemoryRegister": _EVERY_ROLE,
    "/inference.GRPCInferenceService/SystemSharedMemoryUnregister": _EVERY_ROLE,
    "/inference.GRPCInferenceService/CudaSharedMemoryStatus": _EVERY_ROLE,
    "/inference.GRPCInferenceService/CudaSharedMemoryRegister": _EVERY_ROLE,
    "/inference.GRPCInferenceService/CudaSharedMemoryUnregister": _EVERY_ROLE,
    "/inference.GRPCInferenceService/TraceSetting": _EVERY_ROLE,
    "/inference.GRPCInferenceService/LogSettings": _EVERY_ROLE,
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.health.v1.Health/List": None,
    # Names of services and the published form of their messages: nothing of any account.
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": None,
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
    terms: Terms = field(default_factory=Terms)


async def caller_of(authenticator: "Authenticator", context: Any) -> Caller:
    """Who makes a call: what every handler asks, so that there is one answer to it. Refusal as of ``identify``."""
    return await asks_for(authenticator, context)()


def asks_for(authenticator: "Authenticator", context: Any) -> Callable[[], Awaitable[Caller]]:
    """``caller_of``, to be asked again and again by what may outlive the call.

    What the caller shows is read here, once: when a call has ended, gRPC frees the memory that its context reads.
    """
    metadata = context.invocation_metadata()
    if _header(metadata) is None:
        # Only names of a certificate that the client authority signed are here: the handshake saw to it.
        names = tuple(name.decode("utf-8", "replace") for name in context.auth_context().get("peer_dns", ()))
        if names:
            return functools.partial(authenticator.identify_certificate, names)
    return functools.partial(authenticator.identify, metadata)


def new_key(account: str, role: Role = Role.CUSTOMER) -> tuple[str, Key]:
    """A fresh credential: the text to show once, and what the books keep."""
    key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    stored = Key(key_id=key_id, account=account, role=role, secret_sha256=_sha256(secret))
    return f"mekd_{key_id}_{secret}", stored


class Authenticator:
    """Credential -> caller, through small caches of keys seen good and of ids that nobody knows."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._good: OrderedDict[bytes, tuple[float, Caller]] = OrderedDict()
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[Credential | None]] = {}

    async def identify(self, metadata: Metadata | None) -> Caller:
        """The caller behind ``authorization: Bearer KEY``.

        Refusal: UNAUTHENTICATED, ACCOUNT_SUSPENDED, LEDGER_UNAVAILABLE.
        """
        header = _header(metadata)
        if not isinstance(header, str):
            raise Refusal.of(Reason.UNAUTHENTICATED, got="no such header")
        scheme, _, text = header.partition(" ")
        found = KEY.fullmatch(text.strip())
        if scheme.lower() != "bearer" or found is None:
            what = "a key that is not whole" if scheme.lower() == "bearer" else "another form"
            raise Refusal.of(Reason.UNAUTHENTICATED, got=what)
        cached_under = _sha256(text.strip())  # the cache holds no secret
        until, caller = self._good.get(cached_under, (0.0, None))
        if caller is not None and self._clock() < until:
            return caller
        try:
            credential = await self._credential(found[1], seen_good=caller is not None)
        except LedgerError:
            raise Refusal.of(Reason.LEDGER_UNAVAILABLE) from None
        self._good.pop(cached_under, None)
        if credential is None or not hmac.compare_digest(credential.key.secret_sha256, _sha256(found[2])):
            raise Refusal.of(Reason.UNAUTHENTICATED, got="an unknown key")
        stored = credential.key
        if stored.revoked:
            raise Refusal.of(Reason.UNAUTHENTICATED, got=f"key {stored.key_id}, which was revoked")
        return self._let_in(cached_under, Caller(stored.account, stored.role, credential.terms))

    async def identify_certificate(self, names: Sequence[str]) -> Caller:
        """The customer that a certificate with these DNS names speaks for. Refusals as of ``identify``."""
        if len(names) != 1:
            got = f"no key, and a certificate with {len(names)} DNS names instead of one"
            raise Refusal.of(Reason.UNAUTHENTICATED, got=got)
        cached_under = b"certificate " + names[0].encode()
        until, caller = self._good.get(cached_under, (0.0, None))
        if caller is not None and self._clock() < until:
            return caller
        self._good.pop(cached_under, None)
        try:
            terms = await self._ledger.terms(names[0])
        except LedgerUnavailable:
            raise Refusal.of(Reason.LEDGER_UNAVAILABLE) from None
        except LedgerError:
            got = f"no key, and a certificate for {names[0][:80]!r}, which names no account"
            raise Refusal.of(Reason.UNAUTHENTICATED, got=got) from None
        return self._let_in(cached_under, Caller(names[0], Role.CUSTOMER, terms))

    async def _credential(self, key_id: str, *, seen_good: bool) -> Credential | None:
        """What the books have under an id, asked once for all who wait for it. Raises LedgerUnavailable.

        ``seen_good``: a key that was let in before is looked up however many others are.
        """
        if self._clock() < self._unknown.get(key_id, 0.0):
            return None
        lookup = self._lookups.get(key_id)
        if lookup is None:
            if len(self._lookups) >= MAX_LOOKUPS and not seen_good:
                raise LedgerUnavailable(f"{MAX_LOOKUPS} keys are looked up already")
            lookup = self._lookups[key_id] = asyncio.create_task(self._look_up(key_id), name="look-up-key")
            # Whoever waited may have gone; then nobody else asks how it ended.
            lookup.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(lookup)

    async def _look_up(self, key_id: str) -> Credential | None:
        try:
            credential = await self._ledger.credential(key_id)
        finally:
            del self._lookups[key_id]
        if credential is None:
            self._unknown[key_id] = self._clock() + UNKNOWN_SECONDS
            self._unknown.move_to_end(key_id)
            if len(self._unknown) > CACHE_KEYS:
                self._unknown.popitem(last=False)
        return credential

    def _let_in(self, cached_under: bytes, caller: Caller) -> Caller:
        if caller.role is Role.CUSTOMER and caller.terms.suspended:
            raise Refusal.of(Reason.ACCOUNT_SUSPENDED, account=caller.account)
        self._good[cached_under] = (self._clock() + CACHE_SECONDS, caller)
        if len(self._good) > CACHE_KEYS:
            self._good.popitem(last=False)
        return caller


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Denies unlisted methods and calls without a credential of an allowed role, before any handler's own code runs.

    A key is checked before the request is read. A certificate (``certificates``: clients may show one) is seen only
    with the call itself, so a call without a key is checked around its handler.
    """

    def __init__(self, authenticator: Authenticator, *, certificates: bool = False) -> None:
        self._authenticator = authenticator
        self._certificates = certificates

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
                expected, got = "a method that some role may call", "one that none may"
                raise Refusal.of(Reason.PERMISSION_DENIED, method=details.method, expected=expected, got=got)
            roles = ALLOWED[details.method]
            if roles is not None and self._certificates and _header(details.invocation_metadata) is None:
                return around(handler, functools.partial(self._checked, details.method, roles))
            if roles is not None:
                _check_role(await self._authenticator.identify(details.invocation_metadata), roles, details.method)
        except (Refusal, LedgerError) as error:
            return refuse_all(handler, _refusal_of(error))
        return handler

    @contextlib.asynccontextmanager
    async def _checked(self, method: str, roles: frozenset[Role], context: Any) -> AsyncIterator[None]:
        try:
            _check_role(await caller_of(self._authenticator, context), roles, method)
        except (Refusal, LedgerError) as error:
            await abort(context, _refusal_of(error))
        yield


def _check_role(caller: Caller, roles: frozenset[Role], method: str) -> None:
    if caller.role not in roles:
        raise not_allowed(caller, roles, method)


def not_allowed(caller: Caller, roles: frozenset[Role], method: str) -> Refusal:
    """What a caller is told whose role is none of those that may."""
    expected = f"a key of role {' or '.join(role.value for role in Role if role in roles)}"
    return Refusal.of(Reason.PERMISSION_DENIED, method=method, expected=expected, got=caller.role.value)


def _header(metadata: Metadata | None) -> str | bytes | None:
    return next((value for name, value in metadata or () if name == "authorization"), None)


def key_id_of(metadata: Metadata | None) -> str | None:
    """The public part of the key that a call brings; None: it brings none."""
    header = _header(metadata)
    found = KEY.search(header) if isinstance(header, str) else None
    return found[1] if found else None


def around(handler: "Handler", guard: Callable[[Any], contextlib.AbstractAsyncContextManager[None]]) -> "Handler":
    """The same handler inside ``guard(context)``, which may abort the call before the handler's own code runs."""
    behaviour = behaviour_of(handler)

    async def guarded(request: Any, context: Any) -> Any:
        async with guard(context):
            return await behaviour(request, context)

    async def guarded_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        async with guard(context), contextlib.aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

    return with_behaviour(handler, guarded_stream if inspect.isasyncgenfunction(behaviour) else guarded)


def behaviour_of(handler: "Handler") -> Callable[[Any, Any], Any]:
    """What a handler does, whichever of the four kinds it is."""
    found = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    assert found is not None
    return found


def with_behaviour(handler: "Handler", behaviour: Callable[[Any, Any], Any]) -> "Handler":
    """A handler of the same kind that does something else."""
    build = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return build(behaviour, handler.request_deserializer, handler.response_serializer)


async def abort(context: Any, refusal: Refusal) -> None:
    """Ends an RPC with a refusal, its details included. Always raises."""
    # A status larger than the metadata that a client takes (8 KiB) would reach it as a broken call.
    short = {name: value[:MOST_TOLD] + "…" * (len(value) > MOST_TOLD) for name, value in refusal.variables.items()}
    status = dataclasses.replace(refusal, variables=short).to_status()
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


def refuse_all(handler: "Handler", refusal: Refusal) -> "Handler":
    """A handler that refuses every call, before a request is read.

    It always takes a stream of requests, which is the same on the wire: to a handler of one request gRPC comes only
    when it has waited for the whole message and parsed it.
    """

    async def refuse(_requests: Any, context: Any) -> None:
        await abort(context, refusal)

    async def refuse_stream(_requests: Any, context: Any) -> Any:
        await abort(context, refusal)
        yield  # makes this an async generator, as a streaming handler must be

    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse_stream)
    return grpc.stream_unary_rpc_method_handler(refuse)


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
