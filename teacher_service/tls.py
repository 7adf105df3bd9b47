"""The server's certificate, its key and the authority of its clients: read, checked, and read again when renewed.

The files are looked at with every new connection. A renewed pair is used from then on; one that cannot be used is
logged once, and the old one stays. Connections that are open keep what they began with.
"""

import os
import ssl
import threading
from pathlib import Path

import grpc
import structlog
from cryptography import x509

log = structlog.get_logger()


class TlsError(Exception):
    """Files that cannot be used; one line: which, expected, got."""


class Certificates:
    """What a server shows its clients, and what it expects of theirs.

    Args:
        cert, key: PEM files: a certificate with those between it and its authority, and its unencrypted private key.
        client_ca: PEM file; where it is given, every client must show a certificate that this authority signed.

    Raises TlsError.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._lock = threading.Lock()  # gRPC asks from threads of its own
        self._seen = self._stamps()
        self._configuration, self._context, self._expires_seconds = self._read()
        self._is_news_to_grpc = False

    def credentials(self) -> grpc.ServerCredentials:
        """For a port of gRPC."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._renewed,  # type: ignore[arg-type]  # its stubs do not know of None
            require_client_authentication=self._client_ca is not None,
        )

    def context(self) -> ssl.SSLContext:
        """For one connection of HTTP."""
        with self._lock:
            self._look()
            return self._context

    def expires_seconds(self) -> float:
        """When the certificate in use expires, in seconds since 1970; not those between it and its authority."""
        with self._lock:
            self._look()
            return self._expires_seconds

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks at every handshake; None: as before."""
        with self._lock:
            self._look()
            if not self._is_news_to_grpc:
                return None
            self._is_news_to_grpc = False
            return self._configuration

    def _look(self) -> None:
        stamps = self._stamps()
        if stamps == self._seen:
            return
        self._seen = stamps
        try:
            self._configuration, self._context, self._expires_seconds = self._read()
        except TlsError as error:
            log.error("renewed certificate cannot be used, the old one stays", reason=str(error))
        else:
            self._is_news_to_grpc = True
            log.info("renewed certificate in use")

    def _stamps(self) -> tuple[object, ...]:
        return tuple(_stamp(path) for path in (self._cert, self._key, self._client_ca) if path is not None)

    def _read(self) -> tuple[grpc.ServerCertificateConfiguration, ssl.SSLContext, float]:
        cert, key = _bytes(self._cert, "--tls-cert"), _bytes(self._key, "--tls-key")
        roots = _bytes(self._client_ca, "--tls-client-ca") if self._client_ca is not None else None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:  # gRPC itself would take any bytes here, and fail later without a reason
            context.load_cert_chain(self._cert, self._key, password="")
            chain = x509.load_pem_x509_certificates(cert)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise TlsError(
                f"--tls-cert {self._cert}, --tls-key {self._key}: expected a PEM certificate and its unencrypted "
                f"private key ({getattr(error, 'reason', None) or error})"
            ) from None
        if roots is not None:
            try:
                context.load_verify_locations(cadata=roots.decode("ascii", "replace"))
            except (ssl.SSLError, ValueError) as error:  # the latter where the file is empty
                raise TlsError(
                    f"--tls-client-ca {self._client_ca}: expected certificates in PEM "
                    f"({getattr(error, 'reason', None) or error})"
                ) from None
            context.verify_mode = ssl.CERT_REQUIRED
        expires_seconds = chain[0].not_valid_after_utc.timestamp()
        return grpc.ssl_server_certificate_configuration([(key, cert)], roots), context, expires_seconds


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _bytes(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"{flag} {path}: {error.strerror}") from None
