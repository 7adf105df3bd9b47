"""RemoteTeacher against a real gRPC server whose behaviour each test writes down."""

import queue
import socketserver
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from edge_agent.failures import BadCredential, BadInput, TeacherAway
from edge_agent.journal import Batch
from edge_agent.teacher import Answered, Refused, RemoteTeacher, is_loopback
from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.teacher_inference_pb2_grpc import (
    TeacherInferenceServicer,
    add_TeacherInferenceServicer_to_server,
)
from tests.teacher_service.certificates import Authority

WINDOW = 3


class NoGrpc(socketserver.BaseRequestHandler):
    """What a port says that is another program's."""

    def handle(self):
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


class Script(TeacherInferenceServicer):
    """Each stream is handled by the next of ``streams``: a generator of (requests, script) -> responses."""

    def __init__(self):
        self.streams = deque()
        self.received: list[str] = []
        self.metadata: list[dict[str, str]] = []
        self.window = WINDOW
        self.description: dict[str, int] = {}

    def Describe(self, request, context):
        self.metadata.append(dict(context.invocation_metadata()))
        return wire.DescribeResponse(
            model_digest="m",
            labels=["a", "b"],
            channels=1,
            height=8,
            width=8,
            encodings=codec.ENCODINGS,
            max_batch_pictures=64,
            **self.description,
        )

    def Infer(self, requests, context):
        handler = self.streams.popleft() if len(self.streams) > 1 else self.streams[0]
        first = next(requests)
        assert first.WhichOneof("payload") == "config"
        yield wire.InferResponse(accepted=wire.StreamAccepted(model_digest="m", window_batches=self.window))
        yield from handler(self._noted(requests), context)

    def _noted(self, requests):
        for request in requests:
            self.received.append(request.batch.batch_id)
            yield request.batch


@pytest.fixture
def script():
    return Script()


@pytest.fixture
def server(script):
    running = grpc.server(ThreadPoolExecutor(8))
    add_TeacherInferenceServicer_to_server(script, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}"
    running.stop(0).wait()


@pytest.fixture
def teacher(server):
    opened = RemoteTeacher(server, api_key="k", wait_seconds=30, check_egress=lambda batch: None)
    yield opened
    opened.close()


class ListOutbox:
    def __init__(self, count: int):
        images_NCHW = np.zeros((2, 1, 8, 8), np.uint8)
        self.batches = deque(
            Batch(
                slot=i,
                batch_id=f"b{i}",
                picture_count=2,
                request=wire.Batch(batch_id=f"b{i}", images=codec.encode_images(images_NCHW)).SerializeToString(),
                latents=b"",
            )
            for i in range(count)
        )
        self.repeats: list[str] = []
        self.taken = 0

    def next_batch(self):
        if not self.batches:
            return None
        self.taken += 1
        return self.batches.popleft()

    def repeated(self, batch):
        self.repeats.append(batch.batch_id)


def result(batch_id: str) -> wire.InferResponse:
    return wire.InferResponse(result=wire.BatchResult(batch_id=batch_id))


def refusal(batch_id: str, reason: Reason, **variables) -> wire.InferResponse:
    status = Refusal.of(reason, **variables).to_status()
    return wire.InferResponse(refusal=wire.BatchRefusal(batch_id=batch_id, status=status))


def answer_all(batches, context):
    for batch in batches:
        yield result(batch.batch_id)


def settled(teacher, outbox):
    return [
        (type(item).__name__, item.batch.batch_id)
        for item in teacher.answers(run_id="r", model_digest="m", outbox=outbox)
    ]


def test_every_batch_is_answered_once(teacher, script):
    script.streams.append(answer_all)
    outbox = ListOutbox(10)
    assert sorted(settled(teacher, outbox)) == sorted(("Answered", f"b{i}") for i in range(10))
    assert outbox.repeats == [] and len(script.received) == 10


def test_no_more_batches_are_outstanding_than_the_window(teacher, script):
    outbox = ListOutbox(10)
    most = 0

    def slowly(batches, context):
        nonlocal most
        answered = 0
        for batch in batches:
            most = max(most, outbox.taken - answered)
            answered += 1
            yield result(batch.batch_id)

    script.streams.append(slowly)
    settled(teacher, outbox)
    assert 1 < most <= WINDOW + 1  # one answer may be on its way


def test_answers_out_of_order_find_their_batches(teacher, script):
    def backwards(batches, context):
        waiting = [next(batches) for _ in range(WINDOW)]
        for batch in reversed(waiting):
            yield result(batch.batch_id)

    script.streams.append(backwards)
    found = settled(teacher, ListOutbox(WINDOW))
    assert found == [("Answered", f"b{i}") for i in reversed(range(WINDOW))]


def test_broken_stream_is_opened_again_and_only_the_unanswered_are_repeated(teacher, script):
    def breaks(batches, context):
        first = next(batches)
        next(batches)
        yield result(first.batch_id)
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    script.streams += [breaks, answer_all]
    outbox = ListOutbox(4)
    assert sorted(settled(teacher, outbox)) == sorted(("Answered", f"b{i}") for i in range(4))
    assert "b0" not in outbox.repeats and "b1" in outbox.repeats
    assert script.received.count("b0") == 1 and script.received.count("b1") == 2


def test_server_that_ends_the_stream_early_is_asked_again(teacher, script):
    def ends(batches, context):
        next(batches)
        yield wire.InferResponse(draining=wire.StreamDraining())

    script.streams += [ends, answer_all]
    assert len(settled(teacher, ListOutbox(5))) == 5


def test_refusal_with_retry_advice_is_sent_again_under_the_same_id(teacher, script):
    def overloaded_once(batches, context):
        for number, batch in enumerate(batches):
            yield refusal(batch.batch_id, Reason.OVERLOADED, limit=1) if number == 0 else result(batch.batch_id)

    script.streams.append(overloaded_once)
    outbox = ListOutbox(3)
    assert sorted(settled(teacher, outbox)) == sorted(("Answered", f"b{i}") for i in range(3))
    assert outbox.repeats == ["b0"] and script.received.count("b0") == 2


def test_final_refusal_is_handed_over_and_the_stream_goes_on(teacher, script):
    def exhausted(batches, context):
        for batch in batches:
            if batch.batch_id == "b1":
                yield refusal(batch.batch_id, Reason.BUDGET_EXHAUSTED, available=0, requested=2, held=0)
            else:
                yield result(batch.batch_id)

    script.streams.append(exhausted)
    found = list(teacher.answers("r", "m", ListOutbox(3)))
    refused = [item for item in found if isinstance(item, Refused)]
    assert [item.batch.batch_id for item in refused] == ["b1"]
    assert refused[0].refusal.variables["available"] == "0"
    assert sum(isinstance(item, Answered) for item in found) == 2


def test_failing_model_is_asked_three_times_then_given_up(teacher, script):
    def fails(batches, context):
        for batch in batches:
            yield refusal(batch.batch_id, Reason.ENGINE_FAILED, incident="x")

    script.streams.append(fails)
    assert settled(teacher, ListOutbox(1)) == [("Refused", "b0")]
    assert script.received == ["b0"] * 3


def test_server_that_only_ever_refuses_runs_out_of_patience(server, script):
    def overloaded(batches, context):
        for batch in batches:
            yield refusal(batch.batch_id, Reason.OVERLOADED, limit=1)

    script.streams.append(overloaded)
    teacher = RemoteTeacher(server, api_key="k", wait_seconds=1, check_egress=lambda batch: None)
    with pytest.raises(TeacherAway, match="OVERLOADED"):
        list(teacher.answers("r", "m", ListOutbox(1)))
    teacher.close()


class SlowOutbox(ListOutbox):
    def next_batch(self):
        if self.batches:
            time.sleep(0.6)
        return super().next_batch()


def test_drawing_pictures_takes_no_patience_and_each_is_sent_as_it_is_drawn(server, script):
    refused, when = [], []

    def overloaded_once(batches, context):
        for batch in batches:
            when.append(time.monotonic())
            if not refused:
                refused.append(batch.batch_id)
                yield refusal(batch.batch_id, Reason.OVERLOADED, limit=1)
            else:
                yield result(batch.batch_id)

    script.streams.append(overloaded_once)
    teacher = RemoteTeacher(server, api_key="k", wait_seconds=1, check_egress=lambda batch: None)
    assert len(settled(teacher, SlowOutbox(3))) == 3
    assert refused == ["b0"] and when[1] - when[0] > 0.2
    teacher.close()


def test_answer_nobody_asked_for_is_ignored(teacher, script):
    def strange(batches, context):
        yield result("stranger")
        yield from answer_all(batches, context)

    script.streams.append(strange)
    assert settled(teacher, ListOutbox(1)) == [("Answered", "b0")]


def test_another_model_is_refused_before_anything_is_sent(teacher, script):
    script.streams.append(answer_all)
    with pytest.raises(BadInput, match=r"began with the model other.*serves m") as error:
        list(teacher.answers("r", "other", ListOutbox(2)))
    assert "\n" not in str(error.value)
    assert script.received == []


def test_nothing_leaves_when_the_door_refuses(server, script):
    class Stop(Exception):
        pass

    seen = queue.Queue()

    def check(batch: wire.Batch) -> None:
        seen.put(batch.batch_id)
        raise Stop

    script.streams.append(answer_all)
    teacher = RemoteTeacher(server, api_key="k", check_egress=check)
    with pytest.raises(Stop):
        list(teacher.answers("r", "m", ListOutbox(2)))
    teacher.close()
    assert seen.get_nowait() == "b0"
    assert script.received == []


def test_key_travels_as_a_bearer_token(teacher, script):
    assert teacher.describe().labels == ("a", "b")
    assert script.metadata[0]["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, BadCredential),
        (grpc.StatusCode.PERMISSION_DENIED, BadCredential),
        (grpc.StatusCode.UNIMPLEMENTED, BadInput),
        (grpc.StatusCode.INVALID_ARGUMENT, BadInput),
    ],
)
def test_final_status_of_a_stream_is_its_own_failure(teacher, script, code, failure):
    def aborts(batches, context):
        context.abort(code, "because")
        yield

    script.streams.append(aborts)
    with pytest.raises(failure, match="because") as error:
        list(teacher.answers("r", "m", ListOutbox(1)))
    assert "\n" not in str(error.value)


def test_teacher_that_is_away_is_waited_for_so_long_and_no_longer():
    teacher = RemoteTeacher("127.0.0.1:1", api_key="k", wait_seconds=0.5, check_egress=lambda batch: None)
    with pytest.raises(TeacherAway, match=r"127\.0\.0\.1:1 is away.*--wait-seconds"):
        teacher.describe()
    teacher.close()


@pytest.mark.parametrize("address", ["teacher.example:50051", "10.0.0.1:50051"])
def test_key_does_not_travel_unencrypted_beyond_loopback(address):
    with pytest.raises(BadInput, match="--tls-ca, or --insecure"):
        RemoteTeacher(address, api_key="k", check_egress=lambda batch: None)


@pytest.mark.parametrize("address", ["nowhere", ":50051", "host:port", "http://host:50051"])
def test_address_that_is_none_is_one_line(address):
    with pytest.raises(BadInput, match="expected HOST:PORT"):
        RemoteTeacher(address, api_key="k", check_egress=lambda batch: None)


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:1", True), ("[::1]:1", True), ("localhost:1", True), ("10.0.0.1:1", False), ("a.b:1", False)],
)
def test_loopback_is_told_from_the_rest(address, expected):
    assert is_loopback(address) is expected


@pytest.mark.parametrize(("most_bytes", "pictures"), [(0, 64), (2**20, 64), (4096 + 640, 10), (100, 1)])
def test_batches_are_no_larger_than_the_message_the_teacher_takes(teacher, script, most_bytes, pictures):
    script.description = {"max_message_bytes": most_bytes}
    assert teacher.describe().max_batch_pictures == pictures


def test_window_larger_than_the_agents_memory_is_not_filled(teacher, script):
    script.streams.append(answer_all)
    script.window = 10**6
    assert len(settled(teacher, ListOutbox(5000))) == 5000


def test_balance_for_a_summary_does_not_wait_for_a_teacher_that_is_away():
    teacher = RemoteTeacher("127.0.0.1:1", api_key="k", wait_seconds=600, check_egress=lambda batch: None)
    started = time.monotonic()
    with pytest.raises(TeacherAway):
        teacher.balance("r", within_seconds=0.5)
    assert time.monotonic() - started < 10
    teacher.close()


def test_address_that_was_never_reached_says_so_and_an_hopeless_one_is_not_waited_for(tmp_path):
    authority = Authority(tmp_path)
    cert, key = authority.issue("DNS:elsewhere.example")
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    address = f"localhost:{server.add_secure_port('localhost:0', credentials)}"
    server.start()
    web = socketserver.TCPServer(("127.0.0.1", 0), NoGrpc)
    threading.Thread(target=web.serve_forever).start()
    try:
        for wrong, options, expected in (
            (address, {"tls_ca": authority.pem}, "its certificate is for another name"),
            (
                address,
                {"tls_ca": Authority(tmp_path / "other").pem},
                "its certificate is of no authority in --tls-ca",
            ),
            (f"127.0.0.1:{web.server_address[1]}", {}, "that port speaks no gRPC"),
        ):
            teacher = RemoteTeacher(wrong, api_key="k", check_egress=lambda batch: None, **options)
            with pytest.raises(BadInput, match=f"--teacher {wrong}: {expected}"):
                teacher.describe()
            teacher.close()
    finally:
        web.shutdown()
        web.server_close()
        server.stop(None).wait()
    teacher = RemoteTeacher("127.0.0.1:1", api_key="k", wait_seconds=0.3, check_egress=lambda batch: None)
    with pytest.raises(TeacherAway, match="was never reached: is that its address, and does it want TLS"):
        teacher.describe()
    teacher.close()


def test_certificate_and_a_key_that_is_not_its_own_are_refused_before_anything_is_called(tmp_path):
    authority = Authority(tmp_path)
    (cert, _), (_, key) = authority.issue(""), authority.issue("")
    with pytest.raises(BadInput, match=r"--tls-cert .*, --tls-key .*: expected a certificate and its key"):
        RemoteTeacher("127.0.0.1:1", api_key=None, tls_ca=authority.pem, tls_pair=(cert, key), check_egress=print)
