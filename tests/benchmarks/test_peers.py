"""Other servers for the benchmark: what is missing is named, and what is installed answers as the model does."""

import functools
import http.client
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import tritonclient.grpc as oip

from benchmarks import bare, peers, serving
from benchmarks.services import ServiceError, descendants


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_what_is_missing_is_named_in_one_line(peer: peers.Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(peer.variable, raising=False)
    assert peers.missing(peer, torch=True) == (
        f"expected the Python of an environment with {peer.package} in {peer.variable}, found none"
    )
    monkeypatch.setenv(peer.variable, "/no/such/python")
    assert peers.missing(peer, torch=True) == f"{peer.variable}: expected a Python, got /no/such/python"
    monkeypatch.setenv(peer.variable, sys.executable)
    lacking = peers.missing(peer, torch=False)
    assert (
        lacking.startswith(f"{peer.variable}: expected {peer.package}, numpy in it") and "No module named" in lacking
    )
    assert "\n" not in lacking


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_installed_server_answers_as_the_model_does_and_leaves_no_process(peer: peers.Peer, tmp_path: Path) -> None:
    if lacking := peers.missing(peer, torch=False):
        pytest.skip(lacking)
    before = descendants()
    images_NCHW = np.random.default_rng(0).integers(0, 256, (128, *bare.SHAPE_CHW), dtype=np.uint8)
    with peers.serving(peer, "", 1, log=tmp_path / "log") as address:
        if peer.path:
            connection = http.client.HTTPConnection(address)
            answer = np.frombuffer(peers.post(connection, peer.path, images_NCHW.tobytes()), "<f4").reshape(128, -1)
            connection.close()
        else:
            client = oip.InferenceServerClient(address, channel_args=[("grpc.enable_http_proxy", 0)])
            pictures = oip.InferInput("images", images_NCHW.shape, "UINT8").set_data_from_numpy(images_NCHW)
            answer = client.infer(peers.MODEL_NAME, [pictures]).as_numpy("probabilities")
            client.close()
    assert np.array_equal(answer, bare.identity(images_NCHW))
    assert descendants() <= before


class Echo(BaseHTTPRequestHandler):
    """The length of what was posted, over connections that stay open."""

    protocol_version = "HTTP/1.1"
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        said = str(len(body)).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        pass


def test_client_over_http_keeps_its_calls_in_flight_for_its_turn_and_tells_a_refusal() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    Thread(target=server.serve_forever, daemon=True).start()
    load = serving.Load(clients=1, window=3, batch_pictures=2)
    connect = functools.partial(serving._http_call, f"127.0.0.1:{server.server_port}", "/x", load)
    client = serving._CallingClient(connect, load)
    try:
        for _ in range(2):
            for seconds in (0.2, 5.0):  # a machine that stood still gets a longer turn
                began = time.perf_counter()
                client.work(began + seconds)
                latencies = client.rest()
                assert sum(latencies) <= 3 * (time.perf_counter() - began)
                if len(latencies) > 3:
                    break
            assert len(latencies) > 3
        Echo.status = 503
        client.work(time.perf_counter() + 60)
        with pytest.raises(ServiceError, match="HTTP 503"):
            client.rest()
    finally:
        Echo.status = 200
        server.shutdown()
        server.server_close()


def test_ratios_are_of_those_that_were_measured() -> None:
    turns = {
        name: [{"pictures_per_second": speed, "p50_ms": 1.0}]
        for name, speed in (("bare", 50.0), ("memory", 100.0), ("litserve", 25.0))
    }
    ratios = {name: of[0] for name, of in serving._ratios(turns).items() if "/" in name}
    assert ratios == {"memory/bare": 2.0, "memory/litserve": 4.0, "litserve/bare": 0.5}
