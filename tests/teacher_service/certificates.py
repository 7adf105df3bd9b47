"""An authority that signs certificates for tests, with the openssl program."""

import itertools
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """Signs what it is asked to; ``pem`` is what to trust it by."""

    def __init__(self, folder: Path, name: str = "mekd test authority") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs the openssl program")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.pem, self._key = folder / "authority.pem", folder / "authority.key"
        self._numbers = itertools.count(1)
        _openssl("req", "-x509", *_KEY, "-days", "2", "-subj", f"/CN={name}", "-keyout", self._key, "-out", self.pem)

    def issue(self, names: str, common_name: str = "somebody", *, days: int = 2) -> tuple[Path, Path]:
        """A certificate for ``subjectAltName`` (empty: none) and its key, in new files."""
        number = next(self._numbers)
        cert, key = self.folder / f"{number}.pem", self.folder / f"{number}.key"
        request, extensions = self.folder / f"{number}.csr", self.folder / f"{number}.ext"
        _openssl("req", *_KEY, "-subj", f"/CN={common_name}", "-keyout", key, "-out", request)
        extensions.write_text(f"subjectAltName={names}\n" if names else "")
        signer = ("-CA", self.pem, "-CAkey", self._key, "-set_serial", str(number))
        _openssl("x509", "-req", "-in", request, *signer, "-days", str(days), "-extfile", extensions, "-out", cert)
        return cert, key

    def trusted_by(self, pair: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
        """What a client that trusts this authority connects with, showing its own certificate where it has one."""
        cert, key = (path.read_bytes() for path in pair) if pair is not None else (None, None)
        return grpc.ssl_channel_credentials(self.pem.read_bytes(), key, cert)


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
