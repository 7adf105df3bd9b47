"""The teacher as the agent sees it, and the one that speaks this project's own protocol.

``RemoteTeacher.answers`` keeps a window of batches outstanding, reconnects, and sends again by id whatever has not
been answered. It knows neither phases nor losses, and it may be wrong about nothing that costs money: an id is only
ever repeated with the very same bytes.
"""

import ipaddress
import queue
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status

from edge_agent.failures import BadCredential, BadInput, TeacherAway
from edge_agent.journal import Batch
from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as ledger_wire
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.quota_ledger_pb2_grpc import QuotaLedgerStub
from protos.mekd.v1.teacher_inference_pb2_grpc import TeacherInferenceStub

MAX_MESSAGE_BYTES = 64 * 2**20
MESSAGE_MARGIN_BYTES = 4096  # for all of a message but its pixels
UNARY_TIMEOUT_SECONDS = 30.0
SILENCE_SECONDS = 120.0  # a stream with batches outstanding that says nothing for so long is taken for dead
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
ENGINE_ATTEMPTS = 3
_PAIR_FLAGS = ("--tls-cert", "--tls-key")
LARGEST_WINDOW = 256  # batches: they are kept in memory, and the queues of a stream are bounded

_CREDENTIAL = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_HOPELESS = {
    "Hostname Verification Check failed": "its certificate is for another name; give the name that is in it",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is of no authority in --tls-ca, or no longer valid",
    "Failed parsing HTTP/2": "that port speaks no gRPC; look at what teacher-serve says it listens on",
}
"""What gRPC says of an address that was never reached -> what to do; waiting changes nothing."""
_NO_CONNECTION = ("failed to connect", "name resolution", "Domain name not found")
_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,  # how gRPC reports a connection that broke in the middle of a message
    grpc.StatusCode.UNKNOWN,
)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the teacher is."""

    model_digest: str
    labels: tuple[str, ...]
    channels: int
    height: int
    width: int
    max_batch_pictures: int
    encodings: tuple[int, ...] = (wire.IMAGE_ENCODING_RAW_UINT8,)
    """How pictures may travel, of those that this agent knows."""
    indices_only: bool = False
    """Whether this account was sold class indices when it was asked; where it is not known, False."""

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Description":
        """Of what a journal kept of one, as JSON has it; what this version does not know is left out."""
        known: dict[str, Any] = {name: facts[name] for name in cls.__dataclass_fields__ if name in facts}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class Balance:
    """The account's books, in pictures, and what this run has posted."""

    account: str
    run_posted: int
    held: int
    balance: int


@dataclass(frozen=True)
class Answered:
    """A batch and its paid answer.

    ``received_bytes``: what came over the network, where that was another message than ``result``.
    """

    batch: Batch
    result: wire.BatchResult
    received_bytes: int | None = None


@dataclass(frozen=True)
class Refused:
    """A batch that waiting alone will not get answered; nothing was charged for it."""

    batch: Batch
    refusal: Refusal


class Outbox(Protocol):
    """Where batches to send come from; each, and that it is sent, is durable before ``next_batch`` returns it."""

    def next_batch(self) -> Batch | None:
        """The next batch to send; None when there is none just now."""

    def repeated(self, batch: Batch) -> None:
        """Told that a batch is about to be sent once more."""

    def again(self, batch: Batch) -> bool:
        """Takes a batch back, to be sent once more as far as the budget allows; False where nothing more is sent."""

    def limit(self, picture_count: int) -> None:
        """Told how many pictures the teacher takes in one batch, at most."""


class Teacher(Protocol):
    """Whoever answers."""

    def describe(self) -> Description:
        """What the teacher is."""

    def answers(self, run_id: str, model_digest: str, outbox: Outbox) -> Iterator[Answered | Refused]:
        """Sends what the outbox holds, and yields what comes of it, until it is empty and all is settled."""

    def message_bytes(self, batch: Batch) -> int:
        """Size of a batch as it travels."""

    def close(self) -> None:
        """Closes the connection."""


class Books(Protocol):
    """A teacher that counts what it charges."""

    def balance(self, run_id: str, *, within_seconds: float | None = None) -> Balance:
        """The books; waits `within_seconds` at most, where given."""

    def posts(self, run_id: str, *, within_seconds: float | None = None) -> dict[str, int]:
        """Batch id -> pictures, as the teacher's books have them for this run; waits as `balance`, for each page."""


class RemoteTeacher:
    """A teacher behind gRPC.

    Args:
        address: HOST:PORT.
        api_key: travels as ``authorization: Bearer KEY``; None: nothing does.
        tls_ca: authority of the server's certificate; None: unencrypted, refused beyond loopback unless ``insecure``.
        tls_pair: this device's certificate and its key, for a server that wants them; they may stand in for a key.
        wait_seconds: how long the teacher may be away before TeacherAway.
        check_egress: sees every batch just before it leaves, and raises to keep it here (``egress``).
        tell: gets one line when the connection is lost.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None,
        tls_ca: Path | None = None,
        tls_pair: tuple[Path, Path] | None = None,
        insecure: bool = False,
        wait_seconds: float = 600.0,
        check_egress: Callable[[wire.Batch], None],
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._address = address
        self._wait_seconds = wait_seconds
        self._check_egress = check_egress
        self._link = Link(address, api_key=api_key, wait_seconds=wait_seconds, tell=tell)
        self._channel = open_channel(
            address, tls=tls_ca is not None, tls_ca=tls_ca, tls_pair=tls_pair, insecure=insecure
        )
        self._inference = TeacherInferenceStub(self._channel)
        self._ledger = QuotaLedgerStub(self._channel)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def describe(self) -> Description:
        answer = self._link.unary(self._inference.Describe, wire.DescribeRequest())
        if wire.IMAGE_ENCODING_RAW_UINT8 not in answer.encodings:
            raise BadInput(
                f"the teacher at {self._address} takes no encoding that this agent knows; update the agent"
            )
        # A larger message would be refused after it was planned, and planned it is sent again for ever.
        message_bytes = min(answer.max_message_bytes or MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES) - MESSAGE_MARGIN_BYTES
        fitting = message_bytes // max(1, answer.channels * answer.height * answer.width)
        return Description(
            model_digest=answer.model_digest,
            labels=tuple(answer.labels),
            channels=answer.channels,
            height=answer.height,
            width=answer.width,
            max_batch_pictures=max(1, min(answer.max_batch_pictures, fitting)),
            encodings=tuple(encoding for encoding in answer.encodings if encoding in codec.ENCODINGS),
            indices_only=answer.answer_kind == wire.ANSWER_KIND_CLASS_INDICES,
        )

    def balance(self, run_id: str, *, within_seconds: float | None = None) -> Balance:
        request = ledger_wire.GetBalanceRequest(run_id=run_id)
        answer = self._link.unary(self._ledger.GetBalance, request, within_seconds)
        return Balance(
            account=answer.account,
            run_posted=answer.run_posted_count,
            held=answer.held_count,
            balance=answer.balance_count,
        )

    def posts(self, run_id: str, *, within_seconds: float | None = None) -> dict[str, int]:
        found: dict[str, int] = {}
        after = 0
        while True:
            request = ledger_wire.ListStatementRequest(run_id=run_id, after_sequence=after)
            page = self._link.unary(self._ledger.ListStatement, request, within_seconds)
            for entry in page.entries:
                if entry.kind == ledger_wire.ENTRY_KIND_POST:
                    found[entry.batch_id] = found.get(entry.batch_id, 0) + entry.picture_count
            after = page.next_after_sequence
            if after == 0:
                return found

    def message_bytes(self, batch: Batch) -> int:
        return len(batch.request)

    def answers(self, run_id: str, model_digest: str, outbox: Outbox) -> Iterator[Answered | Refused]:
        exchange = _Exchange(outbox)
        patience = Patience(self._wait_seconds)
        while not exchange.finished():
            stream = _Stream(self._inference, self._link.metadata, run_id, self._check_egress)
            try:
                window = self._accepted(stream, model_digest)
                exchange.connection_is_new()
                for settled in exchange.over(stream, window, patience):
                    patience.renew()
                    yield settled
            except grpc.RpcError as error:
                self._link.wait_out(error, patience)
            finally:
                stream.close()

    def _accepted(self, stream: "_Stream", model_digest: str) -> int:
        """The window to keep. Raises BadInput where it serves another model than this run's."""
        stream.configure()
        response = stream.receive(UNARY_TIMEOUT_SECONDS)
        self._link.reached()
        kind = response.WhichOneof("payload")
        if kind != "accepted":
            raise BadInput(f"the teacher at {self._address}: expected it to accept the stream, got {kind}")
        if response.accepted.model_digest != model_digest:
            raise BadInput(
                f"this run began with the model {model_digest}, the teacher serves {response.accepted.model_digest}; "
                "nothing was sent to it. Give another --run-dir to distil the new one"
            )
        return max(1, min(int(response.accepted.window_batches), LARGEST_WINDOW))


class Link:
    """An address, what every call to it carries, and how long it may be away.

    Args:
        address: as it is named to a person.
        api_key: travels as ``authorization: Bearer KEY``; None: nothing does.
        wait_seconds: how long the teacher may be away before TeacherAway.
        tell: gets one line when a call fails and is made again.
    """

    def __init__(
        self, address: str, *, api_key: str | None, wait_seconds: float, tell: Callable[[str], None]
    ) -> None:
        self._address = address
        self._wait_seconds = wait_seconds
        self._tell = tell
        self._was_reached = False
        self.metadata: tuple[tuple[str, str], ...] = ()
        if api_key is not None:
            self.metadata = (("authorization", f"Bearer {api_key}"),)

    def unary(self, call: Callable[..., Any], request: Any, within_seconds: float | None = None) -> Any:
        """The answer to one call, made again while the teacher is away. Raises Failure, no grpc.RpcError."""
        patience = Patience(self._wait_seconds if within_seconds is None else within_seconds)
        patience.begin()  # nothing is drawn meanwhile: the first attempt counts
        timeout_seconds = UNARY_TIMEOUT_SECONDS if within_seconds is None else within_seconds
        while True:
            try:
                answer = call(request, metadata=self.metadata, timeout=timeout_seconds)
            except grpc.RpcError as error:
                self.wait_out(error, patience)
            else:
                self.reached()
                return answer

    def reached(self) -> None:
        """Told that a server of this protocol was there: from here on it is away when it does not answer."""
        self._was_reached = True

    def wait_out(self, error: grpc.RpcError, patience: "Patience") -> None:
        """Sleeps before the next attempt. Raises what is final as its failure, and TeacherAway."""
        refusal = _refusal(error)
        # Where the server said so in its status: a limit that passes is no fault of the request.
        advised_seconds = None if refusal is None else refusal.retry_seconds
        if advised_seconds is None:
            self.raise_if_final(error)
        else:
            self.reached()
        self.sleep(error, patience, advised_seconds or 0.0)

    def sleep(self, error: grpc.RpcError, patience: "Patience", at_least_seconds: float = 0.0) -> None:
        """Sleeps before the next attempt, and says why. Raises TeacherAway."""
        why = f"the teacher at {self._address} is away ({brief(error)})"
        if not self._was_reached and any(words in (error.details() or "") for words in _NO_CONNECTION):
            why += ", and was never reached: is that its address, and does it want TLS (--tls-ca)?"
        pause = patience.pause(why, at_least_seconds)
        self._tell(f"{why}; trying again in {pause:.1f} s")
        time.sleep(pause)

    def raise_if_final(self, error: grpc.RpcError) -> None:
        """Raises BadCredential or BadInput for a status that waiting does not change."""
        code, refusal = error.code(), _refusal(error)
        if refusal is not None and refusal.reason is Reason.ACCOUNT_SUSPENDED:
            raise BadCredential(f"the teacher at {self._address} sells nothing: {refusal.message}") from None
        if code in _CREDENTIAL:
            given = "refuses the key" if self.metadata else "wants a key"
            raise BadCredential(
                f"the teacher at {self._address} {given}: {brief(error)}; "
                "give a valid one in MEKD_API_KEY or --key-file"
            ) from None
        if code is grpc.StatusCode.UNIMPLEMENTED:
            raise BadInput(
                f"expected a teacher of this protocol at {self._address}, got a server without it: {brief(error)}"
            ) from None
        if code not in _PASSING:
            raise BadInput(f"the teacher at {self._address} refuses: {brief(error)}") from None
        for words, remedy in _HOPELESS.items() if not self._was_reached else ():
            if words in (error.details() or ""):
                raise BadInput(f"--teacher {self._address}: {remedy} ({brief(error)})") from None


class Patience:
    """Pauses that grow, until the teacher has been away for too long.

    That counts from the first failure since it was last there: between answers pictures may be drawn for minutes.
    """

    def __init__(self, wait_seconds: float, longest_pause_seconds: float | None = None) -> None:
        self._wait_seconds = wait_seconds
        self._longest_pause = LONGEST_PAUSE_SECONDS if longest_pause_seconds is None else longest_pause_seconds
        self.renew()

    def renew(self) -> None:
        """The teacher was there: the waiting begins anew."""
        self._until: float | None = None
        self._pause = FIRST_PAUSE_SECONDS

    def begin(self) -> float:
        """When there is no patience left, counted from now where it is not counted yet."""
        if self._until is None:
            self._until = time.monotonic() + self._wait_seconds
        return self._until

    def pause(self, why: str, at_least_seconds: float = 0.0) -> float:
        """Seconds to wait now. Raises TeacherAway when there is no patience left."""
        self.check(why)
        pause, self._pause = self._pause, min(self._pause * 2, self._longest_pause)
        return min(max(pause, at_least_seconds), max(0.0, self.begin() - time.monotonic()))

    def check(self, why: str) -> None:
        """Raises TeacherAway when there is no patience left."""
        if time.monotonic() >= self.begin():
            raise TeacherAway(
                f"{why}; waited {self._wait_seconds:.0f} s (--wait-seconds). "
                "What was answered is kept; start the same command again later"
            )


class _Stream:
    """One open Infer call, its reader thread, and bounded queues in both directions."""

    _BOUND = 4096  # messages; the window keeps them far below

    def __init__(
        self,
        stub: Any,
        metadata: tuple[tuple[str, str], ...],
        run_id: str,
        check_egress: Callable[[wire.Batch], None],
    ) -> None:
        self._run_id = run_id
        self._check_egress = check_egress
        self._outgoing: queue.Queue[wire.InferRequest | None] = queue.Queue(self._BOUND)
        self._incoming: queue.Queue[wire.InferResponse | grpc.RpcError | None] = queue.Queue(self._BOUND)
        self._call = stub.Infer(iter(self._outgoing.get, None), metadata=metadata)
        self._reader = threading.Thread(target=self._read, name="teacher-read", daemon=True)
        self._reader.start()

    def configure(self) -> None:
        self._outgoing.put_nowait(wire.InferRequest(config=wire.StreamConfig(run_id=self._run_id)))

    def send(self, batch: Batch) -> None:
        message = wire.Batch.FromString(batch.request)
        self._check_egress(message)  # the last line before the network
        self._outgoing.put_nowait(wire.InferRequest(batch=message))

    def receive(self, timeout_seconds: float) -> wire.InferResponse:
        """The next message. Raises grpc.RpcError when the stream broke, ended or has been silent for too long."""
        try:
            received = self._incoming.get(timeout=timeout_seconds)
        except queue.Empty:
            raise _StreamSilent(f"silent for {timeout_seconds:.0f} s") from None
        if received is None:
            raise _StreamOver("the server ended the stream")
        if isinstance(received, grpc.RpcError):
            raise received
        return received

    def close(self) -> None:
        self._outgoing.put_nowait(None)
        self._call.cancel()
        self._reader.join(5.0)

    def _read(self) -> None:
        try:
            for response in self._call:
                self._incoming.put_nowait(response)
            self._incoming.put_nowait(None)
        except grpc.RpcError as error:
            self._incoming.put_nowait(error)


class _StreamOver(grpc.RpcError):
    """A stream that ended while batches are outstanding: reconnect."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return str(self)


class _StreamSilent(_StreamOver):
    """A stream that said nothing for as long as its reader was willing to wait."""


class _Exchange:
    """What is outstanding, over as many streams as it takes."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._outstanding: dict[str, Batch] = {}
        self._to_send: list[Batch] = []  # outstanding, to be sent (again) now
        self._later: list[tuple[float, Batch]] = []  # outstanding, to be sent again at a time
        self._failures: dict[str, int] = {}
        self._draining = False

    def finished(self) -> bool:
        """Whether nothing is outstanding and the outbox has nothing more."""
        if not self._outstanding:
            self._take()
        return not self._outstanding

    def connection_is_new(self) -> None:
        """All that is outstanding goes out again on the next stream."""
        fresh = {batch.batch_id for batch in self._to_send}
        for batch in self._outstanding.values():
            if batch.batch_id not in fresh:
                self._outbox.repeated(batch)
        self._to_send = list(self._outstanding.values())
        self._later = []
        self._draining = False

    def over(self, stream: _Stream, window: int, patience: Patience) -> Iterator[Answered | Refused]:
        """Sends and receives until all is settled. Raises grpc.RpcError when the stream is over."""
        while True:
            self._send_what_fits(stream, window)
            if not self._outstanding:
                return
            response = self._receive(stream)
            if response is None:
                continue
            kind = response.WhichOneof("payload")
            if kind == "result":
                batch = self._outstanding.pop(response.result.batch_id, None)
                if batch is not None:  # else: the answer to a repeat whose first answer came after all
                    yield Answered(batch, response.result)
            elif kind == "refusal":
                batch = self._outstanding.get(response.refusal.batch_id)
                if batch is not None:
                    refused = self._refused(batch, response.refusal.status, patience)
                    if refused is not None:
                        yield refused
            elif kind == "draining":
                self._draining = True

    def _receive(self, stream: _Stream) -> wire.InferResponse | None:
        """The next message; None when it is time to send something again."""
        if not self._later:
            return stream.receive(SILENCE_SECONDS)
        due = min(at for at, _ in self._later)
        try:
            return stream.receive(max(0.0, due - time.monotonic()))
        except _StreamSilent:
            return None

    def _take(self) -> bool:
        batch = self._outbox.next_batch()
        if batch is None:
            return False
        self._outstanding[batch.batch_id] = batch
        self._to_send.append(batch)
        return True

    def _send_what_fits(self, stream: _Stream, window: int) -> None:
        now = time.monotonic()
        for entry in [entry for entry in self._later if entry[0] <= now]:
            self._later.remove(entry)
            self._outbox.repeated(entry[1])
            self._to_send.append(entry[1])
        if self._draining:  # the server reads no more here; what is outstanding goes out on the next stream
            return
        # Each as it is drawn, which may take long: the teacher looks at it while the next is.
        while self._to_send or (len(self._outstanding) < window and self._take()):
            stream.send(self._to_send[0])
            del self._to_send[0]

    def _refused(self, batch: Batch, status: Status, patience: Patience) -> Refused | None:
        refusal = Refusal.from_status(status)
        retry_seconds = refusal.retry_seconds
        if refusal.reason is Reason.ENGINE_FAILED:
            self._failures[batch.batch_id] = self._failures.get(batch.batch_id, 0) + 1
            if self._failures[batch.batch_id] < ENGINE_ATTEMPTS:
                retry_seconds = 1.0
        if retry_seconds is not None:
            patience.check(f"the teacher keeps refusing ({refusal})")
            self._later.append((time.monotonic() + retry_seconds, batch))
            return None
        del self._outstanding[batch.batch_id]
        return Refused(batch, refusal)


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT never leaves this machine."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_channel(
    address: str,
    *,
    tls: bool,
    tls_ca: Path | None = None,
    tls_pair: tuple[Path, Path] | None = None,
    insecure: bool = False,
    keepalive: bool = True,
    retries: bool = True,
) -> grpc.Channel:
    """A channel to HOST:PORT; ``tls`` without ``tls_ca`` trusts the authorities that gRPC knows.

    ``keepalive``: pings while nothing is said; not every server suffers them. ``retries``: gRPC may send
    a call once more by itself where the server has not looked at it. Raises BadInput.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise BadInput(f"--teacher: expected HOST:PORT, got {address!r}")
    options: list[tuple[str, int]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if not retries:
        options.append(("grpc.enable_retries", 0))
    if keepalive:  # also while no call is open, and however long nothing is said: what NAT forgets is lost
        options += [
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.ping_timeout_ms", 10_000),  # what gRPC goes by; its default is a minute
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        ]
    if is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))  # http_proxy would send loopback traffic to a stranger
    if tls:
        cert, key = (_pem(path, flag) for path, flag in zip(tls_pair or (None, None), _PAIR_FLAGS, strict=True))
        if tls_pair is not None:
            _check_pair(*tls_pair)
        credentials = grpc.ssl_channel_credentials(_pem(tls_ca, "--tls-ca"), key, cert)
        return grpc.secure_channel(address, credentials, options)
    if not is_loopback(address) and not insecure:
        raise BadInput(
            f"--teacher {address} is not loopback: give --tls-ca, or --insecure if the key may travel unencrypted"
        )
    return grpc.insecure_channel(address, options)


def _pem(path: Path | None, flag: str) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise BadInput(f"{flag} {path}: {error.strerror}") from None


def _check_pair(cert: Path, key: Path) -> None:
    """Refuses what gRPC would find out at each connection, and take for a teacher that is away."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password="")  # asks nobody for one
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise BadInput(
            f"--tls-cert {cert}, --tls-key {key}: expected a certificate and its key, unencrypted, got {reason}"
        ) from None


def _refusal(error: grpc.RpcError) -> Refusal | None:
    """What a server of this project said in its status; None where the status has no such detail."""
    trailing: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    try:
        return Refusal.from_status(Status.FromString(dict(trailing or ())["grpc-status-details-bin"]))
    except (KeyError, DecodeError):
        return None


def brief(error: grpc.RpcError) -> str:
    """A status in one line."""
    return f"{error.code().name}: {' '.join((error.details() or 'no details').split())}"
