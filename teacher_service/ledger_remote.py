"""The books of another server, over gRPC: ``grpc://HOST:PORT`` or, with TLS, ``grpcs://HOST:PORT``.

Every call has a deadline, and whatever goes wrong on the way is LedgerUnavailable: it fails closed. What may have
happened on the other side after all is settled by repeating, never by guessing:

* A post is sent again until its outcome is known; the same post of the same instance gets the same receipt.
* A hold whose outcome was never learnt is in *doubt*: a repeat of the batch adopts it, else it is voided as soon as
  the ledger is back. Two callers with the same batch are told apart here, for the ledger takes the second hold of an
  instance for the first one, sent again.
* This process is one instance with a lease, renewed in the background. When it dies, the ledger expires its holds.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status

from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as wire
from protos.mekd.v1.quota_ledger_pb2_grpc import QuotaLedgerStub
from teacher_service import ledger as rules
from teacher_service.config import ServerConfig, is_loopback
from teacher_service.ledger import (
    MAX_COUNT,
    NO_TERMS,
    Account,
    Credential,
    Entry,
    Held,
    Hold,
    HoldRequest,
    HoldState,
    Key,
    LedgerError,
    LedgerIncomplete,
    LedgerRefusesKey,
    LedgerUnavailable,
    Posted,
)
from teacher_service.ledger_wire import (
    account_of,
    answered_of,
    entry_of,
    key_message,
    key_of,
    posted_of,
    terms_message,
    terms_of,
)
from teacher_service.terms import Terms

CALL_SECONDS = 10.0
POST_SECONDS = 20.0  # how long a post whose outcome is unknown is sent again
POST_PAUSE_SECONDS = 0.25
CLOSE_SECONDS = 3.0
DOUBT_SECONDS = 1.0
RENEWAL_SECONDS = 3.0
RETRY_RENEWAL_SECONDS = 0.25
PAGE_ENTRIES = 1000
MAX_MESSAGE_BYTES = ServerConfig.max_message_bytes  # no flag says otherwise: the server's and ours are the same
SCHEMES = ("grpc://", "grpcs://")

_EXPECTED = "expected a ledger as grpc://HOST:PORT or grpcs://HOST:PORT"
_AWAY = (Reason.LEDGER_UNAVAILABLE, Reason.LEDGER_OUTCOME_UNKNOWN, Reason.DRAINING)
_Batch = tuple[str, str]  # account and batch id


class RemoteLedger:
    """``Ledger`` on a ledger server.

    Args:
        url: grpc://HOST:PORT (unencrypted: refused beyond loopback unless ``insecure``) or grpcs://HOST:PORT.
        key: travels as ``authorization: Bearer KEY``; its role decides what works.
        tls_ca: of grpcs, the authority of the server's certificate; None: the ones this machine trusts.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str,
        tls_ca: Path | None = None,
        insecure: bool = False,
    ) -> None:
        self.instance_id = uuid.uuid4().hex
        self._url = url
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._open_channel = _channel_opener(url, key, tls_ca, insecure)
        self._channel: grpc.aio.Channel | None = None
        self._opened: Any = None
        self._under_way: dict[_Batch, Hold] = {}
        self._doubts: dict[_Batch, None] = {}
        self._settling = asyncio.Lock()
        self._renew_at = 0.0
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    # --- the money path: a teacher's key ---

    async def begin(self) -> None:
        """Takes this instance's lease. Raises LedgerUnavailable where the ledger is away or refuses the key."""
        await self.renew_lease(self.instance_id)
        self._keep_alive()

    async def hold(self, request: HoldRequest, *, instance_id: str = "") -> Held | Posted:
        _check_own(instance_id)
        batch = (request.account, request.batch_id)
        if (known := self._under_way.get(batch)) is not None:
            rules.check_same_batch(known, request)
            raise Refusal.of(Reason.BATCH_IN_FLIGHT, batch_id=request.batch_id)
        message = wire.HoldRequest(
            account=request.account,
            batch_id=request.batch_id,
            run_id=request.run_id,
            digest=request.digest,
            picture_count=_int64(request.picture_count, "a hold"),
            instance_id=self.instance_id,
        )
        self._under_way[batch] = Hold(
            account=request.account,
            batch_id=request.batch_id,
            run_id=request.run_id,
            digest=request.digest,
            picture_count=request.picture_count,
            state=HoldState.HELD,
            instance_id=self.instance_id,
        )
        self._keep_alive()
        held, doubted = False, batch in self._doubts
        try:
            if doubted:
                async with self._settling:  # a void on its way must not overtake this hold
                    self._doubts.pop(batch, None)
            answer = await self._call("Hold", message)
            held = answer.HasField("held")
        except BaseException as error:
            # A refusal says nothing of the hold before it, which may stand.
            if doubted or isinstance(error, (LedgerUnavailable, asyncio.CancelledError)):
                self._doubts[batch] = None
            raise
        finally:
            if not held:
                del self._under_way[batch]
        if held:
            return Held()
        return answered_of(request.batch_id, answer.answered)

    async def replay(self, request: HoldRequest) -> Posted | None:
        message = wire.LookupPostRequest(
            account=request.account, batch_id=request.batch_id, run_id=request.run_id, digest=request.digest
        )
        found = await self._call("LookupPost", message)
        return answered_of(request.batch_id, found.answered) if found.HasField("answered") else None

    async def post(
        self, account: str, batch_id: str, answer: bytes, picture_count: int | None = None, *, instance_id: str = ""
    ) -> Posted:
        _check_own(instance_id)
        message = wire.PostRequest(
            account=account,
            batch_id=batch_id,
            instance_id=self.instance_id,
            answer=answer,
            picture_count=None if picture_count is None else _int64(picture_count, "a post"),
        )
        give_up = time.monotonic() + POST_SECONDS
        while True:
            try:
                found = await self._call("Post", message)
            except LedgerUnavailable:
                if time.monotonic() + POST_PAUSE_SECONDS >= give_up or self._closed:
                    raise
                await asyncio.sleep(POST_PAUSE_SECONDS)
                continue
            except (Refusal, LedgerError):
                self._under_way.pop((account, batch_id), None)
                raise
            self._under_way.pop((account, batch_id), None)
            return posted_of(batch_id, found.posted, answer)

    async def void(self, account: str, batch_id: str, *, instance_id: str = "") -> None:
        _check_own(instance_id)
        await self._void(account, batch_id)
        self._under_way.pop((account, batch_id), None)

    async def _void(self, account: str, batch_id: str) -> None:
        await self._call("Void", wire.VoidRequest(account=account, batch_id=batch_id, instance_id=self.instance_id))

    async def renew_lease(self, instance_id: str) -> int:
        _check_own(instance_id if instance_id != self.instance_id else "")
        message = wire.RenewLeaseRequest(instance_id=self.instance_id)
        renewed = await self._call("RenewLease", message, RENEWAL_SECONDS)
        lease_ms = int(renewed.lease_duration.ToMilliseconds())
        self._renew_at = time.monotonic() + lease_ms / 3000
        return lease_ms

    async def end_lease(self, instance_id: str) -> None:
        _check_own(instance_id if instance_id != self.instance_id else "")
        await self._call("EndLease", wire.EndLeaseRequest(instance_id=self.instance_id), CLOSE_SECONDS)

    # --- accounts and keys: an admin's key ---

    async def create_account(
        self,
        name: str,
        granted: int | None,
        key: Key | None = None,
        terms: Terms = NO_TERMS,
        *,
        grant_id: str = "",
    ) -> Account:
        rules.check_account_name(name)
        rules.check_grant_id(grant_id, granted)
        count = None if granted is None else _int64(granted, "a grant")
        message = wire.CreateAccountRequest(
            account=name,
            picture_count=count,
            key=key_message(key) if key is not None else None,
            terms=terms_message(terms),
            grant_id=grant_id,
        )
        made = await self._change("CreateAccount", message, grant_id)
        if (kept := terms_of(made.terms)) != terms:
            if kept.said():
                raise LedgerIncomplete(f"the account {name!r} is there with other terms, {kept.said()}; set them")
            raise LedgerIncomplete(
                f"the account {name!r} was made without its terms: the ledger at {self._url} knows none; "
                "update it, then set them"
            )
        return account_of(made.account)

    async def set_terms(self, name: str, said: Terms, unset: Collection[str] = ()) -> Terms:
        message = wire.SetTermsRequest(account=name, terms=terms_message(said), unset_fields=unset)
        terms = terms_of((await self._change("SetTerms", message)).terms)
        if not said.said().items() <= terms.said().items():
            raise LedgerError(
                f"the account {name!r} has not all of the new terms: the ledger at {self._url} knows fewer; "
                "update it, then set them"
            )
        return terms

    async def grant(self, name: str, picture_count: int, *, grant_id: str = "") -> Account:
        rules.check_grant_id(grant_id, picture_count)
        count = _int64(picture_count, "a grant")
        message = wire.GrantRequest(account=name, picture_count=count, grant_id=grant_id)
        return account_of((await self._change("Grant", message, grant_id)).account)

    async def accounts(self, *, after_name: str = "", limit: int = 1000) -> Sequence[Account]:
        found: list[Account] = []
        while len(found) < limit:
            message = wire.ListAccountsRequest(after_name=after_name, page_size=min(limit - len(found), PAGE_ENTRIES))
            page = await self._call("ListAccounts", message)
            found += [account_of(account) for account in page.accounts]
            after_name = page.next_after_name
            if not after_name:
                break
        return found

    async def add_key(self, key: Key) -> None:
        await self._change("CreateKey", wire.CreateKeyRequest(key=key_message(key)))

    async def keys(self, account: str) -> Sequence[Key]:
        return [key_of(key) for key in (await self._call("ListKeys", wire.ListKeysRequest(account=account))).keys]

    async def revoke_key(self, key_id: str) -> None:
        await self._change("RevokeKey", wire.RevokeKeyRequest(key_id=key_id))

    async def check(self) -> None:
        await self.renew_lease(self.instance_id)

    # --- reading: either's key ---

    async def account(self, name: str) -> Account:
        return account_of((await self._call("GetAccount", wire.GetAccountRequest(account=name))).account)

    async def terms(self, name: str) -> Terms:
        return terms_of((await self._call("GetAccount", wire.GetAccountRequest(account=name))).terms)

    async def run_posted(self, account: str, run_id: str) -> int:
        try:
            found = await self._call("GetBalance", wire.GetBalanceRequest(account=account, run_id=run_id))
        except LedgerUnavailable:
            raise
        except LedgerError:  # no such account: nothing was posted on it
            return 0
        return int(found.run_posted_count)

    async def statement(
        self, account: str, *, run_id: str = "", after_sequence: int = 0, limit: int = 1000
    ) -> Sequence[Entry]:
        found: list[Entry] = []
        while len(found) < limit:
            message = wire.ListStatementRequest(
                account=account,
                run_id=run_id,
                after_sequence=after_sequence,
                page_size=min(limit - len(found), PAGE_ENTRIES),
            )
            page = await self._call("ListStatement", message)
            found += [entry_of(account, entry) for entry in page.entries]
            after_sequence = page.next_after_sequence
            if not after_sequence:
                break
        return found

    async def credential(self, key_id: str) -> Credential | None:
        found = await self._call("LookupKey", wire.LookupKeyRequest(key_id=key_id))
        return Credential(key_of(found.key), terms_of(found.terms)) if found.HasField("key") else None

    async def watch(self, name: str) -> AsyncGenerator[Account]:
        """As ``ledger.watch``, told by the server. LedgerUnavailable when it stops or the connection is lost.

        Refusal WATCH_LIMIT where too many are open.
        """
        call = self._stub().WatchBalance(wire.WatchBalanceRequest(account=name), metadata=self._metadata)
        try:
            async for told in call:
                yield account_of(told.account)
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            # Whatever fails here, the lease will lapse by itself.
            with contextlib.suppress(LedgerError, Refusal):
                await self.end_lease(self.instance_id)
        if self._channel is not None:
            await self._channel.close()

    # --- behind them ---

    def _stub(self) -> Any:
        if self._channel is None:
            self._channel = self._open_channel()
            self._opened = QuotaLedgerStub(self._channel)
        return self._opened

    async def _call(self, method: str, message: Any, seconds: float | None = None) -> Any:
        """One call. Raises Refusal, LedgerError, LedgerUnavailable."""
        if self._closed and method != "EndLease":
            raise LedgerUnavailable("the ledger is closed")
        try:
            call = getattr(self._stub(), method)
            return await call(message, metadata=self._metadata, timeout=seconds or CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from None

    async def _change(self, method: str, message: Any, grant_id: str = "") -> Any:
        """An operator's change, never sent twice by itself: whether it was made may not be known."""
        try:
            return await self._call(method, message)
        except LedgerRefusesKey:  # and so did nothing
            raise
        except LedgerUnavailable as error:
            advice = "look whether it was done before you do it again"
            if grant_id:
                advice = f"do it again with the same grant id {grant_id}: it is done once"
            raise LedgerUnavailable(f"{error}; {advice}") from None

    def _failure(self, error: grpc.aio.AioRpcError) -> Refusal | LedgerError:
        """What a failed call means here."""
        refusal = _refusal_of(error)
        if refusal is None or refusal.reason in _AWAY:
            code, said = error.code(), " ".join(str(error.details()).split())
            return LedgerUnavailable(f"the ledger at {self._url} is away ({code.name}: {said})")
        if refusal.reason in (Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED):
            # Of this server's key, and no business of whoever sent the batch.
            return LedgerRefusesKey(f"the ledger at {self._url} refuses its key (MEKD_LEDGER_KEY): {refusal.message}")
        if refusal.reason is Reason.LEDGER_REFUSED:
            return LedgerError(refusal.message)
        return refusal

    def _keep_alive(self) -> None:
        """Renews the lease and settles doubts from now on."""
        if self._keeper is None and not self._closed:
            self._keeper = asyncio.create_task(self._keep(), name="ledger-lease")

    async def _keep(self) -> None:
        while True:
            with contextlib.suppress(LedgerError, Refusal):
                if time.monotonic() >= self._renew_at:
                    await self.renew_lease(self.instance_id)
                for batch in list(self._doubts):
                    async with self._settling:
                        if batch in self._doubts:
                            await self._void(*batch)
                            self._doubts.pop(batch, None)
            await asyncio.sleep(min(DOUBT_SECONDS, max(RETRY_RENEWAL_SECONDS, self._renew_at - time.monotonic())))


def _channel_opener(url: str, key: str, tls_ca: Path | None, insecure: bool) -> Callable[[], grpc.aio.Channel]:
    """Checks everything now, opens later: a channel belongs to the loop it is opened in. Raises LedgerError."""
    scheme, _, address = url.partition("://")
    host, _, port = address.rpartition(":")
    if f"{scheme}://" not in SCHEMES or not host or not port.isdecimal() or int(port) > 65535:
        raise LedgerError(f"{_EXPECTED}, got {url!r}")
    expected = f"expected a key for the ledger at {url} in MEKD_LEDGER_KEY"
    if not key:
        raise LedgerError(f"{expected}, got none")
    if not key.isascii() or not key.isprintable():  # never the key itself: the line goes to logs
        raise LedgerError(
            f"{expected}, got one with a line break or a character beyond ASCII in it; copy it again, one line of "
            "letters, digits and _"
        )
    loopback = is_loopback(host)
    options: list[tuple[str, int]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # what gRPC goes by; its default is a minute
        # A ledger that comes back is found at once, not after a minute.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # and as long may a connection take
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.enable_http_proxy", int(not loopback)),
    ]
    if scheme == "grpcs":
        try:
            authority = tls_ca.read_bytes() if tls_ca is not None else None
        except OSError as error:
            raise LedgerError(f"--ledger-ca {tls_ca}: {error.strerror}") from None
        return lambda: grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authority), options)
    if not loopback and not insecure:
        raise LedgerError(
            f"{url} is not loopback and unencrypted: use grpcs://, "
            "or --ledger-insecure if the key and the answers may travel in the clear"
        )
    return lambda: grpc.aio.insecure_channel(address, options)


def _refusal_of(error: grpc.aio.AioRpcError) -> Refusal | None:
    """The refusal in a failed call; None where it failed on the way, or says nothing this program knows."""
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if not isinstance(details, bytes):
        return None
    try:
        refusal = Refusal.from_status(Status.FromString(details))
    except DecodeError:
        return None
    return refusal if refusal.reason is not Reason.UNKNOWN else None


def _check_own(instance_id: str) -> None:
    if instance_id:
        raise LedgerError("expected a teacher to ask the ledger itself, got one that asks through another teacher")


def _int64(count: int, what: str) -> int:
    if abs(count) > MAX_COUNT:
        raise LedgerError(f"expected {what} of 1 to {MAX_COUNT} pictures, got {count}")
    return count
