"""The books in memory: the same rules without a store, lost at exit.

For tests, and for measuring what a durable ledger costs: ``teacher-serve --ledger memory:`` sells by them, on
loopback and to the one account that it makes itself.
"""

from collections.abc import Callable, Collection, Sequence

from teacher_service import ledger as rules
from teacher_service.ledger import (
    NO_TERMS,
    Account,
    Credential,
    Entry,
    EntryKind,
    Held,
    Hold,
    HoldRequest,
    HoldState,
    Key,
    LedgerError,
    Posted,
    Receipt,
    Step,
)
from teacher_service.terms import Terms

INSTANCE = "memory"
LEASE_MS = 10_000


class MemoryLedger:
    """``Ledger`` in dictionaries. Single-threaded: every method runs to its end without awaiting."""

    def __init__(self, clock: Callable[[], int] = rules.now_ms) -> None:
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._holds: dict[tuple[str, str], Hold] = {}
        self._answers: dict[tuple[str, str], bytes] = {}
        self._receipts: dict[tuple[str, str], Receipt] = {}
        self._entries: list[Entry] = []
        self._keys: dict[str, Key] = {}
        self._terms: dict[str, Terms] = {}

    async def hold(self, request: HoldRequest, *, instance_id: str = "") -> Held | Posted:
        account = self._account(request.account)
        key = (request.account, request.batch_id)
        known = self._holds.get(key)
        if rules.is_replay(known):
            rules.check_same_batch(known, request)
            return Posted(answer=self._answers[key], receipt=self._receipts[key], account=account)
        if instance_id and rules.is_same_hold(known, request, instance_id):
            return Held()
        self._record(rules.apply_hold(account, known, request, instance_id or INSTANCE, self._clock()))
        return Held()

    async def replay(self, request: HoldRequest) -> Posted | None:
        account, key = self._account(request.account), (request.account, request.batch_id)
        known = self._holds.get(key)
        rules.check_settled(known, request)
        if not rules.is_replay(known):
            return None
        return Posted(answer=self._answers[key], receipt=self._receipts[key], account=account)

    async def post(
        self, account: str, batch_id: str, answer: bytes, picture_count: int | None = None, *, instance_id: str = ""
    ) -> Posted:
        key, instance = (account, batch_id), instance_id or INSTANCE
        owner, hold = self._account(account), self._holds.get(key)
        if rules.is_replay(hold):
            receipt = self._receipts[key]
            (entry,) = (e for e in self._entries if (e.account, e.sequence) == (account, receipt.sequence))
            if rules.is_same_post(hold, entry, instance, answer, picture_count):
                return Posted(answer=answer, receipt=receipt, account=owner)
        step = rules.apply_post(owner, hold, batch_id, instance, answer, self._clock(), picture_count)
        self._record(step)
        self._answers[key], self._receipts[key] = answer, rules.receipt_of(step)
        return Posted(answer=answer, receipt=self._receipts[key], account=step.account)

    async def void(self, account: str, batch_id: str, *, instance_id: str = "") -> None:
        hold = self._holds.get((account, batch_id))
        mine = hold is not None and hold.instance_id == (instance_id or INSTANCE)
        if hold is not None and mine and hold.state is HoldState.HELD:
            self._record(rules.apply_release(self._account(account), hold, HoldState.VOIDED, self._clock()))

    async def renew_lease(self, instance_id: str) -> int:
        return LEASE_MS  # nobody dies in memory: there is no sweep

    async def end_lease(self, instance_id: str) -> None:
        for hold in list(self._holds.values()):
            await self.void(hold.account, hold.batch_id, instance_id=instance_id)

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
        if name in self._accounts:
            rules.check_same_account(name, self._granted_as(name, grant_id), granted, key)
            return self._accounts[name]
        account = Account(name=name)
        step = None if granted is None else rules.apply_grant(account, granted, self._clock(), grant_id, key)
        self._terms[name] = terms
        if key is not None:
            self._keep_key(key)
        self._accounts[name] = account
        return account if step is None else self._record(step)

    async def grant(self, name: str, picture_count: int, *, grant_id: str = "") -> Account:
        rules.check_grant_id(grant_id, picture_count)
        account = self._account(name)
        if (made := self._granted_as(name, grant_id)) is not None:
            rules.check_same_grant(made, picture_count)
            return account
        return self._record(rules.apply_grant(account, picture_count, self._clock(), grant_id))

    async def check(self) -> None:
        return None

    async def account(self, name: str) -> Account:
        return self._account(name)

    async def accounts(self, *, after_name: str = "", limit: int = 1000) -> Sequence[Account]:
        return [self._accounts[name] for name in sorted(self._accounts) if name > after_name][:limit]

    async def terms(self, name: str) -> Terms:
        return self._terms[self._account(name).name]

    async def set_terms(self, name: str, said: Terms, unset: Collection[str] = ()) -> Terms:
        self._terms[name] = rules.apply_terms(await self.terms(name), said, unset)
        return self._terms[name]

    async def run_posted(self, account: str, run_id: str) -> int:
        return sum(
            entry.picture_count
            for entry in self._entries
            if (entry.account, entry.run_id, entry.kind) == (account, run_id, EntryKind.POST)
        )

    async def statement(
        self, account: str, *, run_id: str = "", after_sequence: int = 0, limit: int = 1000
    ) -> Sequence[Entry]:
        return [
            entry
            for entry in self._entries
            if entry.account == account and entry.sequence > after_sequence and (not run_id or entry.run_id == run_id)
        ][:limit]

    async def add_key(self, key: Key) -> None:
        self._account(key.account)
        self._keep_key(key)

    async def credential(self, key_id: str) -> Credential | None:
        found = self._keys.get(key_id)
        return Credential(found, self._terms[found.account]) if found is not None else None

    async def keys(self, account: str) -> Sequence[Key]:
        return [self._keys[key_id] for key_id in sorted(self._keys) if self._keys[key_id].account == account]

    async def revoke_key(self, key_id: str) -> None:
        if key_id not in self._keys:
            raise rules.no_such_key(key_id)
        key = self._keys[key_id]
        self._keys[key_id] = Key(
            key_id=key.key_id,
            account=key.account,
            role=key.role,
            secret_sha256=key.secret_sha256,
            revoked=True,
        )

    async def close(self) -> None:
        for hold in list(self._holds.values()):
            await self.void(hold.account, hold.batch_id)

    def _account(self, name: str) -> Account:
        if name not in self._accounts:
            raise LedgerError(f"expected the name of an account on these books, got {name!r}")
        return self._accounts[name]

    def _keep_key(self, key: Key) -> None:
        if self._keys.setdefault(key.key_id, key) != key:
            raise LedgerError(f"expected a new key, got the id of another: {key.key_id}")

    def _granted_as(self, name: str, grant_id: str) -> Entry | None:
        """The grant of an id; None where there is none, or no id."""
        wanted = (name, EntryKind.GRANT, grant_id)
        found = (entry for entry in self._entries if (entry.account, entry.kind, entry.batch_id) == wanted)
        return next(found, None) if grant_id else None

    def _record(self, step: Step) -> Account:
        self._accounts[step.account.name] = step.account
        if step.hold is not None:
            self._holds[step.hold.account, step.hold.batch_id] = step.hold
        self._entries += step.entries
        return step.account
