"""Who this device is: a key, a certificate that it signs itself, and TLS that accepts pinned certificates only.

The key lies in a file that only the user may read. Knows nothing of who is paired (tensorpar/members.py).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgert.errors import ClusterError

_VALID_FOR = timedelta(days=3650)  # as long as a small device is kept; `cluster forget` ends trust sooner
# A P-256 certificate takes 700 bytes of PEM.
MAX_CERTIFICATE_BYTES = 4096
MAX_NAME_LENGTH = 40


@dataclass(frozen=True, slots=True)
class Identity:
    """This device's certificate and where its key lies."""

    certificate: str  # PEM
    certificate_file: Path
    key_file: Path

    @classmethod
    def load_or_create(cls, directory: Path, name: str) -> Identity:
        """The identity kept in `directory`; a new one at the first call. Raises ClusterError."""
        key_file, certificate_file = directory / "key.pem", directory / "certificate.pem"
        try:
            if not (key_file.exists() and certificate_file.exists()):
                _create(key_file, certificate_file, name)
            certificate = certificate_file.read_text()
        except OSError as error:
            raise ClusterError(f"{directory}: {error.strerror}",
                               "Make the directory writable, or set EDGERT_HOME.") from error
        return cls(certificate, certificate_file, key_file)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.certificate)

    def dial(self, host: str, port: int, certificate: str, within_s: float) -> ssl.SSLSocket:
        """A connection to the device with exactly this certificate. Raises ClusterError saying what failed."""
        where = f"{host}:{port}"
        try:
            plain = socket.create_connection((host, port), within_s)
        except OSError as error:
            raise ClusterError(f"{where} does not answer: {error.strerror or error}",
                               "Is `edgert cluster up` running there, and the port open?") from error
        try:
            tls = self._context(ssl.PROTOCOL_TLS_CLIENT, [certificate]).wrap_socket(plain)
            _check_pinned(tls, [certificate])
            return tls
        except (OSError, ValueError) as error:
            plain.close()
            raise ClusterError(f"{where} is not the device that was paired: {_reason(error)}",
                               "Pair it again: `edgert cluster invite` here, `edgert cluster join` there.") from error

    def answer(self, plain: socket.socket, certificates: Sequence[str]) -> ssl.SSLSocket:
        """TLS with a client that has one of these certificates. Raises ClusterError, and closes the connection."""
        try:
            if not certificates:
                raise ClusterError("no device is paired")
            tls = self._context(ssl.PROTOCOL_TLS_SERVER, certificates).wrap_socket(plain, server_side=True)
            _check_pinned(tls, certificates)
            return tls
        except (OSError, ValueError) as error:
            plain.close()
            raise ClusterError(f"a client was refused: {_reason(error)}") from error
        except ClusterError:
            plain.close()
            raise

    def _context(self, side: int, certificates: Sequence[str]) -> ssl.SSLContext:
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # addresses change; the certificate is the name
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.certificate_file, self.key_file)
        context.load_verify_locations(cadata="\n".join(certificates))
        if side == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # nobody resumes; a ticket would be a byte that nobody asked for
        return context


def fingerprint(certificate: str) -> str:
    """SHA-256 of a certificate (PEM), in hex. Raises ValueError where it is none."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()


def check_certificate(text: object) -> str:
    """A certificate that a peer sent in pairing. Raises ValueError for anything else."""
    if not isinstance(text, str) or len(text) > MAX_CERTIFICATE_BYTES:
        raise ValueError("no certificate")
    x509.load_pem_x509_certificate(text.encode())
    return text


def check_name(text: object) -> str:
    """A device's name: short and printable. Raises ValueError."""
    if not isinstance(text, str) or not text.isprintable() or not 0 < len(text) <= MAX_NAME_LENGTH:
        raise ValueError("no name")
    return text


def _check_pinned(tls: ssl.SSLSocket, certificates: Sequence[str]) -> None:
    """The peer's own certificate is one of these: what one of them may have signed does not count."""
    if not is_one_of(tls, certificates):
        raise ssl.SSLError("the certificate is not the pinned one")


def is_one_of(tls: ssl.SSLSocket, certificates: Sequence[str]) -> bool:
    """Whether the peer's certificate is one of these, to the byte."""
    der = tls.getpeercert(binary_form=True) or b""
    return any(hmac.compare_digest(der, ssl.PEM_cert_to_DER_cert(one)) for one in certificates)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)


def _create(key_file: Path, certificate_file: Path, name: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:MAX_NAME_LENGTH])])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _VALID_FOR).add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                       critical=False).sign(key, hashes.SHA256()))
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                               serialization.NoEncryption())
    write_private(certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
    write_private(key_file, secret)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only the user may read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    temporary.replace(path)
