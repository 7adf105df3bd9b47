"""The helper that starts a real Triton, where there is one."""

from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient import grpc as triton_client

from benchmarks import triton
from benchmarks.services import ServiceError

needs_triton = pytest.mark.skipif(bool(triton.missing()), reason=triton.missing() or "there is one")

CONFIG = """
max_batch_size: 4
input [ { name: "images" data_type: TYPE_UINT8 dims: [ 2 ] } ]
output [ { name: "sums" data_type: TYPE_INT64 dims: [ 1 ] } ]
"""
CODE = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([self.sums(request)]) for request in requests]

    def sums(self, request):
        images = np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "images"))
        sums = images.sum(axis=1, keepdims=True, dtype=np.int64)
        return pb_utils.Tensor.from_dlpack("sums", sums)
"""


def gone(address: str) -> bool:
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(0.3)
        except grpc.FutureTimeoutError:
            return True
    return False


@needs_triton
def test_a_real_triton_serves_a_python_model_and_is_gone_afterwards(tmp_path: Path) -> None:
    triton.write_model(tmp_path / "models", "adder", CONFIG, CODE)
    with triton.serving(tmp_path / "models", log=tmp_path / "log") as address:
        client = triton_client.InferenceServerClient(address)
        assert client.get_server_metadata().name == "triton"
        images = triton_client.InferInput("images", [2, 2], "UINT8")
        images.set_data_from_numpy(np.array([[200, 100], [1, 2]], np.uint8))
        assert client.infer("adder", [images]).as_numpy("sums").tolist() == [[300], [3]]
        client.close()
    assert gone(address)


@needs_triton
def test_a_model_that_does_not_load_is_told_with_tritons_own_words(tmp_path: Path) -> None:
    triton.write_model(tmp_path, "broken", CONFIG, "raise RuntimeError('no such weights')")
    with (
        pytest.raises(ServiceError, match=r"Triton did not start: .*failed to load all models"),
        triton.serving(tmp_path),
    ):
        pass


def test_without_triton_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(triton.FOLDER, str(tmp_path))
    assert not triton.available()
    with pytest.raises(ServiceError, match=r"expected a folder with nvidia-pytriton in MEKD_TRITON, found none"):
        triton.serving(tmp_path).__enter__()
