import asyncio
import contextlib
import itertools
import json
import re
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from protos.mekd.v1 import quota_ledger_pb2 as quota_wire
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.quota_ledger_pb2_grpc import QuotaLedgerStub
from teacher_service import interceptors
from teacher_service import metrics as metrics_module
from teacher_service.metrics import Metrics, RpcCounters
from teacher_service.tls import Certificates
from tests.teacher_service.certificates import Authority
from tests.teacher_service.lanes import lane
from tests.teacher_service.parts import Service, pictures, serving, until

ROOT = Path(__file__).resolve().parents[2]


def texts(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name -> label names and values -> value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            labels = tuple(f"{name}={value}" for name, value in sample.labels.items())
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def used() -> Metrics:
    metrics = Metrics(max_accounts=2, queue_pictures=lambda: 7, is_ready=lambda: True)
    metrics.batch_done(protocol="mekd", account="a", outcome="charged", pictures=5, seconds=0.02)
    metrics.batch_done(protocol="mekd", account="a", outcome="charged", pictures=4, seconds=0.3)
    metrics.batch_done(protocol="mekd", account="b", outcome="overloaded", pictures=3, seconds=0.001)
    metrics.engine_batch(9, 0.25, [0.5, 1.0])
    metrics.balance("a", 91)
    metrics.certificate(lambda: 1e9)
    counters = metrics.rpc("bidi_stream", "mekd.v1.TeacherInference", "Infer")
    counters.started()
    counters.received()
    counters.sent()
    counters.handled("OK", 0.5)
    return metrics


def test_names_and_labels_are_those_of_the_contract() -> None:
    families = {
        family.name: {name for sample in family.samples for name in sample.labels} - {"le"}
        for family in used().registry.collect()
    }
    of_process = {name for name in families if name.startswith("process_")}
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds"} <= of_process
    rpc = {"grpc_type", "grpc_service", "grpc_method"}
    assert {name: labels for name, labels in families.items() if name not in of_process} == {
        "mekd_build": {"version", "model_digest"},
        "mekd_tls_certificate_expiry_timestamp_seconds": set(),
        "grpc_server_started": rpc,
        "grpc_server_handled": rpc | {"grpc_code"},
        "grpc_server_msg_received": rpc,
        "grpc_server_msg_sent": rpc,
        "grpc_server_handling_seconds": rpc,
        "mekd_pictures": {"account", "outcome"},  # _total in the exposition, see below
        "mekd_requests": {"protocol", "outcome"},
        "mekd_request_duration_seconds": {"protocol"},
        "mekd_engine_batch_pictures": set(),
        "mekd_engine_seconds": set(),
        "mekd_queue_wait_seconds": set(),
        "mekd_ledger_seconds": {"operation"},
        "mekd_queue_pictures": set(),
        "mekd_ready": set(),
        "mekd_account_balance_pictures": {"account"},
    }


def test_what_happened_is_counted_once() -> None:
    found = texts(used())
    assert found["mekd_pictures_total"] == {
        ("account=a", "outcome=charged"): 9.0,
        ("account=b", "outcome=overloaded"): 3.0,
    }
    assert {labels: value for labels, value in found["mekd_requests_total"].items() if value} == {
        ("protocol=mekd", "outcome=charged"): 2.0,
        ("protocol=mekd", "outcome=overloaded"): 1.0,
    }
    assert found["mekd_request_duration_seconds_sum"] == {("protocol=mekd",): pytest.approx(0.32)}
    assert found["mekd_engine_batch_pictures_sum"] == {(): 9.0}
    assert found["mekd_engine_seconds_sum"] == {(): 0.25}
    assert (found["mekd_queue_wait_seconds_sum"], found["mekd_queue_wait_seconds_count"]) == ({(): 1.5}, {(): 2.0})
    assert found["mekd_queue_pictures"] == {(): 7.0}
    assert found["mekd_account_balance_pictures"] == {("account=a",): 91.0}


def test_a_call_of_the_books_is_timed_however_it_ends() -> None:
    metrics = Metrics(max_accounts=1, queue_pictures=lambda: 0, is_ready=lambda: True)
    with metrics.ledger("hold"):
        pass
    with pytest.raises(TimeoutError), metrics.ledger("hold"):
        time.sleep(0.02)
        raise TimeoutError
    found = texts(metrics)
    assert found["mekd_ledger_seconds_count"] == {("operation=hold",): 2.0, ("operation=post",): 0.0}
    assert found["mekd_ledger_seconds_sum"]["operation=hold",] >= 0.02


async def test_a_batch_is_held_and_posted_and_its_replay_is_found_by_the_hold() -> None:
    async with serving() as service:
        asking = await lane("mekd", service)
        for _ in range(2):
            await asking.ask("b", pictures(5))
        found = texts(service.metrics)["mekd_ledger_seconds_count"]
    assert found == {("operation=hold",): 2.0, ("operation=post",): 1.0}


def test_only_answers_have_a_duration() -> None:
    metrics = Metrics(max_accounts=1, queue_pictures=lambda: 0, is_ready=lambda: True)
    for outcome in ("charged", "replayed", "overloaded", "departed", "failed", "engine_failed"):
        metrics.batch_done(protocol="mekd", account="a", outcome=outcome, pictures=1, seconds=1.0)
    found = texts(metrics)
    assert found["mekd_request_duration_seconds_count"] == {("protocol=mekd",): 2.0}
    assert sum(found["mekd_requests_total"].values()) == 6


def test_what_runs_is_told_with_the_digest_of_its_model() -> None:
    for given, told in (({}, ""), ({"model_digest": "5eed"}, "5eed")):
        metrics = Metrics(max_accounts=1, queue_pictures=lambda: 0, is_ready=lambda: True, **given)
        (labels,) = texts(metrics)["mekd_build_info"]
        assert f"model_digest={told}" in labels


def test_readiness_is_told_as_it_is_when_asked() -> None:
    ready = False
    metrics = Metrics(max_accounts=1, queue_pictures=lambda: 0, is_ready=lambda: ready)
    assert texts(metrics)["mekd_ready"] == {(): 0.0}
    ready = True
    assert texts(metrics)["mekd_ready"] == {(): 1.0}


def test_accounts_beyond_the_limit_are_counted_together() -> None:
    metrics = used()
    for index in range(50):
        metrics.batch_done(protocol="mekd", account=f"new-{index}", outcome="charged", pictures=2, seconds=0.1)
        metrics.balance(f"new-{index}", index)
    found = texts(metrics)
    assert found["mekd_pictures_total"]["account=other", "outcome=charged"] == 100.0
    assert len(found["mekd_pictures_total"]) == 3
    assert found["mekd_account_balance_pictures"] == {("account=a",): 91.0}
    metrics.batch_done(protocol="mekd", account="b", outcome="charged", pictures=1, seconds=0.1)
    assert texts(metrics)["mekd_pictures_total"]["account=b", "outcome=charged"] == 1.0


def test_two_servers_in_one_process_count_apart() -> None:
    used()
    assert "mekd_pictures_total" not in texts(
        Metrics(max_accounts=1, queue_pictures=lambda: 0, is_ready=lambda: True)
    )


def test_metrics_are_served_over_http() -> None:
    metrics = used()
    port = metrics.serve("127.0.0.1", 0)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'mekd_pictures_total{account="a",outcome="charged"} 9.0' in text
    assert "# HELP mekd_queue_pictures" in text
    with pytest.raises(OSError, match="in use"):
        used().serve("127.0.0.1", port)


# --- HTTPS ---


def page(url: str, context: ssl.SSLContext | None = None) -> str:
    handlers: list[Any] = [urllib.request.ProxyHandler({})]
    if context is not None:
        handlers.append(urllib.request.HTTPSHandler(context=context))
    with urllib.request.build_opener(*handlers).open(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_metrics_beyond_loopback_are_encrypted_and_renewed_as_the_port_itself(
    start_server: Any, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "authority")
    cert, key = authority.issue("IP:127.0.0.1")
    pair = ("--tls-cert", str(cert), "--tls-key", str(key))
    server = start_server(*pair, "--metrics-host", "0.0.0.0")
    address = f"127.0.0.1:{server.metrics_port()}"
    trusting = ssl.create_default_context(cafile=authority.pem)
    found = page(f"https://{address}/metrics", trusting)
    assert "# HELP mekd_queue_pictures" in found
    assert _days_left(found) == pytest.approx(2, abs=0.1)
    with pytest.raises(OSError):
        page(f"http://{address}/metrics")
    # Who connects and says nothing holds up nobody.
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.metrics_port())))
        started = time.monotonic()
        assert "mekd_" in page(f"https://{address}/metrics", trusting)
        assert time.monotonic() - started < 5
    fresh = Authority(tmp_path / "fresh")
    for place, source in zip((key, cert), reversed(fresh.issue("IP:127.0.0.1", days=20)), strict=True):
        source.replace(place)
    found = page(f"https://{address}/metrics", ssl.create_default_context(cafile=fresh.pem))
    assert _days_left(found) == pytest.approx(20, abs=0.1)
    assert server.stop() == 0


def _days_left(found: str) -> float:
    line = re.search(r"^mekd_tls_certificate_expiry_timestamp_seconds (\S+)$", found, re.MULTILINE)
    assert line is not None
    return (float(line[1]) - time.time()) / 86400


def test_metrics_beyond_loopback_ask_for_a_certificate_where_the_port_does(start_server: Any, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("IP:127.0.0.1")
    pair = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.pem))
    server = start_server(*pair, "--metrics-host", "0.0.0.0")
    url = f"https://127.0.0.1:{server.metrics_port()}/metrics"
    trusting = ssl.create_default_context(cafile=authority.pem)
    with pytest.raises(OSError):
        page(url, trusting)
    trusting.load_cert_chain(*authority.issue("DNS:prometheus"))
    assert "mekd_" in page(url, trusting)


def test_a_ledger_server_has_metrics_where_a_port_is_given(start_server: Any) -> None:
    quiet = start_server("--ledger-only", model="")
    assert '"metrics_port": null' in quiet.log()
    server = start_server("--ledger-only", "--metrics-port", "0", model="")
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError):
            QuotaLedgerStub(channel).GetBalance(quota_wire.GetBalanceRequest(), timeout=10)
    ended = r'grpc_server_handled_total\{grpc_code="Unauthenticated",grpc_method="GetBalance".*\} 1\.0'
    deadline = time.monotonic() + 10  # a call is counted once it is over: its caller may know that first
    while not re.search(ended, found := page(f"http://127.0.0.1:{server.metrics_port()}/metrics")):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    assert "\nmekd_ready 1.0\n" in found


def test_metrics_beyond_loopback_without_tls_need_leave(start_server: Any) -> None:
    server = start_server("--metrics-host", "0.0.0.0", "--insecure-listen")
    assert "mekd_" in page(f"http://127.0.0.1:{server.metrics_port()}/metrics")


def test_metrics_are_served_to_so_many_at_once_and_further_connections_are_closed() -> None:
    port = used().serve("127.0.0.1", 0)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(16)]
        with socket.create_connection(("127.0.0.1", port), timeout=5) as further:
            assert further.recv(1) == b""
        silent[0].close()
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError):
                assert "mekd_" in page(f"http://127.0.0.1:{port}/metrics")
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("tls", [False, True])
def test_who_sends_a_byte_now_and_then_is_cut_off(tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "_HTTP_WHOLE_SECONDS", 2.0)  # of 30
    authority = Authority(tmp_path)
    certificates = Certificates(*authority.issue("IP:127.0.0.1"))
    port = used().serve("127.0.0.1", 0, certificates.context if tls else None)
    trusting = ssl.create_default_context(cafile=authority.pem)
    client = socket.create_connection(("127.0.0.1", port), timeout=5)
    if tls:
        client = trusting.wrap_socket(client, server_hostname="127.0.0.1")
    started = time.monotonic()
    with client, contextlib.suppress(OSError):
        client.settimeout(0.1)
        while time.monotonic() - started < 25:
            client.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                if client.recv(1) == b"":
                    break
    assert time.monotonic() - started < 25


# --- calls ---


def rpcs(service: Service, name: str) -> dict[tuple[str, ...], float]:
    """Label values -> value, of one metric of calls."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in service.metrics.registry.collect()
        for sample in family.samples
        if sample.name == name
    }


DESCRIBE = ("unary", "mekd.v1.TeacherInference", "Describe")
INFER = ("bidi_stream", "mekd.v1.TeacherInference", "Infer")
WATCH = ("server_stream", "mekd.v1.QuotaLedger", "WatchBalance")


async def test_calls_and_messages_are_counted_whatever_their_end() -> None:
    async with serving() as service:
        await service.stub.Describe(wire.DescribeRequest(), metadata=service.metadata())
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError):
                await service.stub.Describe(wire.DescribeRequest())
        stream = await service.stream()
        for index in range(3):
            await stream.send(f"b{index}", pictures(2))
            await stream.result()
        assert rpcs(service, "grpc_server_started_total")[INFER] == 1
        # There before its first end, for what is shown as open: begun less ended.
        assert rpcs(service, "grpc_server_handled_total")[*INFER, "OK"] == 0
        await stream.call.done_writing()
        assert await stream.call.read() is grpc.aio.EOF
        cancelled = await service.stream()
        service.engine.gate.clear()  # a stream with nothing under way may as well end well
        await cancelled.send("under-way", pictures(2))
        await until(lambda: len(service.engine.calls) == 4)
        cancelled.call.cancel()
        late = service.stub.Infer(metadata=service.metadata(), timeout=2.0)
        with pytest.raises(grpc.aio.AioRpcError):
            await late.read()
        wrong = service.open()
        await wrong.call.write(wire.InferRequest())
        await wrong.ended_by()
        watching = service.quota.WatchBalance(quota_wire.WatchBalanceRequest(), metadata=service.metadata())
        await watching.read()
        watching.cancel()

        def handled() -> dict[tuple[str, ...], float]:
            return {
                labels: value
                for labels, value in rpcs(service, "grpc_server_handled_total").items()
                if labels[:3] in (DESCRIBE, INFER, WATCH)
            }

        await until(lambda: sum(handled().values()) == 8)
        service.engine.gate.set()
        found = handled()
        # The caller's own clock ends a late call, too: the server may hear of that first.
        left = [found.pop((*INFER, code), 0) for code in ("Canceled", "DeadlineExceeded")]
        assert sum(left) == 2 and left[0] >= 1
        assert found == {
            (*DESCRIBE, "OK"): 1,
            (*DESCRIBE, "Unauthenticated"): 2,
            (*INFER, "OK"): 1,
            (*INFER, "InvalidArgument"): 1,
            (*WATCH, "OK"): 0,
            (*WATCH, "Canceled"): 1,
        }
        assert rpcs(service, "grpc_server_started_total")[INFER] == 4
        assert rpcs(service, "grpc_server_msg_received_total")[INFER] == 4 + 2 + 1  # the configs, too
        assert rpcs(service, "grpc_server_msg_sent_total")[INFER] == 4 + 1
        assert rpcs(service, "grpc_server_msg_sent_total")[DESCRIBE] == 1
        assert rpcs(service, "grpc_server_handling_seconds_count")[INFER] == 4


@pytest.mark.parametrize(
    ("remaining_seconds", "code"),
    [(None, "Canceled"), (1.0, "Canceled"), (0.0, "DeadlineExceeded"), (-1.0, "DeadlineExceeded")],
)
def test_who_leaves_is_told_from_whose_time_is_up(remaining_seconds: float | None, code: str) -> None:
    context = SimpleNamespace(time_remaining=lambda: remaining_seconds)
    seen: list[str] = []
    with pytest.raises(asyncio.CancelledError), interceptors._handling(counters_told(seen), context):
        raise asyncio.CancelledError
    assert seen == [code]


def counters_told(ended: list[str]) -> RpcCounters:
    """Counters of nothing, but for a list of the codes that calls ended with."""
    nothing = lambda *_: None  # noqa: E731
    return RpcCounters(started=nothing, received=nothing, sent=nothing, ended=ended.append, took_seconds=nothing)


async def test_names_that_callers_make_up_are_counted_together() -> None:
    async with serving() as service:
        for index in range(30):
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await service.channel.unary_unary(f"/made.up{index}/Method{index}")(b"")
            assert ended.value.code() is grpc.StatusCode.UNIMPLEMENTED
        other = ("other", "other", "other")
        assert rpcs(service, "grpc_server_started_total") == {other: 30}
        assert rpcs(service, "grpc_server_handled_total") == {(*other, "OK"): 0, (*other, "Unimplemented"): 30}


def test_codes_are_written_as_go_writes_them() -> None:
    seen: list[str] = []
    counters = counters_told(seen)
    for code in grpc.StatusCode:
        counters.handled(code.name, 0.0)
    expected = """OK Canceled Unknown InvalidArgument DeadlineExceeded NotFound AlreadyExists PermissionDenied
        Unauthenticated ResourceExhausted FailedPrecondition Aborted OutOfRange Unimplemented Internal Unavailable
        DataLoss"""
    assert set(seen) == set(expected.split())


# --- what is shown and watched of them ---


def test_every_metric_that_dashboards_and_alerts_name_is_one_of_ours() -> None:
    ours = {sample.name for family in used().registry.collect() for sample in family.samples} | {"up"}
    for path in ("deploy/prometheus/alerts.yml", "deploy/grafana/dashboard.json"):
        text = (ROOT / path).read_text("utf-8")
        named = set(re.findall(r"\b(?:mekd|grpc_server|process)_[a-z_]+\b", text))
        assert named and named <= ours, f"{path}: {named - ours}"


def test_every_outcome_that_alerts_wait_for_is_there_before_the_first_of_them() -> None:
    rules = (ROOT / "deploy/prometheus/alerts.yml").read_text("utf-8")
    named = re.findall(r'mekd_requests_total\{outcome=~?"([a-z_|]+)"', rules)
    outcomes = {outcome for names in named for outcome in names.split("|")}
    assert {"ledger_unavailable", "hold_lost", "ledger_refused"} <= outcomes
    metrics = Metrics(max_accounts=1, queue_pictures=lambda: 0, is_ready=lambda: True)
    found = texts(metrics)["mekd_requests_total"]
    expected = {(f"protocol={name}", f"outcome={outcome}") for name in ("mekd", "kserve") for outcome in outcomes}
    assert found == dict.fromkeys(expected, 0.0)


def alert_rules() -> dict[str, str]:
    """The text of each rule by the name of its alert, without comments."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / "deploy/prometheus/alerts.yml").read_text("utf-8"), flags=re.MULTILINE)
    return dict(re.findall(r"- alert: (\w+)\n(.*?)(?=\n *- alert:|\Z)", text, re.DOTALL))


def test_alerts_on_metrics_that_others_have_too_are_of_ours_alone() -> None:
    shared = {name: rule for name, rule in alert_rules().items() if re.search(r"\b(process|grpc_server)_", rule)}
    assert set(shared) == {"TeacherRefusesKeys", "TeacherFileDescriptors"}
    assert all("and on (job, instance) mekd_build_info" in rule for rule in shared.values())


def test_a_server_that_vanished_from_the_targets_has_an_alert() -> None:
    assert 'expr: absent(mekd_build_info{model_digest!=""})' in alert_rules()["TeacherAbsent"]


def test_one_refusal_for_the_ledger_pages_nobody() -> None:
    rule = alert_rules()["TeacherLedgerUnavailable"]
    assert "severity: warning" in rule
    window, lasting = re.search(r"\[(\d+)m\]", rule), re.search(r"for: (\d+)m", rule)
    assert window is not None and lasting is not None and int(lasting[1]) > int(window[1])


def test_every_alert_fires_on_what_it_is_there_for_and_is_silent_beside_it() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    rules = ROOT / "tests" / "teacher_service" / "alerts_test.yml"
    alerts = re.findall(r"alert: (\w+)", (ROOT / "deploy/prometheus/alerts.yml").read_text("utf-8"))
    named = set(re.findall(r'alertname="(\w+)"', rules.read_text("utf-8")))
    assert set(alerts) == named
    ended = subprocess.run(
        [promtool, "test", "rules", rules], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_dashboard_and_rules_are_well_formed() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text("utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert all(target["expr"] for panel in panels for target in panel["targets"])
    for expression in [target["expr"] for panel in panels for target in panel["targets"]]:
        assert expression.count("(") == expression.count(")"), expression
    rules = (ROOT / "deploy/prometheus/alerts.yml").read_text("utf-8")
    assert rules.count("- alert:") == rules.count("expr:") == rules.count("summary:") == len(alert_rules()) > 0


def test_panels_lie_beside_each_other_within_the_width() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((ROOT / "deploy/grafana/dashboard.json").read_text("utf-8"))["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = set(itertools.product(columns, range(place["y"], place["y"] + place["h"])))
        assert columns.stop <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_panels_show_the_servers_chosen_and_all_of_ours_are_no_others() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text("utf-8"))
    (servers,) = [found for found in dashboard["templating"]["list"] if found["name"] == "instance"]
    assert servers["includeAll"] and "allValue" not in servers  # so All is those that the query finds
    assert servers["query"]["query"] == "label_values(mekd_build_info, instance)"
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            metrics = re.findall(r"\b(?:mekd|grpc_server|process)_\w+", target["expr"])
            assert target["expr"].count('{instance=~"$instance"') == len(metrics) > 0, panel["title"]


def test_how_busy_the_engine_is_and_how_long_it_is_waited_for_is_shown() -> None:
    panels = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text("utf-8"))["panels"]
    shown = {target["expr"] for panel in panels for target in panel.get("targets", [])}
    servers = '{instance=~"$instance"}[$__rate_interval]'
    assert f"sum by (instance) (rate(mekd_engine_seconds_sum{servers}))" in shown
    waited = f"sum by (instance, le) (rate(mekd_queue_wait_seconds_bucket{servers}))"
    assert f"histogram_quantile(0.99, {waited})" in shown
