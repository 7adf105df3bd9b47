"""QuotaLedger: a customer's own balance and statement."""

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as wire
from protos.mekd.v1.quota_ledger_pb2_grpc import QuotaLedgerServicer
from teacher_service.auth import Authenticator, refusals_as_status
from teacher_service.ledger import Entry, EntryKind, Ledger

DEFAULT_PAGE_ENTRIES = 500
MAX_PAGE_ENTRIES = 5000

_KINDS = {
    EntryKind.GRANT: wire.ENTRY_KIND_GRANT,
    EntryKind.HOLD: wire.ENTRY_KIND_HOLD,
    EntryKind.POST: wire.ENTRY_KIND_POST,
    EntryKind.VOID: wire.ENTRY_KIND_VOID,
    EntryKind.EXPIRE: wire.ENTRY_KIND_EXPIRE,
}


class QuotaServicer(QuotaLedgerServicer):
    """QuotaLedger over the ledger."""

    def __init__(self, ledger: Ledger, authenticator: Authenticator) -> None:
        self._ledger = ledger
        self._authenticator = authenticator

    @refusals_as_status
    async def GetBalance(self, request: wire.GetBalanceRequest, context: Any) -> wire.GetBalanceResponse:
        """The caller's own account."""
        caller = await self._authenticator.identify(context.invocation_metadata())
        account = await self._ledger.account(caller.account)
        run_posted = await self._ledger.run_posted(caller.account, request.run_id) if request.run_id else 0
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
        """The caller's own journal, one page."""
        caller = await self._authenticator.identify(context.invocation_metadata())
        for field, value in (("page_size", request.page_size), ("after_sequence", request.after_sequence)):
            if value < 0:
                raise Refusal.of(Reason.INVALID_REQUEST, field=field, expected="0 or more", got=value)
        limit = min(request.page_size or DEFAULT_PAGE_ENTRIES, MAX_PAGE_ENTRIES)
        entries = await self._ledger.statement(
            caller.account, run_id=request.run_id, after_sequence=request.after_sequence, limit=limit + 1
        )
        page = entries[:limit]
        return wire.ListStatementResponse(
            entries=[_message(entry) for entry in page],
            next_after_sequence=page[-1].sequence if len(entries) > limit else 0,
        )


def _message(entry: Entry) -> wire.StatementEntry:
    created = Timestamp()
    created.FromMilliseconds(entry.create_time_ms)
    return wire.StatementEntry(
        sequence=entry.sequence,
        create_time=created,
        kind=_KINDS[entry.kind],
        batch_id=entry.batch_id,
        run_id=entry.run_id,
        picture_count=entry.picture_count,
        debit_book=entry.debit_book,
        credit_book=entry.credit_book,
    )
