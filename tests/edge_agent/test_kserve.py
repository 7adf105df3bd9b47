"""KServeTeacher against a real gRPC server of the KServe V2 protocol; what it sends, counts, reads and refuses."""

import itertools
import threading
import time

import grpc
import numpy as np
import pytest
import torch
from google.rpc.status_pb2 import Status

from edge_agent import kserve
from edge_agent import teacher as teachers
from edge_agent.config import KServeConfig
from edge_agent.egress import CopyGate, EgressDoor, PrivatePictureStopped
from edge_agent.failures import BadCredential, BadInput, BudgetSpent, TeacherAway
from edge_agent.journal import Journal
from edge_agent.kserve import Address, KServeTeacher
from edge_agent.outbox import PoolOutbox
from edge_agent.pool import fill_pool, load_pool
from edge_agent.sources import synthetic
from networks.gan import Generator
from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import policy
from teacher_service.terms import Terms
from tests.edge_agent.kserve_parts import CLASSES, Model, one_line, probabilities_of, serving
from tests.teacher_service.certificates import Authority

LOGITS = KServeConfig(output_kind="logits")
NOTHING_LOCAL = EgressDoor(np.zeros((0, 1, 8, 8), np.uint8))
NOTHING_NEAR = CopyGate(torch.zeros((0, 1, 8, 8), dtype=torch.uint8), 0.0)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(teachers, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(kserve, "LONGEST_PAUSE_SECONDS", 0.1)


@pytest.fixture
def journal(tmp_path):
    opened = Journal.open(tmp_path / "journal.db")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    made = Generator(class_count=CLASSES, noise_count=5, side=8, channels=1, width=4)
    return made.eval().requires_grad_(False)


def open_teacher(address: str, given: KServeConfig = LOGITS, *, door: EgressDoor = NOTHING_LOCAL, **options):
    return KServeTeacher(address, given, **{"wait_seconds": 30, "check_egress": door.check, **options})


def ask(
    address, journal, generator, given=LOGITS, *, budget=100, batch_pictures=16, outbox_door=NOTHING_LOCAL, **more
):
    """As the agent does; returns the outbox."""
    teacher = open_teacher(address, given, **more)
    try:
        description = teacher.describe()
        outbox = PoolOutbox(
            journal,
            synthetic(generator, NOTHING_NEAR, seed=0),
            outbox_door,
            description,
            budget=budget,
            batch_pictures=batch_pictures,
            counts_sent=True,
            message_bytes=teacher.message_bytes,
        )
        fill_pool(teacher, journal, outbox, description, progress=lambda answered: None)
    finally:
        teacher.close()
    return description


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kserve://h:1/m", Address("h:1", "m", "", False)),
        ("kserve://[::1]:8001/resnet/3", Address("[::1]:8001", "resnet", "3", False)),
        ("kserves://h.example:443/m", Address("h.example:443", "m", "", True)),
    ],
)
def test_address_is_read_and_written_back(text, expected):
    assert Address.parse(text) == expected and str(expected) == text


@pytest.mark.parametrize(
    "text", ["kserve://h:1", "kserve:///m", "http://h:1/m", "kserve://h:1/m/1/2", "kserve://h:1/"]
)
def test_address_that_is_none_says_what_one_looks_like(text):
    with pytest.raises(BadInput, match="kserve://HOST:PORT/MODEL") as error:
        Address.parse(text)
    one_line(error)


@pytest.mark.parametrize("text", ["kserve://nowhere/m", "kserve://h:port/m"])
def test_host_without_a_port_is_one_line(text):
    with pytest.raises(BadInput, match="expected HOST:PORT"):
        open_teacher(text)


def test_key_does_not_travel_unencrypted_beyond_loopback():
    with pytest.raises(BadInput, match="give kserves://, or --insecure"):
        open_teacher("kserve://10.0.0.1:8001/m", api_key="k")
    open_teacher("kserve://10.0.0.1:8001/m", api_key="k", insecure=True).close()
    open_teacher("kserves://10.0.0.1:8001/m", api_key="k").close()
    open_teacher("kserve://10.0.0.1:8001/m").close()


def test_authority_without_encryption_is_a_mistake(tmp_path):
    with pytest.raises(BadInput, match="--tls-ca: expected kserves://"):
        open_teacher("kserve://10.0.0.1:8001/m", tls_ca=tmp_path / "ca.pem")
    with pytest.raises(BadInput, match="--tls-cert: expected kserves://"):
        open_teacher("kserve://10.0.0.1:8001/m", tls_pair=(tmp_path / "own.pem", tmp_path / "own.key"))


# --- pictures there, answers back ---

REAL = {"scale": 1.0, "mean": (0.5,), "std": (0.25,)}


@pytest.mark.parametrize("kind", ["logits", "probabilities", "labels"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("datatype", ["UINT8", "FP16", "FP32", "FP64"])
def test_pictures_arrive_as_they_are_and_answers_are_what_the_model_said(journal, generator, datatype, layout, kind):
    answer_type = "INT64" if kind == "labels" else "FP32"
    model = Model(datatype=datatype, layout=layout, kind=kind, answer_type=answer_type)
    given = {} if datatype == "UINT8" else REAL
    if given:
        model.scale, model.mean, model.std = 1.0, 0.5, 0.25
    with serving(model) as address:
        description = ask(
            address, journal, generator, KServeConfig(output_kind=kind, classes=CLASSES, **given), budget=40
        )
    assert description.labels == ("0", "1", "2", "3")
    pool = load_pool(journal, generator, description, label_smoothing=0.1)
    sent_NCHW = pool.images_NCHW.numpy()
    arrived = {image.tobytes() for images_NCHW in model.received for image in images_NCHW}
    assert arrived == {image.tobytes() for image in sent_NCHW} and len(sent_NCHW) == 40
    if kind == "labels":
        assert pool.class_indices_N.tolist() == probabilities_of(sent_NCHW).argmax(axis=1).tolist()
    else:
        assert np.allclose(pool.probabilities_NK.numpy(), probabilities_of(sent_NCHW), atol=1e-6)


@pytest.mark.parametrize("kind", ["logits", "labels"])
def test_typed_contents_are_read_as_well_as_raw_ones(journal, generator, kind):
    model = Model(kind=kind, answer_type="INT64" if kind == "labels" else "FP32", raw=False, max_batch=None)
    with serving(model) as address:
        description = ask(address, journal, generator, KServeConfig(output_kind=kind, classes=CLASSES), budget=20)
    pool = load_pool(journal, generator, description, label_smoothing=0.1)
    answers_N = probabilities_of(pool.images_NCHW.numpy()).argmax(axis=1)
    assert pool.answers_as_probabilities(CLASSES).argmax(1).tolist() == answers_N.tolist()


def test_half_precision_answers_are_read(journal, generator):
    with serving(Model(kind="probabilities", answer_type="FP16")) as address:
        description = ask(address, journal, generator, KServeConfig(output_kind="probabilities"), budget=20)
    pool = load_pool(journal, generator, description, label_smoothing=0.1)
    assert np.allclose(pool.probabilities_NK.numpy(), probabilities_of(pool.images_NCHW.numpy()), atol=1e-3)


def test_model_without_a_batch_dimension_is_asked_picture_by_picture(journal, generator):
    told = []
    model = Model(batch=None, max_batch=0)
    with serving(model) as address:
        description = ask(address, journal, generator, budget=5, tell=told.append)
    assert description.max_batch_pictures == 1 and model.calls == 5
    assert any("one picture a call" in line for line in told)
    pool = load_pool(journal, generator, description, label_smoothing=0.1)
    assert np.allclose(pool.probabilities_NK.numpy(), probabilities_of(pool.images_NCHW.numpy()), atol=1e-6)


def test_batches_fit_the_model_and_the_message(journal, generator, monkeypatch):
    model = Model(max_batch=8, datatype="FP32", scale=1.0)
    given = KServeConfig(output_kind="logits", scale=1.0, mean=(0.0,), std=(1.0,))
    with serving(model) as address:
        assert ask(address, journal, generator, given, budget=20).max_batch_pictures == 8
        assert max(len(images_NCHW) for images_NCHW in model.received) == 8
        monkeypatch.setattr(kserve, "MAX_MESSAGE_BYTES", kserve.MESSAGE_MARGIN_BYTES + 3 * 64 * 4)
        teacher = open_teacher(address, given)
        assert teacher.describe().max_batch_pictures == 3
        teacher.close()


@pytest.mark.parametrize("count", [1, 15, 16, 64])
def test_bytes_are_those_of_the_very_message(journal, generator, count):
    model = Model(datatype="FP32")
    with serving(model) as address:
        ask(
            address,
            journal,
            generator,
            KServeConfig(output_kind="logits", scale=255.0, mean=(0.0,), std=(1.0,)),
            budget=count,
            batch_pictures=64,
        )
    assert journal.totals().sent_bytes == sum(request.ByteSize() for request in model.requests)
    assert journal.totals().received_bytes > 0


def test_several_calls_are_under_way_but_no_more_than_the_window(journal, generator):
    running = most = 0
    lock, together = threading.Lock(), threading.Event()

    def slowly(number, context):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running > 1:
                together.set()
        if number > 1:  # the first is asked alone
            together.wait(10)
        time.sleep(0.02)
        with lock:
            running -= 1

    with serving(Model(before=slowly)) as address:
        ask(address, journal, generator, budget=160)
    assert 1 < most <= kserve.WINDOW


def test_key_travels_as_a_bearer_token_where_there_is_one(journal, generator):
    model = Model()
    with serving(model) as address:
        ask(address, journal, generator, budget=4, api_key="secret")
        assert all(seen["authorization"] == "Bearer secret" for seen in model.metadata)
        model.metadata.clear()
        ask(address, journal, generator, budget=8)
        assert model.metadata and not any("authorization" in seen for seen in model.metadata)


def test_encrypted_connection_trusts_the_authority_and_shows_its_own_certificate(tmp_path, journal, generator):
    authority, stranger = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    cert, key = authority.issue("IP:127.0.0.1")
    own = authority.issue("DNS:device")
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), cert.read_bytes())], authority.pem.read_bytes(), require_client_auth=True
    )
    with serving(Model(), credentials=credentials) as address:
        ask(address, journal, generator, budget=4, tls_ca=authority.pem, tls_pair=own, api_key="k")
        assert journal.totals().charged_pictures == 4
        for trusted, shown, failure in ((stranger.pem, own, BadInput), (authority.pem, None, TeacherAway)):
            with pytest.raises(failure):
                ask(address, journal, generator, budget=8, tls_ca=trusted, tls_pair=shown, wait_seconds=0.2)
    assert journal.totals().sent_pictures == 4


# --- counting ---


def test_without_faults_the_budget_is_sent_to_the_picture(journal, generator):
    model = Model()
    with serving(model) as address:
        ask(address, journal, generator, budget=100)
    totals = journal.totals()
    assert model.received_pictures == totals.sent_pictures == totals.charged_pictures == 100


def test_every_resend_counts_against_the_budget_which_is_never_exceeded(journal, generator):
    def now_and_then(number, context):
        if number % 3 == 0:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")

    model = Model(before=now_and_then)
    with serving(model) as address:
        try:
            ask(address, journal, generator, budget=200)
        except BudgetSpent as spent:
            assert "sent and not answered" in str(spent)
    totals = journal.totals()
    assert model.received_pictures == totals.sent_pictures <= 200
    assert totals.charged_pictures < 200
    assert model.calls > 200 / 16


def test_count_is_durable_before_the_picture_arrives(tmp_path, journal, generator):
    path = tmp_path / "journal.db"
    behind = []
    model = Model()

    def look(number, context):
        seen = Journal.open(path)
        if seen.totals().sent_pictures < model.received_pictures:
            behind.append(number)
        seen.close()

    model.before = look
    with serving(model) as address:
        ask(address, journal, generator, budget=100)
    assert behind == [] and model.calls == 7


def test_last_batch_that_fails_stops_cleanly_and_the_next_run_sends_nothing(journal, generator):
    def last_fails(number, context):
        if number >= 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    model = Model(before=last_fails)
    with serving(model) as address:
        with pytest.raises(BudgetSpent, match=r"16 pictures were sent and not answered.*32 answers.*raise --budget"):
            ask(address, journal, generator, budget=48)
        assert model.received_pictures == journal.totals().sent_pictures == 48
        model.before = lambda number, context: None
        # A raised budget asks for the lost ones first.
        ask(address, journal, generator, budget=80)
    totals = journal.totals()
    assert (totals.sent_pictures, totals.charged_pictures) == (80, 64) == (model.received_pictures, 64)
    assert not journal.unanswered("distill")


def test_what_the_budget_has_room_for_is_sent_again_as_a_smaller_batch(journal, generator, monkeypatch):
    monkeypatch.setattr(kserve, "WINDOW", 1)

    def second_fails(number, context):
        if number == 2:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    model = Model(before=second_fails)
    with serving(model) as address:
        ask(address, journal, generator, budget=38, batch_pictures=16)
    totals = journal.totals()
    assert totals.sent_pictures == model.received_pictures == 38
    assert totals.charged_pictures == 22
    assert not journal.unanswered("distill")


def test_resumed_run_counts_what_it_sends_again(journal, generator):
    model = Model()
    with serving(model) as address:
        teacher = open_teacher(address)
        description = teacher.describe()
        box = PoolOutbox(
            journal,
            synthetic(generator, NOTHING_NEAR, seed=0),
            NOTHING_LOCAL,
            description,
            budget=100,
            batch_pictures=16,
            counts_sent=True,
        )
        first = box.next_batch()  # counted, and the process dies before or after it was sent
        teacher.close()
        ask(address, journal, generator, budget=100)
    assert first.batch_id in {request.id for request in model.requests}
    totals = journal.totals()
    assert (totals.sent_pictures, totals.charged_pictures, model.received_pictures) == (100, 84, 84)


def test_smaller_batches_may_be_asked_for_after_all(journal, generator):
    def too_large(number, context):
        if len(model.received[number - 1]) > 8:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (99 vs. 50)")

    model = Model(before=too_large)
    with serving(model) as address:
        with pytest.raises(BadInput, match=r"larger than max.*--set batch_pictures=N.*had 16 pictures"):
            ask(address, journal, generator, budget=200)
        ask(address, journal, generator, budget=200, batch_pictures=8)
    totals = journal.totals()
    assert totals.sent_pictures >= model.received_pictures and totals.sent_pictures == 200
    assert not journal.unanswered("distill")


# --- servers that are away, slow, or fail ---


def test_server_that_is_killed_and_comes_back_is_asked_again_and_nothing_is_sent_meanwhile(journal, generator):
    model = Model()
    dying, dead = threading.Event(), threading.Event()

    def die(number, context):
        if number >= 3 and not dead.is_set():  # all that follows: what is answered meanwhile is budget for others
            dying.set()
            dead.wait(30)

    model.before = die
    told = []
    with serving(model) as address:
        thread_error = []

        def run():
            own = Journal.open(journal._path)
            try:
                ask(address, own, generator, budget=160, wait_seconds=30, tell=told.append)
            except BaseException as error:
                thread_error.append(error)
            finally:
                own.close()

        agent = threading.Thread(target=run)
        agent.start()
        assert dying.wait(30)
    dead.set()  # the server is gone: none of them is answered
    deadline = time.monotonic() + 30
    while not any("is away" in line for line in told):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while_away = journal.totals().sent_pictures
    time.sleep(0.5)
    assert journal.totals().sent_pictures == while_away, "an absent teacher costs nothing"
    with serving(model, address.removeprefix("kserve://").removesuffix("/m")):
        agent.join(30)
        assert not agent.is_alive() and thread_error == []
    totals = journal.totals()
    assert totals.sent_pictures == 160 and model.received_pictures <= 160
    assert 160 - 3 * 16 <= totals.charged_pictures < 160, "two answers open a window of three"


def test_slow_server_runs_into_the_deadline_and_is_asked_again(journal, generator, monkeypatch):
    monkeypatch.setattr(kserve, "CALL_SECONDS", 2.0)
    monkeypatch.setattr(kserve, "WINDOW", 1)

    def slow_once(number, context):
        if number == 1:
            monkeypatch.setattr(kserve, "CALL_SECONDS", 60.0)  # that call alone has so little time
            give_up = time.monotonic() + 30
            while context.is_active() and time.monotonic() < give_up:
                time.sleep(0.02)

    model = Model(before=slow_once)
    with serving(model) as address:
        ask(address, journal, generator, budget=128, wait_seconds=60)
    totals = journal.totals()
    assert (totals.sent_pictures, totals.charged_pictures) == (128, 112)


def test_model_that_fails_is_asked_three_times_and_its_words_are_told_in_one_line(journal, generator):
    def fails(number, context):
        context.abort(grpc.StatusCode.INTERNAL, "CUDA error:\nout of memory")

    model = Model(before=fails)
    with (
        serving(model) as address,
        pytest.raises(BadInput, match=r"failed 3 times.*CUDA error: out of memory") as error,
    ):
        ask(address, journal, generator, budget=10_000)
    one_line(error)
    assert journal.totals().sent_pictures == model.received_pictures == 3 * 16


def test_server_that_only_ever_refuses_runs_out_of_patience_and_costs_little(journal, generator):
    def overloaded(number, context):
        context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")

    model = Model(before=overloaded)
    with serving(model) as address, pytest.raises(TeacherAway, match="Exceeds maximum queue size"):
        ask(address, journal, generator, budget=100_000, wait_seconds=0.5)
    assert model.received_pictures <= 16 * 12  # a batch an attempt, and pauses grow


def test_server_that_was_never_there_is_waited_for_and_nothing_is_planned(journal, generator):
    with pytest.raises(TeacherAway, match=r"kserve://127\.0\.0\.1:1/m is away"):
        ask("kserve://127.0.0.1:1/m", journal, generator, wait_seconds=0.3)
    assert journal.totals().planned_pictures == 0


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, BadCredential),
        (grpc.StatusCode.PERMISSION_DENIED, BadCredential),
        (grpc.StatusCode.INVALID_ARGUMENT, BadInput),
        (grpc.StatusCode.NOT_FOUND, BadInput),
    ],
)
def test_final_status_is_its_own_failure_and_is_not_tried_again(journal, generator, code, failure):
    model = Model(before=lambda number, context: context.abort(code, "because"))
    with serving(model) as address, pytest.raises(failure, match="because") as error:
        ask(address, journal, generator, budget=16)
    one_line(error)
    assert model.calls == 1


def test_unknown_model_is_named(journal, generator):
    with serving(Model()) as address, pytest.raises(BadInput, match="NOT_FOUND: Request for unknown model: 'nope'"):
        ask(address.replace("/m", "/nope"), journal, generator)


def test_server_of_another_protocol_is_one_line(journal, generator):
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(BadInput, match="expected a teacher of this protocol"):
        ask(f"kserve://127.0.0.1:{port}/m", journal, generator)
    server.stop(0).wait()


def refuse(context, refusal: Refusal) -> None:
    status: Status = refusal.to_status()
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    (code,) = [code for code in grpc.StatusCode if code.value[0] == status.code]
    context.abort(code, status.message)


def test_advice_to_wait_is_followed(journal, generator):
    times = []

    def overloaded_once(number, context):
        times.append(time.monotonic())
        if number == 1:
            refuse(context, Refusal.of(Reason.OVERLOADED, limit=1))

    with serving(Model(before=overloaded_once)) as address:
        ask(address, journal, generator, budget=80)
    assert times[-1] - times[0] >= 0.2
    totals = journal.totals()
    assert (totals.sent_pictures, totals.charged_pictures) == (80, 64)


def test_budget_of_an_account_behind_the_protocol_ends_the_run(journal, generator):
    def empty(number, context):
        refuse(context, Refusal.of(Reason.BUDGET_EXHAUSTED, requested=16, available=0, held=0))

    with serving(Model(before=empty)) as address, pytest.raises(BudgetSpent, match="0 pictures available"):
        ask(address, journal, generator, budget=160)


def test_answer_that_is_kept_no_longer_behind_the_protocol_is_counted_and_the_run_goes_on(journal, generator):
    def expired(number, context):
        if number == 1:
            refuse(context, Refusal.of(Reason.ANSWER_EXPIRED, batch_id="b"))

    with serving(Model(before=expired)) as address:
        ask(address, journal, generator, budget=48)
    totals = journal.totals()
    assert (totals.sent_pictures, totals.charged_pictures) == (48, 48)
    assert sorted(journal.bought().items()) == [("gone", 16), ("soft", 32)]


def test_a_batch_size_that_was_lowered_since_the_run_began_is_kept_to(journal, generator):
    with serving(model := Model()) as address:
        teacher = open_teacher(address)
        description = teacher.describe()
        model.max_batch = 7

        def box():
            return PoolOutbox(
                journal,
                synthetic(generator, NOTHING_NEAR, seed=0),
                NOTHING_LOCAL,
                description,
                budget=48,
                batch_pictures=16,
                counts_sent=True,
            )

        box().next_batch()  # of 16, by a process that was killed
        fill_pool(teacher, journal, box(), description, progress=lambda answered: None)
        teacher.close()
    assert max(map(len, model.received)) == 7 and model.received_pictures == 32
    assert journal.totals().sent_pictures == 48


# --- the door ---


def test_local_picture_does_not_leave_this_way_either(journal, generator):
    box_door = NOTHING_LOCAL  # the first check is out of the way: the one before the network is tested
    with serving(model := Model()) as address:
        sample = PoolOutbox(
            Journal.open(journal._path.with_name("sample.db")),
            synthetic(generator, NOTHING_NEAR, seed=0),
            box_door,
            open_and_describe(address),
            budget=16,
            batch_pictures=16,
        ).next_batch()
        images_NCHW = codec.decode_images(wire.Batch.FromString(sample.request).images)
        with pytest.raises(PrivatePictureStopped):
            ask(address, journal, generator, budget=16, door=EgressDoor(images_NCHW[5:6]))
        assert model.received_pictures == 0
        # The check can fail: without the door the same picture leaves.
        ask(address, journal, generator, budget=32)
        arrived = {image.tobytes() for received_NCHW in model.received for image in received_NCHW}
        assert images_NCHW[5].tobytes() in arrived


def test_local_picture_is_not_even_planned(journal, generator):
    with serving(model := Model()) as address:
        description = open_and_describe(address)
        sample = PoolOutbox(
            Journal.open(journal._path.with_name("sample.db")),
            synthetic(generator, NOTHING_NEAR, seed=0),
            NOTHING_LOCAL,
            description,
            budget=16,
            batch_pictures=16,
        ).next_batch()
        door = EgressDoor(codec.decode_images(wire.Batch.FromString(sample.request).images)[:1])
        with pytest.raises(PrivatePictureStopped):
            ask(address, journal, generator, budget=16, door=door, outbox_door=door)
    assert model.received_pictures == 0 and journal.totals().sent_pictures == 0


def open_and_describe(address):
    teacher = open_teacher(address)
    try:
        return teacher.describe()
    finally:
        teacher.close()


# --- answers that are none ---


def set_rows(*rows):
    def change(response):
        values = np.tile(np.array(rows, np.float32), (response.outputs[0].shape[0], 1))
        response.raw_output_contents[0] = values.tobytes()

    return change


def cut(response):
    response.raw_output_contents[0] = response.raw_output_contents[0][:-4]


def rename(response):
    response.outputs[0].name = "other"


def fewer(response):
    response.outputs[0].shape[0] -= 1
    response.raw_output_contents[0] = response.raw_output_contents[0][: -4 * CLASSES]


def text(response):
    response.outputs[0].datatype = "BYTES"


def nothing(response):
    del response.raw_output_contents[:]


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("logits", set_rows([0.0, np.nan, 0.0, 0.0]), "expected finite numbers"),
        ("logits", set_rows([0.0, np.inf, 0.0, 0.0]), "expected finite numbers"),
        ("probabilities", set_rows([0.5, 0.5, 0.5, 0.5]), "sum to 1 for each picture.*sum of 2;.*output_kind"),
        ("probabilities", set_rows([1.5, -0.5, 0.0, 0.0]), "at least 0"),
        ("logits", cut, "expected the numbers of a tensor"),
        ("logits", rename, "expected an output output, got other"),
        ("logits", fewer, r"expected a tensor \[16, 4\], got \[15, 4\]"),
        ("logits", text, "expected numbers, got BYTES"),
        ("logits", nothing, r"expected the numbers of a tensor \[16, 4\], got 0"),
    ],
)
def test_answer_that_is_none_is_one_line_and_is_not_kept(journal, generator, kind, change, said):
    with (
        serving(Model(kind=kind, change=change)) as address,
        pytest.raises(BadInput, match=f"read as {kind}, is not one: .*{said}") as error,
    ):
        ask(address, journal, generator, KServeConfig(output_kind=kind), budget=16)
    one_line(error)
    totals = journal.totals()
    assert (totals.charged_pictures, totals.sent_pictures) == (0, 16)


def test_good_answers_that_are_under_way_with_a_bad_one_are_kept_before_the_run_ends(journal, generator, monkeypatch):
    all_under_way = threading.Barrier(kserve.WINDOW)
    number_of = threading.local()
    seen, answered = threading.Event(), KServeTeacher._answered

    def noted(*given):
        try:
            return answered(*given)
        except BadInput:
            seen.set()
            raise

    monkeypatch.setattr(KServeTeacher, "_answered", noted)

    def before(number, context):
        number_of.call = number
        if number > 6:  # the window is full: these are under way together, and the agent sees the bad one first
            all_under_way.wait(10)
            assert number == 7 or seen.wait(10)

    def change(response):
        if number_of.call == 7:
            cut(response)

    with serving(Model(before=before, change=change)) as address, pytest.raises(BadInput, match="is not one"):
        ask(address, journal, generator, budget=1600)
    totals = journal.totals()
    assert (totals.sent_pictures, totals.charged_pictures) == (10 * 16, 9 * 16)


# --- what a policy took away, of a server of ours ---


def sold(*policies: Terms):
    """Makes a model sell each of its answers, in turn, as the terms say."""
    upcoming = itertools.cycle(policies)
    lock = threading.Lock()

    def change(response):
        with lock:
            terms = next(upcoming)
        rows_NK = np.frombuffer(response.raw_output_contents[0], "<f4").reshape(-1, CLASSES)
        answer = policy.apply(terms, rows_NK)
        response.raw_output_contents[0] = codec.sold_probabilities(
            answer, picture_count=len(rows_NK), class_count=CLASSES
        ).tobytes()
        if terms.decimals is not None:
            response.parameters["decimals"].int64_param = terms.decimals
        if terms.top_k is not None:
            response.parameters["top_k"].int64_param = terms.top_k

    return change


def test_each_answer_is_kept_with_the_policy_that_it_was_sold_under(journal, generator):
    policies = (Terms(), Terms(decimals=1), Terms(top_k=2), Terms(top_k=3, decimals=2))
    model = Model(kind="probabilities", output="probabilities", platform="mekd", change=sold(*policies))
    with serving(model) as address:
        description = ask(address, journal, generator, KServeConfig(), budget=64)
    assert journal.bought() == {"soft": 16, "soft, 1 decimal": 16, "top-2": 16, "top-3, 2 decimals": 16}
    pool = load_pool(journal, generator, description, label_smoothing=0.1)
    true_NK = probabilities_of(pool.images_NCHW.numpy())
    found_NK = pool.probabilities_NK.numpy()
    assert np.allclose(found_NK.sum(axis=1), 1.0, atol=1e-5)
    for batch in journal.answered("distill"):
        kept = wire.Answer.FromString(batch.answer)
        images_NCHW = codec.decode_images(wire.Batch.FromString(batch.request).images)
        terms = Terms(
            top_k=kept.top_k.named_count if kept.HasField("top_k") else None, decimals=codec.decimals_of(kept)
        )
        expected = policy.apply(terms, probabilities_of(images_NCHW).astype(np.float32))
        decoded = [
            codec.decode_answer(answer, picture_count=len(images_NCHW), class_count=CLASSES)
            for answer in (kept, expected)
        ]
        assert np.allclose(*decoded, atol=1e-6), codec.kind_of(kept)
    assert not np.allclose(found_NK, true_NK, atol=1e-3), "something was taken away"


@pytest.mark.parametrize(
    ("said", "rows", "line"),
    [
        ({"top_k": 2}, [0.5, 0.3, 0.2, 0.0], "expected 2 classes named of 4, got 3 that are not 0"),
        ({"top_k": 5}, [0.5, 0.5, 0.0, 0.0], "expected 5 classes named of 4"),
        ({"top_k": 0}, [0.0, 0.0, 0.0, 0.0], "expected 0 classes named"),
        ({"top_k": 1}, [0.2, 0.0, 0.0, 0.0], "sum to 1"),
        ({"decimals": 9}, [0.5, 0.5, 0.0, 0.0], "1 to 7 decimals, got 9"),
        ({"decimals": 2**40}, [0.5, 0.5, 0.0, 0.0], ""),
        ({"decimals": 2}, [0.9, 0.0, 0.0, 0.0], "sum to 1"),
    ],
)
def test_answer_that_does_not_fit_its_policy_is_one_line_and_is_not_kept(journal, generator, said, rows, line):
    def change(response):
        set_rows(rows)(response)
        for name, value in said.items():
            response.parameters[name].int64_param = value

    model = Model(kind="probabilities", output="probabilities", platform="mekd", change=change)
    with serving(model) as address, pytest.raises(BadInput, match=f"is not one: .*{line}") as error:
        ask(address, journal, generator, KServeConfig(), budget=16)
    one_line(error)
    assert journal.totals().charged_pictures == 0


def test_parameters_of_another_software_mean_nothing_here(journal, generator):
    def change(response):
        response.parameters["decimals"].int64_param = 1

    with serving(Model(change=change)) as address:
        ask(address, journal, generator, budget=16)
    assert journal.bought() == {"soft": 16}


# --- the teacher may change under a run ---


def digest(address, given=LOGITS):
    teacher = open_teacher(address, given)
    try:
        return teacher.describe().model_digest
    finally:
        teacher.close()


def test_weights_that_a_server_names_are_part_of_the_digest_and_answers_by_others_end_the_run(journal, generator):
    model = Model(digest="first")
    with serving(model) as address:
        first = digest(address)
        model.digest = "second"
        assert digest(address) != first
        answers = []

        def other_weights(response):
            answers.append(response)
            response.parameters["model_digest"].string_param = "second" if len(answers) <= 2 else "third"

        model.change = other_weights
        with pytest.raises(
            BadInput, match=r"began with the model second of .* answered by third; give another"
        ) as error:
            ask(address, journal, generator, budget=128)
    one_line(error)
    assert journal.totals().charged_pictures >= 2 * 16, "what was answered by the model of the run is kept"


def test_probabilities_that_are_called_logits_cost_a_batch_and_not_the_budget(journal, generator):
    model = Model(kind="probabilities")
    with serving(model) as address, pytest.raises(BadInput, match=r"they are probabilities: say so, output_kind"):
        ask(address, journal, generator, budget=1000, given=LOGITS)
    assert journal.totals().charged_pictures == 0 and model.received_pictures <= kserve.WINDOW * 16


def test_digest_follows_metadata_and_settings_and_says_that_weights_are_unknown():
    told = []
    with serving(Model()) as address:
        same = digest(address)
        assert digest(address) == same and same.startswith("metadata-")
        assert digest(address, KServeConfig(output_kind="probabilities")) != same
        teacher = open_teacher(address, tell=told.append)
        teacher.describe()
        teacher.close()
    assert any("does not tell its weights" in line for line in told)
    for changes in ({"versions": ["2"]}, {"sizes": (1, 12, 12)}, {"output": "other"}, {"layout": "NHWC"}):
        with serving(Model(**changes)) as address:
            assert digest(address) != same, changes
    with serving(Model(max_batch=7)) as address:
        assert digest(address) == same, "an operator may tune the batch size"


def test_another_model_stops_the_run_before_anything_is_sent(journal, generator):
    model = Model()
    with serving(model) as address:
        teacher = open_teacher(address)
        description = teacher.describe()
        model.versions = ["2"]
        box = PoolOutbox(
            journal,
            synthetic(generator, NOTHING_NEAR, seed=0),
            NOTHING_LOCAL,
            description,
            budget=16,
            batch_pictures=16,
            counts_sent=True,
        )
        with pytest.raises(BadInput, match=r"this run began with the model metadata-.*nothing was sent"):
            fill_pool(teacher, journal, box, description, progress=lambda answered: None)
        teacher.close()
    assert model.calls == 0 and journal.totals().sent_pictures == 0


def test_answer_of_another_version_stops_the_run(journal, generator):
    def newer(response):
        response.model_version = "2"

    with serving(Model(change=newer)) as address, pytest.raises(BadInput, match=r"version 1 of .* by version 2"):
        ask(address, journal, generator, budget=16)


def test_model_that_changed_while_it_was_away_gets_no_more_pictures(journal, generator):
    def swap(number, context):
        if number == 2:
            model.versions = ["2"]
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    model = Model(before=swap)
    with serving(model) as address, pytest.raises(BadInput, match=r"began with"):
        ask(address, journal, generator, budget=160)
    assert model.calls <= kserve.WINDOW + 1


def test_version_of_the_address_is_asked_for(journal, generator):
    model = Model(versions=["1", "3"])
    with serving(model) as address:
        ask(f"{address}/3", journal, generator, budget=4)
        assert {request.model_version for request in model.requests} == {"3"}
        with pytest.raises(BadInput, match="NOT_FOUND"):
            ask(f"{address}/9", journal, generator, budget=8)


def test_teacher_that_keeps_books_gets_its_batches_back_whole(journal, generator):
    """Under its id a batch is charged once at most: a smaller one would be another batch."""
    description = teachers.Description(
        model_digest="m", labels=("0",) * CLASSES, channels=1, height=8, width=8, max_batch_pictures=64
    )

    def box(**changes):
        options = {"budget": 16, "batch_pictures": 16, **changes}
        return PoolOutbox(journal, synthetic(generator, NOTHING_NEAR, seed=0), NOTHING_LOCAL, description, **options)

    batch = box().next_batch()
    assert box(budget=16, batch_pictures=4).next_batch() == batch
    counting = box(budget=40, batch_pictures=4, counts_sent=True)
    smaller = counting.next_batch()
    assert smaller.picture_count == 4 and smaller.batch_id != batch.batch_id
    assert codec.decode_images(wire.Batch.FromString(smaller.request).images).shape[0] == 4
