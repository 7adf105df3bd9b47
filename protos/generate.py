"""Regenerates the committed stubs and descriptor set: ``python -m protos.generate [FOLDER]``.

Needs grpcio-tools at the exact version pinned in pyproject.toml. A test regenerates into an empty folder
and compares byte for byte.
"""

import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ("protos/mekd/v1/quota_ledger.proto", "protos/mekd/v1/teacher_inference.proto")
DESCRIPTOR_SET = "protos/mekd/v1/descriptor_set.binpb"


def generate(folder: Path) -> None:
    """Writes ``*_pb2.py``, ``*_pb2.pyi``, ``*_pb2_grpc.py`` and the descriptor set under ``folder``."""
    from grpc_tools import protoc

    site_packages = sysconfig.get_paths()["purelib"]  # google/rpc/*.proto come with googleapis-common-protos
    bundled = Path(protoc.__file__).parent / "_proto"  # google/protobuf/*.proto
    (folder / "protos/mekd/v1").mkdir(parents=True, exist_ok=True)
    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"-I{bundled}",
            f"-I{site_packages}",
            f"--python_out={folder}",
            f"--pyi_out={folder}",
            f"--grpc_python_out={folder}",
            f"--descriptor_set_out={folder / DESCRIPTOR_SET}",
            *SCHEMA,
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
