"""The Open Inference Protocol with its stock client: the same cases on this server and on a real Triton."""

import asyncio
import json
import queue
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as stock
from click.testing import CliRunner
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from benchmarks import services, triton
from protos.errors import Reason
from teacher_service import kserve
from teacher_service.auth import ALLOWED, CACHE_SECONDS, new_key
from teacher_service.cli import serve
from teacher_service.engine import ArrayEngine
from teacher_service.kserve import DEFAULT_RUN_ID, SERVICE
from teacher_service.ledger import OPERATORS, Role
from teacher_service.terms import Terms
from tests.conftest import StartServer, teacher_admin
from tests.teacher_service.lanes import infer_request, kserve_result
from tests.teacher_service.parts import TIMEOUT_SECONDS, Service, pictures, refusal_of, serving

MOST = 16
PIXELS = pictures(2)
TRITON_CONFIG = f"""
max_batch_size: {MOST}
input [ {{ name: "images" data_type: TYPE_UINT8 dims: [ 1, 8, 8 ] }} ]
output [ {{ name: "probabilities" data_type: TYPE_FP32 dims: [ 10 ] }} ]
dynamic_batching {{ }}
"""
TRITON_CODE = """
import numpy as np
import triton_python_backend_utils as pb_utils

from teacher_service.engine import ArrayEngine


class TritonPythonModel:
    def initialize(self, arguments):
        self.engine = ArrayEngine()

    def execute(self, requests):
        return [pb_utils.InferenceResponse([self.answer(request)]) for request in requests]

    def answer(self, request):
        images_NCHW = np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "images"))
        return pb_utils.Tensor.from_dlpack("probabilities", self.engine.answer(images_NCHW))
"""


@dataclass
class Server:
    """A server and the stock client's ways to it. ``headers`` is all that ours needs beside."""

    kind: str
    client: Any
    stub: Any
    headers: dict[str, str]

    @property
    def call(self) -> dict[str, Any]:
        return {"metadata": list(self.headers.items()), "timeout": TIMEOUT_SECONDS}


@pytest.fixture(params=["this server", "Triton"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    if request.param == "Triton":
        address, headers = request.getfixturevalue("triton_address"), {}
    else:
        address, headers = request.getfixturevalue("our_server")
    client = stock.InferenceServerClient(address)
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        yield Server(request.param, client, service_pb2_grpc.GRPCInferenceServiceStub(channel), headers)
    client.close()


@pytest.fixture(scope="module")
def our_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """One server for all cases, as there is one Triton for them, and the headers of its one account."""
    folder = tmp_path_factory.mktemp("ours")
    ledger = f"sqlite:///{folder}/ledger.db"
    key = teacher_admin(ledger, "account", "create", "device", "--budget", "100000").strip()
    flags = ("--max-batch-pictures", str(MOST))
    with services.serving(Path("array:10,1,8,8"), ledger, log=folder / "log", more=flags) as address:
        yield address, {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def triton_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if lacking := triton.missing():
        pytest.skip(lacking)
    folder = tmp_path_factory.mktemp("triton")
    triton.write_model(folder / "models", "teacher", TRITON_CONFIG, TRITON_CODE)
    with triton.serving(folder / "models", log=folder / "log") as address:
        yield address


# --- batches, good and bad ---


@dataclass
class Case:
    """What is sent, and the status code that both servers answer with."""

    given: dict[str, Any]
    code: str
    triton: str = ""
    """Triton's code where it is another; the docs name these differences."""


def tensor(images: np.ndarray, name: str = "images", datatype: str = "UINT8", shape: Any = None) -> Any:
    found = stock.InferInput(name, list(shape or images.shape), datatype)
    found._raw_content = images.tobytes()  # as set_data_from_numpy does, without its checks
    return found


def good(images: np.ndarray = PIXELS, **given: Any) -> Case:
    return Case({"inputs": [tensor(images)]} | given, "OK")


def bad(*inputs: Any, **given: Any) -> Case:
    return Case({"inputs": list(inputs)} | given, "INVALID_ARGUMENT")


def message(
    code: str, *, triton: str = "", raw: list[bytes] | None = None, shape: Any = (2, 1, 8, 8), **contents: Any
) -> Case:
    """A request that the stock client would not make."""
    request = service_pb2.ModelInferRequest(model_name="teacher", raw_input_contents=raw or [])
    found = request.inputs.add(name="images", datatype="UINT8", shape=shape)
    for name, values in contents.items():
        getattr(found.contents, name).extend(values)
    return Case({"message": request}, code, triton)


def output(name: str, **given: Any) -> Any:
    return stock.InferRequestedOutput(name, **given)


VALUES = PIXELS.ravel().tolist()
CASES = {
    "one picture": good(pictures(1)),
    "the most pictures": good(pictures(MOST)),
    "with an id": good(request_id="an id"),
    "output by name": good(outputs=[output("probabilities")]),
    "the same output twice": good(outputs=[output("probabilities")] * 2),
    "version 1": good(model_version="1"),
    "unknown parameters": good(parameters={"any": "thing", "number": 3, "flag": True}),
    "priority and timeout": good(priority=1, timeout=10_000_000),
    "a sequence": good(sequence_id=7, sequence_start=True),
    "typed": message("OK", uint_contents=VALUES),
    "unknown model": Case(good().given | {"model_name": "nope"}, "NOT_FOUND"),
    "unknown version": Case(good().given | {"model_version": "7"}, "NOT_FOUND"),
    "a version that is no number": bad(tensor(PIXELS), model_version="x"),
    "too many pictures": bad(tensor(pictures(MOST + 1))),
    "no pictures": bad(tensor(pictures(0))),
    "signed": bad(tensor(PIXELS, datatype="INT8")),
    "floats": bad(tensor(PIXELS.astype(np.float32), datatype="FP32")),
    "no datatype at all": bad(tensor(PIXELS, datatype="UINT9")),
    "too wide": bad(tensor(np.zeros((2, 1, 8, 9), np.uint8))),
    "without channels": bad(tensor(np.zeros((2, 8, 8), np.uint8))),
    "flat": bad(tensor(np.zeros(128, np.uint8))),
    "negative count": bad(tensor(PIXELS, shape=(-2, 1, 8, 8))),
    "a count that overflows": bad(tensor(PIXELS, shape=(2**62, 1, 8, 8))),
    "negative sides": bad(tensor(PIXELS, shape=(2, 1, -8, -8))),
    "too few bytes": bad(tensor(PIXELS[:1], shape=(2, 1, 8, 8))),
    "too many bytes": bad(tensor(pictures(3), shape=(2, 1, 8, 8))),
    "no input": bad(),
    "another input": bad(tensor(PIXELS, name="image")),
    "an input too many": bad(tensor(PIXELS), tensor(PIXELS, name="more")),
    "the same input twice": bad(tensor(PIXELS), tensor(PIXELS)),
    "another output": bad(tensor(PIXELS), outputs=[output("zzz")]),
    "raw and typed": message("INVALID_ARGUMENT", raw=[PIXELS.tobytes()], uint_contents=VALUES),
    "no contents": message("INVALID_ARGUMENT"),
    "typed as another type": message("INVALID_ARGUMENT", int_contents=VALUES),
    "typed as bytes": message("INVALID_ARGUMENT", bytes_contents=[PIXELS.tobytes()]),
    "typed as two types": message("INVALID_ARGUMENT", uint_contents=VALUES, int_contents=[1]),
    "too few values": message("INVALID_ARGUMENT", uint_contents=[1, 2, 3]),
    "an empty message": Case({"message": service_pb2.ModelInferRequest()}, "NOT_FOUND"),
    # Triton cuts such values down to a byte, and takes no notice of contents that belong to no input.
    "values that are no bytes": message("INVALID_ARGUMENT", triton="OK", uint_contents=[256] * 128),
    "contents of two inputs": message("INVALID_ARGUMENT", triton="OK", raw=[PIXELS.tobytes()] * 2),
    # Triton's extension that turns answers into text.
    "classification": Case(
        good().given | {"outputs": [output("probabilities", class_count=3)]}, "INVALID_ARGUMENT", triton="OK"
    ),
}
# What answers have in common with Triton's, and is looked for by clients.
TEXTS = {"unknown model": "Request for unknown model: 'nope' is not found"}


def expected_code(case: Case, server: Server) -> str:
    return (case.triton or case.code) if server.kind == "Triton" else case.code


def pictures_of(case: Case) -> np.ndarray:
    if "inputs" not in case.given:
        return PIXELS
    found: np.ndarray = np.frombuffer(case.given["inputs"][0]._raw_content, np.uint8).reshape(-1, 1, 8, 8)
    return found


def check_answer(case: Case, result: Any) -> None:
    images = pictures_of(case)
    response = result.get_response()
    (described,) = response.outputs
    assert (described.name, described.datatype, list(described.shape)) == ("probabilities", "FP32", [len(images), 10])
    assert result.as_numpy("probabilities").tobytes() == ArrayEngine().answer(images).tobytes()
    assert (response.model_name, response.model_version) == ("teacher", "1")
    assert response.id == case.given.get("request_id", "")


@pytest.mark.xdist_group("triton")
def test_every_single_batch_gets_the_same_status_code_and_shape(server: Server) -> None:
    for name, case in CASES.items():
        code, said, result = "OK", "", None
        try:
            if "message" in case.given:
                result = stock.InferResult(server.stub.ModelInfer(case.given["message"], **server.call))
            else:
                given = {"model_name": "teacher", "headers": server.headers, "client_timeout": TIMEOUT_SECONDS}
                result = server.client.infer(**given | case.given)
        except grpc.RpcError as error:
            code, said = error.code().name, error.details()
        except InferenceServerException as error:
            code, said = str(error.status()).removeprefix("StatusCode."), error.message()
        assert code == expected_code(case, server), (name, said)
        assert TEXTS.get(name, "") in said
        if case.code == "OK":
            check_answer(case, result)


@pytest.mark.xdist_group("triton")
def test_on_a_stream_every_bad_batch_is_told_and_every_good_one_answered(server: Server) -> None:
    told: queue.Queue[tuple[Any, Any]] = queue.Queue()
    server.client.start_stream(lambda result, error: told.put((result, error)), headers=server.headers)
    for number, (name, case) in enumerate(CASES.items()):
        if "message" in case.given:  # the stock client's own stream, with a message that it would not make
            request = service_pb2.ModelInferRequest()
            request.CopyFrom(case.given["message"])
            request.id = f"r{number}"
            server.client._stream._enqueue_request(request)
        else:
            given = {"model_name": "teacher"} | case.given
            server.client.async_stream_infer(**given | {"request_id": f"r{number}"})
        result, error = told.get(timeout=TIMEOUT_SECONDS)
        code = expected_code(case, server)
        assert (error is None) == (code == "OK"), (name, error)
        if case.code == "OK":
            check_answer(Case(case.given | {"request_id": f"r{number}"}, "OK"), result)
        if error is not None:
            assert TEXTS.get(name, "") in str(error)
            if server.kind != "Triton":  # there the text has no code
                assert re.match(rf"\[{code}\]\[request id: r{number}\] [A-Z_]+: ", error.message()), error
    server.client.stop_stream()
    assert told.empty()


@pytest.mark.xdist_group("triton")
@pytest.mark.parametrize("how", ["gzip", "deflate"])
def test_compressed_batches_are_taken(server: Server, how: str) -> None:
    found = server.client.infer(
        "teacher", [tensor(PIXELS)], headers=server.headers, compression_algorithm=how, request_id="c"
    )
    check_answer(good(request_id="c"), found)


@pytest.mark.xdist_group("triton")
def test_many_batches_in_flight_are_each_answered_with_their_own(server: Server) -> None:
    told: queue.Queue[tuple[Any, Any]] = queue.Queue()
    server.client.start_stream(lambda result, error: told.put((result, error)), headers=server.headers)
    sent = {str(seed): pictures(1 + seed % MOST, seed=seed) for seed in range(100)}
    for name, images in sent.items():
        server.client.async_stream_infer("teacher", [tensor(images)], request_id=name)
    for _ in range(len(sent)):
        result, error = told.get(timeout=TIMEOUT_SECONDS)
        assert error is None, error
        images = sent.pop(result.get_response().id)
        assert result.as_numpy("probabilities").tobytes() == ArrayEngine().answer(images).tobytes()
    server.client.stop_stream()
    assert sent == {}


# --- what is told about the model ---


def code_of(ask: Callable[[], Any]) -> tuple[str, str]:
    try:
        ask()
    except InferenceServerException as error:
        return str(error.status()).removeprefix("StatusCode."), error.message()
    return "OK", ""


@pytest.mark.xdist_group("triton")
def test_health_and_descriptions_are_of_the_same_form(server: Server) -> None:
    client, headers = server.client, server.headers
    assert client.is_server_live() and client.is_server_ready()  # without headers
    ready = {
        (name, version): client.is_model_ready(name, version)
        for name in ("teacher", "nope")
        for version in ("", "1", "7")
    }
    assert [key for key, found in ready.items() if found] == [("teacher", ""), ("teacher", "1")]
    about = client.get_server_metadata(headers=headers)
    assert about.name and about.version and {"statistics", "model_configuration"} <= set(about.extensions)
    for version in ("", "1"):
        model = MessageToDict(client.get_model_metadata("teacher", version, headers=headers))
        assert model.pop("platform")
        assert model == {
            "name": "teacher",
            "versions": ["1"],
            "inputs": [{"name": "images", "datatype": "UINT8", "shape": ["-1", "1", "8", "8"]}],
            "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": ["-1", "10"]}],
        }
        config = MessageToDict(client.get_model_config("teacher", version, headers=headers).config)
        assert config["maxBatchSize"] == MOST and "dynamicBatching" in config
        assert config["input"] == [{"name": "images", "dataType": "TYPE_UINT8", "dims": ["1", "8", "8"]}]
        assert config["output"] == [{"name": "probabilities", "dataType": "TYPE_FP32", "dims": ["10"]}]
    index = client.get_model_repository_index(headers=headers)
    assert [(found.name, found.version, found.state) for found in index.models] == [("teacher", "1", "READY")]


@pytest.mark.xdist_group("triton")
@pytest.mark.parametrize(
    ("name", "version", "code", "statistics", "said"),
    [
        ("nope", "", "NOT_FOUND", "INVALID_ARGUMENT", "unknown model: 'nope'"),
        ("teacher", "7", "NOT_FOUND", "INVALID_ARGUMENT", "unknown model: 'teacher' version 7"),
        ("teacher", "x", "INVALID_ARGUMENT", "INVALID_ARGUMENT", ""),
    ],
)
def test_what_is_not_there_is_told_alike(
    server: Server, name: str, version: str, code: str, statistics: str, said: str
) -> None:
    client, headers = server.client, server.headers
    for ask in (client.get_model_metadata, client.get_model_config):
        found, text = code_of(lambda ask=ask: ask(name, version, headers=headers))
        assert found == code and said in text
    assert code_of(lambda: client.get_inference_statistics(name, version, headers=headers))[0] == statistics


@pytest.mark.xdist_group("triton")
def test_statistics_count_what_was_done(server: Server) -> None:
    client, headers = server.client, server.headers

    def counted() -> dict[str, Any]:
        (found,) = client.get_inference_statistics("teacher", headers=headers).model_stats
        every = client.get_inference_statistics(headers=headers).model_stats
        assert [(each.name, each.version) for each in every] == [("teacher", "1")]
        stats = found.inference_stats
        return {
            "inferences": found.inference_count,
            "executions": found.execution_count,
            **{part: getattr(stats, part).count for part in ("success", "queue", "compute_infer", "compute_output")},
            "of 5": sum(size.compute_infer.count for size in found.batch_stats if size.batch_size == 5),
        }

    before = counted()
    for seed in range(3):
        client.infer("teacher", [tensor(pictures(5, seed=seed))], headers=headers)
    after = counted()
    grown = {name: after[name] - before[name] for name in after}
    assert grown == {
        "inferences": 15,
        "executions": 3,
        "success": 3,
        "queue": 3,
        "compute_infer": 3,
        "compute_output": 3,
        "of 5": 3,
    }
    (found,) = client.get_inference_statistics("teacher", headers=headers).model_stats
    assert found.last_inference > 1_600_000_000_000  # milliseconds
    assert found.inference_stats.success.ns >= found.inference_stats.compute_infer.ns > 0


# --- this server alone: who may ask what ---

METHODS = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
METHODS_BY_NAME = {method.name: method for method in METHODS}
OPEN = {"ServerLive", "ServerReady", "ModelReady"}
OFFERED = OPEN | {
    "ServerMetadata",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "ModelInfer",
    "ModelStreamInfer",
}


async def code_with(service: Service, method: Any, key: str | None) -> grpc.StatusCode:
    """How a call with an empty request ends."""
    request = getattr(service_pb2, method.input_type.name)()
    call = getattr(service.kserve, method.name)
    metadata = service.metadata(key) if key is not None else ()
    try:
        if method.name == "ModelStreamInfer":
            stream = call(metadata=metadata)
            await stream.done_writing()
            await stream.read()
        else:
            await call(request, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_only_health_needs_no_credential_and_what_is_not_offered_says_so() -> None:
    assert {f"/{SERVICE}/{method.name}" for method in METHODS} <= ALLOWED.keys()
    async with serving() as service:
        for method in METHODS:
            code = await code_with(service, method, None)
            assert code == (grpc.StatusCode.OK if method.name in OPEN else grpc.StatusCode.UNAUTHENTICATED), (
                method.name
            )
            code = await code_with(service, method, service.key)
            assert (code == grpc.StatusCode.UNIMPLEMENTED) == (method.name not in OFFERED), method.name
        admin, stored = new_key(OPERATORS, Role.ADMIN)
        await service.ledger.create_account(OPERATORS, None, stored)
        for name in ("ModelInfer", "ModelStreamInfer"):
            code = await code_with(service, METHODS_BY_NAME[name], admin)
            assert code == grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await service.kserve.TraceSetting(service_pb2.TraceSettingRequest(), metadata=service.metadata())
        assert told.value.details() == f"{SERVICE}/TraceSetting is not offered by this server"


# --- what is sold ---


async def refused(service: Service, request: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as told:
        await service.kserve.ModelInfer(request, metadata=service.metadata())
    return refusal_of(told.value)


@pytest.mark.parametrize(
    ("terms", "name", "datatype", "shape", "other"),
    [
        (Terms(), "probabilities", "FP32", ["-1", "10"], "labels"),
        (Terms(top_k=2, decimals=3), "probabilities", "FP32", ["-1", "10"], "labels"),
        (Terms(answers="hard"), "labels", "INT64", ["-1"], "probabilities"),
    ],
)
async def test_an_account_has_one_output_and_another_is_refused_before_anything_is_held(
    terms: Terms, name: str, datatype: str, shape: list[str], other: str
) -> None:
    async with serving() as service:
        await service.ledger.set_terms("device", terms)
        about = service_pb2.ModelMetadataRequest(name="teacher")
        found = MessageToDict(await service.kserve.ModelMetadata(about, metadata=service.metadata()))
        assert found["outputs"] == [{"name": name, "datatype": datatype, "shape": shape}]
        config = (
            await service.kserve.ModelConfig(
                service_pb2.ModelConfigRequest(name="teacher"), metadata=service.metadata()
            )
        ).config
        (described,) = config.output
        assert (described.name, described.HasField("reshape")) == (name, name == "labels")
        said = {name: value.string_value for name, value in config.parameters.items()}
        assert json.loads(said["labels"]) == [str(k) for k in range(10)]
        assert said["model_digest"] == ArrayEngine().model_digest
        assert (said.get("top_k"), said.get("decimals")) == (
            str(terms.top_k) if terms.top_k else None,
            str(terms.decimals) if terms.decimals else None,
        )
        wrong = infer_request("b", PIXELS)
        wrong.outputs.add(name=other)
        refusal = await refused(service, wrong)
        assert refusal.reason is Reason.INVALID_REQUEST and refusal.variables["field"] == "outputs"
        assert [entry.kind.value for entry in await service.ledger.statement("device")] == ["grant"]
        right = infer_request("b", PIXELS)
        right.outputs.add(name=name)
        response = await service.kserve.ModelInfer(right, metadata=service.metadata())
        (output_tensor,) = response.outputs
        assert (output_tensor.name, output_tensor.datatype) == (name, datatype)
        assert list(output_tensor.shape) == ([2] if name == "labels" else [2, 10])


async def test_an_answer_says_the_policy_that_it_was_sold_under_also_when_another_holds() -> None:
    def policy_of(response: Any) -> dict[str, int]:
        names = ("decimals", "top_k")
        return {name: response.parameters[name].int64_param for name in names if name in response.parameters}

    async with serving() as service:
        found = {}
        for batch_id, terms in (
            ("a", Terms(top_k=99)),
            ("b", Terms(top_k=2, decimals=3)),
            ("c", Terms(decimals=1)),
            ("d", Terms()),
            ("e", Terms(answers="hard", top_k=2, decimals=3)),
        ):
            unset = {"answers", "top_k", "decimals"}
            await service.ledger.set_terms("device", terms, [name for name in unset if getattr(terms, name) is None])
            service.clock.seconds += CACHE_SECONDS
            for repeated in (*found, batch_id):
                response = await service.kserve.ModelInfer(
                    infer_request(repeated, PIXELS), metadata=service.metadata()
                )
                assert found.setdefault(repeated, policy_of(response)) == policy_of(response)
        assert found == {"a": {"top_k": 10}, "b": {"top_k": 2, "decimals": 3}, "c": {"decimals": 1}, "d": {}, "e": {}}


async def test_a_kept_answer_is_never_passed_off_as_another_output() -> None:
    async with serving() as service:
        bought = infer_request("b", PIXELS)
        bought.outputs.add(name="probabilities")
        await service.kserve.ModelInfer(bought, metadata=service.metadata())
        await service.ledger.set_terms("device", Terms(answers="hard"))
        service.clock.seconds += CACHE_SECONDS
        request = infer_request("b", PIXELS)
        request.outputs.add(name="labels")
        refusal = await refused(service, request)
        assert refusal.variables["expected"] == "'probabilities', which is kept for b, or none by name"
        for repeated in (bought, infer_request("b", PIXELS)):  # byte for byte, or with no output named
            again = await service.kserve.ModelInfer(repeated, metadata=service.metadata())
            assert kserve_result(again).name == "probabilities" and kserve_result(again).replayed
        bought.parameters["idempotency_key"].string_param = "new"
        refusal = await refused(service, bought)
        assert refusal.variables["expected"] == "'labels', which is what this account is sold"
        assert await service.balances() == (2, 0, 998)


# --- parameters ---


async def test_an_id_is_no_key_and_only_a_key_of_the_callers_own_makes_a_retry_free() -> None:
    async with serving() as service:
        request = infer_request("", PIXELS)
        request.id = "same"
        keys = set()
        for _ in range(2):
            response = await service.kserve.ModelInfer(request, metadata=service.metadata())
            assert (response.id, kserve_result(response).replayed) == ("same", False)
            keys.add(response.parameters["idempotency_key"].string_param)
        assert len(keys) == 2 and await service.balances() == (4, 0, 996)
        again = infer_request(keys.pop(), PIXELS)  # a key of the server's is as good, for who got to know it
        assert kserve_result(await service.kserve.ModelInfer(again, metadata=service.metadata())).replayed
        assert await service.balances() == (4, 0, 996)
        assert await service.ledger.run_posted("device", DEFAULT_RUN_ID) == 4


@pytest.mark.parametrize("name", ["idempotency_key", "run_id"])
@pytest.mark.parametrize(
    ("choice", "value"),
    [
        ("int64_param", 3),
        ("bool_param", True),
        ("string_param", ""),
        ("string_param", "a b"),
        ("string_param", "k" * 65),
    ],
)
async def test_a_key_that_is_none_is_refused_by_name(name: str, choice: str, value: Any) -> None:
    async with serving() as service:
        request = infer_request("", PIXELS)
        setattr(request.parameters[name], choice, value)
        refusal = await refused(service, request)
        assert (refusal.reason, refusal.variables["field"]) == (Reason.INVALID_REQUEST, f"parameters.{name}")
        assert await service.balances() == (0, 0, 1000)


async def test_what_is_sent_back_stays_small() -> None:
    async with serving() as service:
        refusal = await refused(service, huge_id())
        assert refusal.variables["field"] == "id"
        call = service.kserve.ModelStreamInfer(metadata=service.metadata())
        await call.write(huge_id())
        response = await call.read()
        assert len(response.SerializeToString()) < 1000
        wide = infer_request("b", PIXELS)
        wide.inputs[0].shape.extend([2**63 - 1] * 10_000)
        wide.model_version = "7" * 10_000
        assert len((await refused(service, wide)).message) < 500
        call.cancel()


def huge_id() -> Any:
    request = infer_request("b", PIXELS)
    request.id = "é" * 1_000_000
    return request


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (2, 1, 8, 9), (1, 1, 2000, 2000)])
async def test_typed_values_of_a_shape_that_is_not_served_are_not_converted(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looked_at = kserve._payload, []

    def payload(request: Any, tensor: Any, size: int) -> bytes:
        looked_at.append(size)
        return real(request, tensor, size)

    monkeypatch.setattr(kserve, "_payload", payload)
    size = int(np.prod(shape))
    async with serving(max_batch_pictures=4) as service:
        request = service_pb2.ModelInferRequest(model_name="teacher")
        found = request.inputs.add(name="images", datatype="UINT8", shape=shape)
        found.contents.uint_contents.extend([7] * min(size, 10_000))
        refusal = await refused(service, request)
        assert refusal.variables["field"] == "inputs.images.shape"
        assert refusal.variables["expected"] == "[N, 1, 8, 8] with N from 1 to 4"
        assert looked_at == []
        found.ClearField("contents")
        request.raw_input_contents.append(bytes(size))  # may be the repeat of a batch that was paid for
        assert await refused(service, request) == refusal
        assert looked_at == [size]


# --- draining ---


async def test_a_draining_server_ends_streams_with_an_error_that_the_stock_client_reports() -> None:
    async with serving() as service:
        told: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client = stock.InferenceServerClient(service.address)
        headers = dict(service.metadata())

        def open_and_ask() -> Any:
            client.start_stream(lambda result, error: told.put((result, error)), headers=headers)
            client.async_stream_infer("teacher", [tensor(PIXELS)], request_id="a")
            return told.get(timeout=TIMEOUT_SECONDS)

        result, error = await asyncio.to_thread(open_and_ask)
        assert error is None and result.as_numpy("probabilities").shape == (2, 10)
        await service.calls.drain()
        result, error = await asyncio.to_thread(lambda: told.get(timeout=TIMEOUT_SECONDS))
        assert result is None and error.status() == "StatusCode.UNAVAILABLE"
        assert "the server is stopping" in error.message()
        assert not await asyncio.to_thread(client.is_server_ready)
        assert not await asyncio.to_thread(client.is_model_ready, "teacher")
        assert await asyncio.to_thread(client.is_server_live)
        index = await asyncio.to_thread(lambda: client.get_model_repository_index(headers=headers))
        assert [found.state for found in index.models] == ["UNAVAILABLE"]
        assert (await refused(service, infer_request("b", PIXELS))).reason is Reason.DRAINING
        service.gate.draining = True  # nothing new is let in but questions after the server's health
        assert not await asyncio.to_thread(client.is_server_ready)
        assert await asyncio.to_thread(client.is_server_live)
        assert await code_with(service, METHODS_BY_NAME["ServerMetadata"], service.key) is grpc.StatusCode.UNAVAILABLE
        await asyncio.to_thread(client.close)


# --- statistics ---


async def statistics(service: Service, key: str | None = None) -> Any:
    asked = service_pb2.ModelStatisticsRequest()
    (found,) = (await service.kserve.ModelStatistics(asked, metadata=service.metadata(key))).model_stats
    return found


async def test_statistics_are_the_accounts_own_and_an_admin_sees_all() -> None:
    async with serving() as service:
        other = await service.new_account("other")
        admin, stored = new_key(OPERATORS, Role.ADMIN)
        await service.ledger.create_account(OPERATORS, None, stored)
        for key, batch_id, images in (
            (None, "a", pictures(3)),
            (None, "a", pictures(3)),  # replayed
            (None, "b", pictures(5)),
            (None, "b", pictures(4)),  # refused
            (other, "a", pictures(7)),
        ):
            call = service.kserve.ModelInfer(infer_request(batch_id, images), metadata=service.metadata(key))
            await asyncio.gather(call, return_exceptions=True)
        mine, others, all_of_it = [await statistics(service, key) for key in (None, other, admin)]
    assert [found.inference_count for found in (mine, others, all_of_it)] == [11, 7, 18]
    assert [found.execution_count for found in (mine, others, all_of_it)] == [2, 1, 3]
    counts = {name.name: value.count for name, value in mine.inference_stats.ListFields()}
    assert counts == {
        "success": 3,
        "fail": 1,
        "queue": 2,
        "compute_input": 2,
        "compute_infer": 2,
        "compute_output": 2,
        "cache_hit": 1,
        "cache_miss": 2,
    }
    assert [size.batch_size for size in mine.batch_stats] == [3, 5]
    assert [size.batch_size for size in all_of_it.batch_stats] == [3, 5, 7]
    stats = mine.inference_stats
    parts = (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output, stats.cache_hit)
    assert 0 < sum(part.ns for part in parts) + stats.cache_miss.ns <= stats.success.ns + len(parts)


async def test_other_callers_statistics_are_told_to_no_customer() -> None:
    async with serving() as service:
        newcomer = await service.new_account("newcomer")
        await service.kserve.ModelInfer(infer_request("a", PIXELS), metadata=service.metadata())
        assert (await statistics(service, newcomer)).inference_count == 0


# --- the log, and the docs ---


def test_what_is_not_offered_leaves_no_traceback_in_the_log(start_server: StartServer, tmp_path: Path) -> None:
    ledger = f"sqlite:///{tmp_path}/ledger.db"
    key = teacher_admin(ledger, "account", "create", "device", "--budget", "5").strip()
    ours, headers = start_server(ledger=ledger), {"authorization": f"Bearer {key}"}
    client = stock.InferenceServerClient(ours.address)
    for ask in (client.get_trace_settings, client.get_log_settings, client.get_system_shared_memory_status):
        with pytest.raises(InferenceServerException) as told:
            ask(headers=headers)
        assert told.value.status() == "StatusCode.UNIMPLEMENTED"
    client.close()
    assert ours.stop() == 0
    assert [json.loads(line)["event"] for line in ours.log().splitlines()] == ["serving", "draining", "stopped"]


def test_a_model_can_have_another_name(start_server: StartServer) -> None:
    ours = start_server("--model-name", "digits")
    client = stock.InferenceServerClient(ours.address)
    assert client.is_model_ready("digits") and not client.is_model_ready("teacher")
    client.close()


def test_the_ten_lines_of_the_docs_work(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = start_server(model="array:10,3,32,32")
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "HOST:PORT" in code and "KEY" in code
    code = code.replace("HOST:PORT", ours.address).replace("KEY", ours.create_account())
    exec(compile(code, "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out == "(128, 10) 128 872 False\n(128, 10) 128 872 True\n"
    assert ours.balances()["posted"] == 128


@pytest.mark.parametrize("name", ["", "a b", "m" * 65])
def test_a_model_name_that_is_none_is_refused(name: str) -> None:
    done = CliRunner().invoke(serve, ["--model", "array:10,1,8,8", "--model-name", name])
    assert done.exit_code == 2 and "expected 1 to 64 characters" in done.output
