"""``edge-agent run --teacher kserve://…`` as typed: against a server in this process, a real Triton, and our own."""

import json
import math
import random
import re
import shlex
import signal
import sqlite3
import subprocess
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import torch

from benchmarks import triton
from edge_agent import cli
from networks import registry
from networks.modelfile import load_model, save_model
from tests.conftest import in_process, program
from tests.edge_agent.kserve_parts import Model, serving
from tests.end_to_end.conftest import START_SECONDS
from tests.models import resnet8_facts

FAST = "[deprivatize]\nsteps = 2\n[distill]\npasses = 1\n"
needs_triton = pytest.mark.skipif(bool(triton.missing()), reason=triton.missing() or "there is one")


class Runs:
    """One folder of pictures, one run.toml, one run folder; agents one after the other."""

    def __init__(self, world) -> None:
        self.world = world
        self.folder, self.pictures = world.folder, world.pictures
        self.run_dir = self.folder / "run"
        self.agents = world.agents
        self.settings("")

    def settings(self, teacher: str) -> None:
        """Writes run.toml with a section [teacher]."""
        section = f"[teacher]\n{teacher}\n" if teacher else ""
        (self.folder / "run.toml").write_text(f"batch_pictures = 16\n{section}{FAST}")

    def command(self, address: str, budget: int, *more: str) -> list[str]:
        return [
            *(program("edge-agent"), "run", "--phase", "all", "--images", str(self.pictures), "--quiet"),
            *("--teacher", address, "--run-dir", str(self.run_dir), "--budget", str(budget), *more),
        ]

    def agent(self, address: str, *more: str, budget: int = 200, **environment: str):
        return self.world.run(self.command(address, budget, *more), environment)

    def start(self, address: str, budget: int) -> "subprocess.Popen[str]":
        agent = subprocess.Popen(
            self.command(address, budget),
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.agents.append(agent)
        return agent

    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())

    def totals(self) -> SimpleNamespace:
        journal = sqlite3.connect(self.run_dir / "journal.db")
        names = ("planned", "sent", "answered")
        row = journal.execute(
            "SELECT coalesce(sum(picture_count), 0), coalesce(sum(sent_pictures), 0), "
            "coalesce(sum(charged_count), 0) FROM batches"
        ).fetchone()
        journal.close()
        return SimpleNamespace(**dict(zip(names, row, strict=True)))


@pytest.fixture
def runs(world) -> Runs:
    return Runs(world)


def one_line(done, exit_code: int) -> str:
    assert done.returncode == exit_code, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_whole_run_counts_what_it_sent_and_a_second_one_sends_nothing(runs):
    model = Model()
    runs.settings('output_kind = "logits"')
    with serving(model) as address:
        done = runs.agent(address)
        assert done.returncode == 0, done.stderr
        summary = runs.summary()
        assert summary["metered_by"] == "agent"
        assert summary["queries"] == {"budget": 200, "charged": 200, "deprivatize": 0, "distill": 200, "adapt": 0}
        assert summary["ledger"] == {"debited": None, "held": None, "balance": None}
        assert summary["private_images_sent"] == 0
        assert summary["phases_done"] == ["deprivatize", "distill", "adapt"]
        assert summary["bytes"]["sent"] == sum(request.ByteSize() for request in model.requests)
        assert model.received_pictures == 200
        assert not any("authorization" in seen for seen in model.metadata)
        again = runs.agent(address)
        assert again.returncode == 0, again.stderr
        assert model.received_pictures == 200
    offline = runs.agent(address)  # nothing is left to ask
    assert offline.returncode == 0, offline.stderr
    status = in_process(cli.main, "status", "--run-dir", str(runs.run_dir), "--format", "json")
    assert status.returncode == 0, status.stderr
    shown = json.loads(status.stdout)
    counts = {name: shown[name] for name in ("planned", "sent", "charged", "unanswered")}
    assert counts == {"planned": 200, "sent": 200, "charged": 200, "unanswered": 0}
    assert shown["metered_by"] == "agent"
    assert load_model(runs.run_dir / "student.pt").facts.labels == ("0", "1", "2", "3")


def test_key_of_the_environment_travels(runs):
    model = Model()
    runs.settings('output_kind = "logits"')
    with serving(model) as address:
        assert runs.agent(address, budget=16, MEKD_API_KEY="secret").returncode == 0
    assert {seen.get("authorization") for seen in model.metadata} == {"Bearer secret"}


@pytest.mark.parametrize("attempt", range(2))
def test_killed_at_random_moments_it_never_counts_too_little_and_never_sends_too_much(runs, attempt):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    budget = 1600
    limit = 0.0  # what comes beyond is not answered: however late the kill is, there is something left to ask

    def before(number, context):
        time.sleep(0.01)
        while model.received_pictures > limit and context.is_active():
            time.sleep(0.005)

    model = Model(before=before)
    runs.settings('output_kind = "logits"')
    with serving(model) as address:
        for _ in range(3):
            target = model.received_pictures + rng.randrange(1, 300)  # each agent sends some before it is killed
            limit = target + 100
            agent = runs.start(address, budget)
            deadline = time.monotonic() + START_SECONDS
            while model.received_pictures < target:
                assert agent.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(rng.random() * 0.02)
            agent.kill()
            assert agent.wait(30) == -signal.SIGKILL
            agent.stderr.close()
            assert model.received_pictures <= runs.totals().sent <= budget
        limit = math.inf
        done = runs.agent(address, budget=budget)
    assert done.returncode == 0, done.stderr
    totals = runs.totals()
    assert model.received_pictures <= totals.sent == budget == runs.summary()["queries"]["charged"]
    assert totals.answered <= budget


def test_server_killed_under_way_is_waited_for(runs):
    # What comes after 13 calls is not answered while the first server lives, however late the test is to kill it.
    killed = threading.Event()
    model = Model(before=lambda number, context: killed.wait(START_SECONDS) if number > 13 else None)
    runs.settings('output_kind = "logits"')
    with serving(model) as address:
        agent = runs.start(address, 1000)
        deadline = time.monotonic() + START_SECONDS
        while model.calls <= 13:
            assert agent.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    killed.set()
    time.sleep(1.0)
    with serving(model, address.removeprefix("kserve://").removesuffix("/m")):
        _, errors = agent.communicate(timeout=120)
    assert agent.returncode == 0, errors
    totals = runs.totals()
    assert model.received_pictures <= totals.sent == 1000
    assert 1000 - 4 * 16 <= totals.answered < 1000


def test_budget_without_room_for_a_resend_is_exit_3_then_trains_on_what_there_is(runs):
    def last_fails(number, context):
        if number == 4:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    model = Model(before=last_fails)
    runs.settings('output_kind = "logits"')
    with serving(model) as address:
        line = one_line(runs.agent(address, budget=64), 3)
        assert "16 pictures were sent and not answered" in line and "raise --budget" in line
        assert runs.summary()["queries"]["charged"] == 64 == model.received_pictures
        done = runs.agent(address, budget=64)
        assert done.returncode == 0, done.stderr
        assert runs.summary()["phases_done"] == ["deprivatize", "distill", "adapt"]
        assert model.received_pictures == 64
        assert "64" in one_line(runs.agent(address, budget=63), 2)
        assert runs.agent(address, budget=96).returncode == 0
        assert (runs.totals().answered, runs.totals().sent, model.received_pictures) == (80, 96, 96)


def test_what_is_missing_is_asked_for_by_name(runs):
    with serving(Model(datatype="FP32")) as address:
        line = one_line(runs.agent(address), 2)
        for name in ("scale", "mean", "std", "output_kind", "[teacher] of run.toml"):
            assert name in line
        assert address in line


def test_settings_are_corrected_in_the_same_folder_until_the_first_answer_and_no_more_after(runs):
    model = Model()
    runs.settings('output_kind = "probabilities"')
    with serving(model) as address:
        assert "say so: output_kind" in one_line(runs.agent(address, budget=100), 2)
        assert runs.totals().sent == model.received_pictures == 16, "a wrong setting costs one batch"
        generator = (runs.run_dir / "generator.pt").read_bytes()
        runs.settings('output_kind = "logits"')
        done = runs.agent(address, budget=100)
        assert done.returncode == 0, done.stderr
        assert (runs.run_dir / "generator.pt").read_bytes() == generator, "it has nothing to do with the answers"
        assert model.received_pictures == runs.totals().sent == 100
        runs.settings('output_kind = "logits"\nscale = 255')
        line = one_line(runs.agent(address, budget=100), 6)
        assert "[teacher]" in line and "give another --run-dir, or the former value" in line
        runs.settings('output_kind = "logits"')
        model.versions = ["2"]
        assert "this run began with the model metadata-" in one_line(runs.agent(address, budget=120), 2)
        assert model.received_pictures == 100


def test_run_counted_by_one_is_not_gone_on_with_by_the_other(runs, world):
    runs.settings('output_kind = "logits"')
    with serving(Model()) as address:
        assert runs.agent(address, budget=16).returncode == 0
    runs.settings("")
    assert "counted by the agent" in one_line(runs.agent(world.address, budget=32, MEKD_API_KEY="k"), 6)


def test_section_for_a_teacher_of_our_own_protocol_is_a_mistake(runs, world):
    runs.settings('output_kind = "logits"')
    assert "kserve://HOST:PORT/MODEL" in one_line(runs.agent(world.address, MEKD_API_KEY="k"), 2)


def test_example_of_the_documentation_runs_as_it_stands(runs):
    """But for the port, and settings that make it quick."""
    text = (Path(__file__).parent.parent.parent / "docs" / "kserve.md").read_text()
    (settings,), (command,) = (re.findall(rf"```{kind}\n(.*?)```", text, flags=re.S) for kind in ("toml", "sh"))
    model = Model(name="resnet", datatype="FP32", sizes=(3, 8, 8), scale=1.0)
    model.mean, model.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    with serving(model) as address:
        assert "kserve://127.0.0.1:8001/resnet" in settings
        (runs.folder / "run.toml").write_text(settings.replace("kserve://127.0.0.1:8001/resnet", address) + FAST)
        program_, *arguments = shlex.split(command)
        done = subprocess.run(
            [program(program_), *arguments, "--budget", "64"],
            cwd=runs.folder,
            capture_output=True,
            text=True,
            timeout=150,
        )
    assert done.returncode == 0, done.stderr
    assert "every picture sent counts" in done.stderr and "does not tell its weights" in done.stderr
    assert "64 pictures sent by this agent's own count" in done.stderr
    assert model.received_pictures == 64
    kept = tomllib.loads((runs.folder / "runs/mekd/run.toml").read_text())["teacher"]
    assert kept["address"] == address and kept["mean"] == [0.485, 0.456, 0.406]


# --- a real Triton ---

CONFIG = """
max_batch_size: 32
input [ { name: "image" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 1, 8, 8 ] } ]
output [ { name: "scores" data_type: TYPE_FP32 dims: [ 4 ] } ]
dynamic_batching { }
"""
CODE = """
import torch
import triton_python_backend_utils as pb_utils
from networks.modelfile import load_model

class TritonPythonModel:
    def initialize(self, args):
        torch.set_num_threads(1)
        self.module = load_model(FILE).module.eval()

    def execute(self, requests):
        return [pb_utils.InferenceResponse([self.scores(request)]) for request in requests]

    @torch.inference_mode()
    def scores(self, request):
        images = torch.from_dlpack(pb_utils.get_input_tensor_by_name(request, "image").to_dlpack())
        return pb_utils.Tensor.from_dlpack("scores", self.module(images).contiguous())
"""
TEACHER = 'scale = 1\nmean = [0.5]\nstd = [0.5]\noutput_kind = "logits"'


@needs_triton
def test_a_torch_model_on_a_real_triton_is_the_teacher(runs):
    torch.manual_seed(0)
    made = registry.build("resnet8", class_count=4, channels=1).eval()
    save_model(runs.folder / "teacher.pt", made, resnet8_facts(8, labels="abcd"))
    code = CODE.replace("FILE", f"__import__('pathlib').Path({str(runs.folder / 'teacher.pt')!r})")
    triton.write_model(runs.folder / "models", "tiny", CONFIG, code)
    with triton.serving(runs.folder / "models", log=runs.folder / "triton.log") as host_port:
        address = f"kserve://{host_port}/tiny"
        line = one_line(runs.agent(address), 2)
        assert all(name in line for name in ("scale", "mean", "std", "output_kind")) and "layout" not in line
        runs.settings(TEACHER)
        done = runs.agent(address, "--set", "batch_pictures=128")
        assert done.returncode == 0, done.stderr
        assert served_pictures(host_port, "tiny") == 200
    summary = runs.summary()
    assert (summary["metered_by"], summary["queries"]["charged"]) == ("agent", 200)
    assert summary["phases_done"] == ["deprivatize", "distill", "adapt"]
    assert_answers_are_the_models(runs.run_dir / "journal.db", made)


def served_pictures(host_port: str, model: str) -> int:
    """How many pictures Triton says it has computed."""
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with grpc.insecure_channel(host_port, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        (found,) = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name=model), timeout=10).model_stats
        return found.inference_count


def assert_answers_are_the_models(journal_path: Path, module) -> None:
    """Every answer that is kept is what the model itself says to the very picture."""
    from protos import codec
    from protos.mekd.v1 import teacher_inference_pb2 as wire

    journal = sqlite3.connect(journal_path)
    rows = journal.execute("SELECT request, answer FROM batches").fetchall()
    journal.close()
    assert sum(len(codec.decode_images(wire.Batch.FromString(request).images)) for request, _ in rows) == 200
    for request, answer in rows:
        images_NCHW = codec.decode_images(wire.Batch.FromString(request).images)
        with torch.inference_mode():
            expected_NK = module((torch.from_numpy(images_NCHW.copy()) / 255 - 0.5) / 0.5).softmax(1)
        got_NK = codec.decode_answer(wire.Answer.FromString(answer), picture_count=len(images_NCHW), class_count=4)
        assert torch.allclose(torch.from_numpy(got_NK), expected_NK, atol=1e-5)


# --- our own server through this protocol ---


def test_our_own_server_is_a_teacher_through_this_protocol_too(runs, world):
    world.account(1000)
    world.start_server()
    address = f"kserve://{world.address}/teacher"
    refused = one_line(runs.agent(address), 5)
    assert "MEKD_API_KEY" in refused
    done = runs.agent(address, MEKD_API_KEY=world.key)
    assert done.returncode == 0, done.stderr
    summary = runs.summary()
    assert (summary["metered_by"], summary["queries"]["charged"]) == ("agent", 200)
    assert summary["ledger"] == {"debited": None, "held": None, "balance": None}
    assert world.books()["posted"] == 200
    journal = sqlite3.connect(runs.run_dir / "journal.db")
    kept = dict(journal.execute("SELECT batch_id, charged_count FROM batches WHERE answer IS NOT NULL"))
    journal.close()
    assert world.posted_batches() == kept, "its books know the batches by the agent's ids"


def test_policy_of_an_account_may_change_between_runs_through_this_protocol(runs, world):
    world.account(1000)
    for budget, terms in ((64, ()), (128, ("--top-k", "2", "--decimals", "2"))):
        if terms:
            world.admin("account", "set", "device", *terms)
        world.start_server()  # a running one would notice within five seconds
        done = runs.agent(f"kserve://{world.address}/teacher", budget=budget, MEKD_API_KEY=world.key)
        assert done.returncode == 0, done.stderr
        world.stop_server()
    assert runs.summary()["answers"] == {"soft": 64, "top-2, 2 decimals": 64}
    world.admin("account", "set", "device", "--answers", "hard")
    world.start_server()
    line = one_line(runs.agent(f"kserve://{world.address}/teacher", budget=160, MEKD_API_KEY=world.key), 2)
    assert "this run began with the model metadata-" in line
