"""QuotaLedger: the books over gRPC, to customers, to teachers elsewhere and to admins.

Who may call what stands in ``auth.ALLOWED``, and the interceptor keeps it. What is left to check here is whose
account is meant: a customer's is its own.
"""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any
from weakref import WeakValueDictionary

import structlog
from google.protobuf.duration_pb2 import Duration

from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as wire
from protos.mekd.v1.quota_ledger_pb2_grpc import QuotaLedgerServicer
from teacher_service.auth import (
    MAY_NAME_ACCOUNTS,
    Authenticator,
    Caller,
    caller_of,
    key_id_of,
    not_allowed,
    refusals_as_status,
    refusals_as_stream_status,
)
from teacher_service.ledger import (
    HoldRequest,
    Key,
    Ledger,
    LedgerUnavailable,
    Posted,
    check_account_name,
    check_identifier,
    no_such_key,
    watch,
)
from teacher_service.ledger_wire import (
    account_message,
    answered_message,
    entry_message,
    key_message,
    key_of,
    posted_message,
    terms_message,
    terms_of,
)

DEFAULT_PAGE_ENTRIES = 500
MAX_PAGE_ENTRIES = 5000
MAX_DIGEST_BYTES = 64
# Every open watch asks the books once a second.
MAX_WATCHES = 256
MAX_ACCOUNT_WATCHES = 16

log = structlog.get_logger()

_KEY_ID = re.compile(r"[0-9a-f]{16}")


class QuotaServicer(QuotaLedgerServicer):
    """QuotaLedger over the ledger."""

    def __init__(self, ledger: Ledger, authenticator: Authenticator) -> None:
        self._ledger = ledger
        self._authenticator = authenticator
        self._draining = asyncio.Event()
        self._watches: Counter[str] = Counter()  # account of the key -> how many are open
        self._statements: Counter[str] = Counter()  # likewise
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def drain(self) -> None:
        """Tells every watch to end, and waits until they have. The caller sets the deadline."""
        self._draining.set()
        while self._watches.total():
            await asyncio.sleep(0.02)

    # --- what every role may read ---

    @refusals_as_status
    async def GetBalance(self, request: wire.GetBalanceRequest, context: Any) -> wire.GetBalanceResponse:
        """An account's balance, and what one run cost."""
        _check_run_id(request.run_id)
        account = await self._ledger.account(await self._account_meant(request.account, "GetBalance", context))
        run_posted = 0
        if request.run_id:
            async with self._turn(account.name):
                run_posted = await self._ledger.run_posted(account.name, request.run_id)
        return wire.GetBalanceResponse(
            account=account.name,
            granted_count=account.granted,
            posted_count=account.posted,
            held_count=account.held,
            balance_count=account.balance,
            run_posted_count=run_posted,
        )

    @refusals_as_status
    async def ListStatement(self, request: wire.ListStatementRequest, context: Any) -> wire.ListStatementResponse:
        """A journal, one page."""
        name = await self._account_meant(request.account, "ListStatement", context)
        _check_run_id(request.run_id)
        _check_not_negative(page_size=request.page_size, after_sequence=request.after_sequence)
        limit = min(request.page_size or DEFAULT_PAGE_ENTRIES, MAX_PAGE_ENTRIES)
        async with self._turn(name):
            entries = await self._ledger.statement(
                name, run_id=request.run_id, after_sequence=request.after_sequence, limit=limit + 1
            )
        page = entries[:limit]
        return wire.ListStatementResponse(
            entries=[entry_message(entry) for entry in page],
            next_after_sequence=page[-1].sequence if len(entries) > limit else 0,
        )

    @refusals_as_stream_status
    async def StreamStatement(
        self, request: wire.StreamStatementRequest, context: Any
    ) -> AsyncIterator[wire.StreamStatementResponse]:
        """A journal up to its end as of now."""
        name = await self._account_meant(request.account, "StreamStatement", context)
        _check_run_id(request.run_id)
        _check_not_negative(after_sequence=request.after_sequence)
        last, after = (await self._ledger.account(name)).sequence, request.after_sequence
        with _place(self._statements, (await self._caller(context)).account):
            while after < last:
                async with self._turn(name):
                    entries = await self._ledger.statement(
                        name, run_id=request.run_id, after_sequence=after, limit=DEFAULT_PAGE_ENTRIES
                    )
                page = [entry_message(entry) for entry in entries if entry.sequence <= last]
                if not page:
                    return
                yield wire.StreamStatementResponse(entries=page)
                after = page[-1].sequence

    @refusals_as_stream_status
    async def WatchBalance(
        self, request: wire.WatchBalanceRequest, context: Any
    ) -> AsyncIterator[wire.WatchBalanceResponse]:
        """The balance now and whenever it has changed; a key revoked meanwhile ends it, and so does the server."""
        name = await self._account_meant(request.account, "WatchBalance", context)

        async def check() -> None:
            await self._account_meant(request.account, "WatchBalance", context)

        with _place(self._watches, (await self._caller(context)).account):
            async with contextlib.aclosing(watch(self._ledger, name, self._draining, check)) as balances:
                async for account in balances:
                    yield wire.WatchBalanceResponse(account=account_message(account))
        raise Refusal.of(Reason.DRAINING)

    def _turn(self, account: str) -> AbstractAsyncContextManager[None]:
        """One report on an account at a time: whoever asks for many waits for its own, and not everybody else."""
        return self._turns.setdefault(account, asyncio.Lock())

    # --- the money path of a teacher elsewhere ---

    @refusals_as_status
    async def Hold(self, request: wire.HoldRequest, context: Any) -> wire.HoldResponse:
        """Holds for an instance of the caller's."""
        instance_id = await self._instance(request.instance_id, context)
        _check_batch(request.account, request.batch_id)
        check_identifier("run_id", request.run_id)
        if len(request.digest) > MAX_DIGEST_BYTES:
            got = f"{len(request.digest)} bytes"
            raise Refusal.of(
                Reason.INVALID_REQUEST, field="digest", expected=f"at most {MAX_DIGEST_BYTES} bytes", got=got
            )
        wish = HoldRequest(
            account=request.account,
            batch_id=request.batch_id,
            run_id=request.run_id,
            digest=request.digest,
            picture_count=request.picture_count,
        )
        found = await self._ledger.hold(wish, instance_id=instance_id)
        if isinstance(found, Posted):
            return wire.HoldResponse(answered=answered_message(found))
        return wire.HoldResponse(held=wire.HeldBatch())

    @refusals_as_status
    async def LookupPost(self, request: wire.LookupPostRequest, context: Any) -> wire.LookupPostResponse:
        """A batch as it was answered, if it was."""
        _check_batch(request.account, request.batch_id)
        check_identifier("run_id", request.run_id)
        wish = HoldRequest(
            account=request.account,
            batch_id=request.batch_id,
            run_id=request.run_id,
            digest=request.digest,
            picture_count=0,  # not looked at
        )
        found = await self._ledger.replay(wish)
        return wire.LookupPostResponse(answered=answered_message(found) if found is not None else None)

    @refusals_as_status
    async def Post(self, request: wire.PostRequest, context: Any) -> wire.PostResponse:
        """Charges what an instance of the caller's holds."""
        instance_id = await self._instance(request.instance_id, context)
        _check_batch(request.account, request.batch_id)
        posted = await self._ledger.post(
            request.account,
            request.batch_id,
            request.answer,
            request.picture_count if request.HasField("picture_count") else None,
            instance_id=instance_id,
        )
        return wire.PostResponse(posted=posted_message(posted))

    @refusals_as_status
    async def Void(self, request: wire.VoidRequest, context: Any) -> wire.VoidResponse:
        """Gives back what an instance of the caller's holds."""
        instance_id = await self._instance(request.instance_id, context)
        _check_batch(request.account, request.batch_id)
        await self._ledger.void(request.account, request.batch_id, instance_id=instance_id)
        return wire.VoidResponse()

    @refusals_as_status
    async def RenewLease(self, request: wire.RenewLeaseRequest, context: Any) -> wire.RenewLeaseResponse:
        """An instance of the caller's lives."""
        lease_ms = await self._ledger.renew_lease(await self._instance(request.instance_id, context))
        lease = Duration()
        lease.FromMilliseconds(lease_ms)
        return wire.RenewLeaseResponse(lease_duration=lease)

    @refusals_as_status
    async def EndLease(self, request: wire.EndLeaseRequest, context: Any) -> wire.EndLeaseResponse:
        """An instance of the caller's ends."""
        await self._ledger.end_lease(await self._instance(request.instance_id, context))
        return wire.EndLeaseResponse()

    @refusals_as_status
    async def LookupKey(self, request: wire.LookupKeyRequest, context: Any) -> wire.LookupKeyResponse:
        """A credential as stored, and its account's terms."""
        found = await self._ledger.credential(request.key_id) if _KEY_ID.fullmatch(request.key_id) else None
        if found is None:
            return wire.LookupKeyResponse()
        return wire.LookupKeyResponse(key=key_message(found.key), terms=terms_message(found.terms))

    # --- accounts and keys ---

    @refusals_as_status
    async def GetAccount(self, request: wire.GetAccountRequest, context: Any) -> wire.GetAccountResponse:
        """One account."""
        check_account_name(request.account)
        account = await self._ledger.account(request.account)
        terms = await self._ledger.terms(request.account)
        return wire.GetAccountResponse(account=account_message(account), terms=terms_message(terms))

    @refusals_as_status
    async def ListAccounts(self, request: wire.ListAccountsRequest, context: Any) -> wire.ListAccountsResponse:
        """Every account, one page."""
        _check_not_negative(page_size=request.page_size)
        limit = min(request.page_size or DEFAULT_PAGE_ENTRIES, MAX_PAGE_ENTRIES)
        found = await self._ledger.accounts(after_name=request.after_name, limit=limit + 1)
        page = found[:limit]
        return wire.ListAccountsResponse(
            accounts=[account_message(account) for account in page],
            next_after_name=page[-1].name if len(found) > limit else "",
        )

    @refusals_as_status
    async def CreateAccount(self, request: wire.CreateAccountRequest, context: Any) -> wire.CreateAccountResponse:
        """A new account."""
        granted = request.picture_count if request.HasField("picture_count") else None
        key = _checked_key(request.key) if request.HasField("key") else None
        if key is not None and key.account != request.account:
            raise Refusal.of(
                Reason.INVALID_REQUEST, field="key.account", expected=repr(request.account), got=repr(key.account)
            )
        terms = terms_of(request.terms)
        _note(context, "create account", account=request.account, pictures=granted, **terms.said())
        with _outcome_unknown(request.grant_id):
            account = await self._ledger.create_account(
                request.account, granted, key, terms, grant_id=request.grant_id
            )
        kept = await self._ledger.terms(request.account)  # of a repetition, maybe others than are asked for now
        return wire.CreateAccountResponse(account=account_message(account), terms=terms_message(kept))

    @refusals_as_status
    async def Grant(self, request: wire.GrantRequest, context: Any) -> wire.GrantResponse:
        """More pictures."""
        check_account_name(request.account)
        _note(context, "grant", account=request.account, pictures=request.picture_count)
        with _outcome_unknown(request.grant_id):
            account = await self._ledger.grant(request.account, request.picture_count, grant_id=request.grant_id)
        return wire.GrantResponse(account=account_message(account))

    @refusals_as_status
    async def SetTerms(self, request: wire.SetTermsRequest, context: Any) -> wire.SetTermsResponse:
        """Other terms for an account."""
        said, unset = terms_of(request.terms), list(request.unset_fields)
        _note(context, "set terms", account=request.account, unset=unset, **said.said())
        terms = await self._ledger.set_terms(request.account, said, unset)
        return wire.SetTermsResponse(terms=terms_message(terms))

    @refusals_as_status
    async def CreateKey(self, request: wire.CreateKeyRequest, context: Any) -> wire.CreateKeyResponse:
        """One more key of an account."""
        key = _checked_key(request.key)
        _note(context, "create key", account=key.account, role=key.role.value, key_id=key.key_id)
        with _outcome_unknown():
            await self._ledger.add_key(key)
        return wire.CreateKeyResponse()

    @refusals_as_status
    async def ListKeys(self, request: wire.ListKeysRequest, context: Any) -> wire.ListKeysResponse:
        """Every key of an account."""
        check_account_name(request.account)
        return wire.ListKeysResponse(keys=[key_message(key) for key in await self._ledger.keys(request.account)])

    @refusals_as_status
    async def RevokeKey(self, request: wire.RevokeKeyRequest, context: Any) -> wire.RevokeKeyResponse:
        """The end of a key."""
        if not _KEY_ID.fullmatch(request.key_id):
            raise no_such_key(request.key_id)
        _note(context, "revoke key", key_id=request.key_id)
        with _outcome_unknown():
            await self._ledger.revoke_key(request.key_id)
        return wire.RevokeKeyResponse()

    async def _caller(self, context: Any) -> Caller:
        return await caller_of(self._authenticator, context)

    async def _account_meant(self, named: str, method: str, context: Any) -> str:
        """The account a request is about. Refusal PERMISSION_DENIED where a customer names another's."""
        caller = await self._caller(context)
        if named in ("", caller.account):
            return caller.account
        if caller.role not in MAY_NAME_ACCOUNTS:
            raise not_allowed(caller, MAY_NAME_ACCOUNTS, f"{method} of another account")
        check_account_name(named)
        return named

    async def _instance(self, instance_id: str, context: Any) -> str:
        """An instance as the books know it: nobody acts for another account's teachers, or for this server."""
        check_identifier("instance_id", instance_id)
        return f"{(await self._caller(context)).account}/{instance_id}"


def _note(context: Any, what: str, **fields: object) -> None:
    """A line in the log about what an operator asks for, before it is done: the books do not say by whose key."""
    log.info(what, by_key=key_id_of(context.invocation_metadata()), **fields)


@contextlib.contextmanager
def _outcome_unknown(grant_id: str = "") -> Iterator[None]:
    """A change by an admin: without an id that makes it once, nobody is told to send it again. Raises Refusal."""
    try:
        yield
    except LedgerUnavailable:
        if grant_id:
            raise
        raise Refusal.of(Reason.LEDGER_OUTCOME_UNKNOWN) from None


@contextlib.contextmanager
def _place(open_: Counter[str], account: str) -> Iterator[None]:
    """Counts one call more, of whoever opened it, as long as it lasts. Refusal: WATCH_LIMIT."""
    for limit, count, scope in (
        (MAX_ACCOUNT_WATCHES, open_[account], f"account {account}"),
        (MAX_WATCHES, open_.total(), "this server"),
    ):
        if count >= limit:
            raise Refusal.of(Reason.WATCH_LIMIT, limit=limit, scope=scope)
    open_[account] += 1
    try:
        yield
    finally:
        open_[account] -= 1
        if not open_[account]:
            del open_[account]


def _check_batch(account: str, batch_id: str) -> None:
    """Keeps from the books what could never be on them. Refusal INVALID_REQUEST, LedgerError."""
    check_identifier("batch_id", batch_id)
    check_account_name(account)


def _check_run_id(run_id: str) -> None:
    if run_id:
        check_identifier("run_id", run_id)


def _check_not_negative(**fields: int) -> None:
    for field, value in fields.items():
        if value < 0:
            raise Refusal.of(Reason.INVALID_REQUEST, field=field, expected="0 or more", got=value)


def _checked_key(message: wire.StoredKey) -> Key:
    key = key_of(message)
    if not _KEY_ID.fullmatch(key.key_id):
        got = repr(key.key_id[:80])
        raise Refusal.of(Reason.INVALID_REQUEST, field="key.key_id", expected="16 digits of 0-9 and a-f", got=got)
    if len(key.secret_sha256) != 32:
        got = f"{len(key.secret_sha256)} bytes"
        raise Refusal.of(Reason.INVALID_REQUEST, field="key.secret_digest", expected="32 bytes", got=got)
    check_account_name(key.account)
    return key
