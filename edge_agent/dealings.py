"""A run's dealings with its teacher: one connection, who pays, and whether the books agree with the journal."""

from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_agent import kserve
from edge_agent.config import RunConfig
from edge_agent.console import Console
from edge_agent.failures import BadInput, Failure, RunFolderProblem, TeacherAway
from edge_agent.journal import Totals
from edge_agent.runs import RunFolder, digest_of
from edge_agent.teacher import Balance, Books, Description, RemoteTeacher, Teacher
from protos.mekd.v1.teacher_inference_pb2 import Batch

SHORT_WAIT_SECONDS = 2.0
"""How long teacher and books are waited for where the run can do without: it may be ending on SIGTERM."""


class Dealings:
    """Owns the connection to the teacher, and what the journal knows of who pays."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        api_key: str | None,
        console: Console,
        *,
        check_egress: Callable[[Batch], None],
    ) -> None:
        self._config = config
        self._folder = folder
        self._journal = folder.journal
        self._api_key = api_key
        self._console = console
        self._check_egress = check_egress
        self._teacher: Teacher | None = None
        self._account_is_known = False
        self._was_away = False  # when it was to be described: it is taken for what it was at an earlier start
        self.counts_sent = kserve.is_address(config.teacher)
        """Of a teacher without books the agent counts what it sends; then that is what the budget bounds."""

    # --- the connection ---

    @property
    def may_connect(self) -> bool:
        """Whether there is anything to show the teacher: a key, or a certificate of this device's own."""
        return self._api_key is not None or self._config.tls_cert != ""

    def teacher(self) -> Teacher:
        """The teacher, connected. Raises BadInput where there is nothing to show it."""
        if self._teacher is None:
            self._teacher = self._connect(self._config.wait_seconds)
        return self._teacher

    def _connect(self, wait_seconds: float) -> Teacher:
        config = self._config
        shared: dict[str, Any] = {
            "api_key": self._api_key,
            "tls_ca": Path(config.tls_ca) if config.tls_ca else None,
            "tls_pair": (Path(config.tls_cert), Path(config.tls_key)) if config.tls_cert else None,
            "insecure": config.insecure,
            "wait_seconds": wait_seconds,
            "check_egress": self._check_egress,
            "tell": self._console.say,
        }
        if self.counts_sent:
            return kserve.KServeTeacher(config.teacher, config.kserve, **shared)
        if not self.may_connect:
            raise BadInput("expected a key in MEKD_API_KEY or --key-file, got neither; teacher-admin makes one")
        return RemoteTeacher(config.teacher, **shared)

    @cached_property
    def description(self) -> Description:
        """What the teacher is: asked once, or as the journal has it where the run is bound to it or has no key.

        The journal's is also good for a run that has asked nothing and will not before phase 2, while the teacher is
        away. Keeps the fact `teacher`. Raises Failure.
        """
        known = self._journal.fact("teacher")
        totals = self._journal.totals()
        # With answers in the journal the run is bound to its first teacher; asking checks that it is still there.
        if self.counts_sent:
            bound = totals.charged_pictures > 0
        else:
            bound = not self.may_connect or totals.planned_pictures > 0
        if known is not None and bound:
            return Description.from_facts(known)
        if known is not None and totals.planned_pictures == 0 and self._config.deprivatize.im_queries == 0:
            try:
                described = self._describe_soon()
            except TeacherAway:
                self._was_away = True
                self._console.say(
                    "the teacher is away; going on with what it was before; it is asked again before anything is "
                    "bought"
                )
                return Description.from_facts(known)
        else:
            described = self.teacher().describe()
        self._journal.set_facts(teacher=asdict(described))
        return described

    def _describe_soon(self) -> Description:
        """What the teacher is, asked for SHORT_WAIT_SECONDS: a call that hangs may take longer. Raises Failure."""
        with closing(self._connect(min(self._config.wait_seconds, SHORT_WAIT_SECONDS))) as impatient:
            described = impatient.describe()
        self.teacher()  # it is there: the run's end compares the books
        return described

    def close(self) -> None:
        """Closes the connection; the next question opens another."""
        if self._teacher is not None:
            self._teacher.close()
            self._teacher = None

    # --- who counts, and who pays ---

    @property
    def metered_by(self) -> str:
        """Whose count bounds the budget: "teacher" or "agent"."""
        return "agent" if self.counts_sent else "teacher"

    def charged(self, totals: Totals) -> int:
        """What the budget bounds: answers that were paid for, or pictures sent where nobody but the agent counts."""
        return totals.sent_pictures if self.counts_sent else totals.charged_pictures

    def paying_teacher(self) -> Teacher:
        """The teacher, once it is known who pays it: no question is asked before."""
        if not self._account_is_known:
            self.check_account()
        if self._was_away:
            self._check_description()
        return self.teacher()

    def _check_description(self) -> None:
        """Raises BadInput where the teacher is another than it was taken for while it was away."""
        taken_for, found = asdict(self.description), asdict(self.teacher().describe())
        if changed := [name for name in found if found[name] != taken_for[name]]:
            raise BadInput(
                f"expected the teacher that {self._folder.path} knows, which was away when this start began, got one "
                f"with other {', '.join(changed)}; nothing was sent. Start the same command again"
            )
        self._was_away = False

    def check_account(self, *, within_seconds: float | None = None) -> None:
        """Refuses another account than was asked with so far, and books that do not know what it has paid.

        Warns of an account that cannot pay for the rest.
        """
        books = self._books()
        if books is None:
            return
        account = books.balance(self._journal.run_id, within_seconds=within_seconds)
        totals = self._journal.totals()
        # Before anything is asked: ids of batches are an account's own, so another would pay for the same ones again.
        bound_to = self._journal.fact("account") if totals.planned_pictures > 0 else None
        paid_by = {bound_to} if bound_to else {receipt.account for _, receipt in self._journal.receipts()}
        if paid_by and account.account not in paid_by:
            raise RunFolderProblem(
                f"{self._folder.path}: account {', '.join(sorted(paid_by))} pays for it, and this key is "
                f"{account.account}'s; give a key of that account, or another --run-dir"
            )
        if account.run_posted != totals.charged_pictures:
            self._compare(books, within_seconds=within_seconds)
        self._journal.set_facts(account=account.account)
        self._account_is_known = True
        # Before it was stopped this run may have paid for more than its journal knows, and what is held may be its.
        paid = max(totals.charged_pictures, account.run_posted)
        missing = self._config.budget - paid - account.balance - account.held
        if missing > 0:
            self._console.warn(
                f"account {account.account} has {account.balance} pictures, {missing} fewer than --budget "
                f"{self._config.budget} needs; have it granted more meanwhile, or lower --budget"
            )

    def let_go_of_the_account(self) -> None:
        """An account that had nothing to pay with, and paid for nothing, may be another one the next time."""
        books = self._books()
        if books is not None and self._journal.totals().charged_pictures == 0:
            with suppress(Failure):
                account = books.balance(self._journal.run_id, within_seconds=SHORT_WAIT_SECONDS)
                if account.run_posted == account.held == 0:
                    self._journal.set_facts(account=None)

    def balance(self) -> Balance | None:
        """What the books say; None where there are none, where nothing was asked, or where they are away."""
        asked = self._teacher is not None or self._journal.totals().planned_pictures > 0
        if asked and not self.counts_sent:
            with suppress(Exception):  # a summary is written even where the teacher is away
                books = self._books()
                assert books is not None
                return books.balance(self._journal.run_id, within_seconds=SHORT_WAIT_SECONDS)
        return None

    def reconcile(self) -> None:
        """Compares the journal with the teacher's books, id by id. Raises RunFolderProblem naming the ids."""
        if self.counts_sent:
            sent = self._journal.totals().sent_pictures
            if self._teacher is not None or sent > 0:
                self._console.say(f"{sent} pictures sent by this agent's own count; no books to compare with")
            return
        ours = self._journal.charges()
        compared = digest_of(ours)
        # A run that was killed after its last answer still has to compare; one that has compared need not again.
        if self._teacher is None and (not ours or not self.may_connect or self._journal.fact("compared") == compared):
            return
        books = self._books()
        assert books is not None
        self._compare(books)
        self._journal.set_facts(compared=compared)

    def _books(self) -> Books | None:
        """The teacher's books; None where it keeps none."""
        teacher = self.teacher()
        return teacher if isinstance(teacher, RemoteTeacher) else None

    def _compare(self, books: Books, *, within_seconds: float | None = None) -> None:
        """Raises RunFolderProblem where journal and books disagree on what this run has paid for."""
        ours = self._journal.charges()
        theirs = books.posts(self._journal.run_id, within_seconds=within_seconds)
        open_ids = self._journal.open_ids()
        wrong = sorted(
            batch_id
            for batch_id in ours.keys() | theirs.keys()
            # An answer that is still on its way, or was lost with a connection, is ours for the asking.
            if ours.get(batch_id, 0) != theirs.get(batch_id, 0) and batch_id not in open_ids
        )
        if wrong:
            raise RunFolderProblem(
                f"this journal and the teacher's books disagree on {len(wrong)} batches: {', '.join(wrong[:20])}; "
                f"journal {sum(ours.values())} pictures, books {sum(theirs.values())}. Where this is an older copy "
                "of the run's folder, go on with the newest; where the address is another teacher's, give another "
                "--run-dir. Else keep the folder: what 'edge-agent receipts' prints of it is what the teacher's "
                "operator can hold against the books ('teacher-admin ledger verify --receipts FILE')"
            )
