"""Where credentials come from in tests: a process, a role with a web identity; and certificates that nobody knows."""

import datetime
import ipaddress
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.s3 import ACCESS_KEY, SECRET_KEY

TOKEN = "session-token-of-the-test"


class CredentialProcess:
    """A ``credential_process`` of an AWS profile: it writes what the test has put into a file."""

    def __init__(self, folder: Path) -> None:
        self._answer = folder / "answer"
        self._script = folder / "provider.py"
        self._script.write_text(
            "import sys, pathlib\n"
            f"answer = pathlib.Path({str(self._answer)!r}).read_text()\n"
            "sys.exit(answer.removeprefix('exit ') if answer.startswith('exit ') else print(answer))\n"
        )
        self.config = folder / "config"
        self.config.write_text(f"[profile rotating]\ncredential_process = {sys.executable} {self._script}\n")

    def give(self, secret: str = SECRET_KEY, *, valid_s: float = 300.0) -> None:
        """Credentials that expire soon, so that boto3 asks again before each request."""
        expiry = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=valid_s)
        credentials = {"AccessKeyId": ACCESS_KEY, "SecretAccessKey": secret, "SessionToken": TOKEN}
        self._answer.write_text(json.dumps({"Version": 1, **credentials, "Expiration": expiry.isoformat()}))

    def fail(self, message: str) -> None:
        """The process ends with an error."""
        self._answer.write_text(f"exit {message}")

    def babble(self, text: str) -> None:
        """The process writes something else."""
        self._answer.write_text(text)

    def remove(self) -> None:
        """There is no such process."""
        self.config.write_text("[profile rotating]\ncredential_process = /nonexistent/provider\n")


class TokenService:
    """An STS on loopback that exchanges web identity tokens for the test server's credentials."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        """Web identity tokens that were shown, in order."""
        self.refusal: str | None = None
        """The error code to answer with."""
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
                service.tokens += form["WebIdentityToken"]
                body = service._answer().encode()
                self.send_response(400 if service.refusal else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Tests want their output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self) -> str:
        if self.refusal is not None:
            quoted = f"the token {self.tokens[-1]} is not accepted"
            return (
                f"<ErrorResponse><Error><Code>{self.refusal}</Code><Message>{quoted}</Message></Error></ErrorResponse>"
            )
        expiry = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=300)
        return (
            "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
            f"<AccessKeyId>{ACCESS_KEY}</AccessKeyId><SecretAccessKey>{SECRET_KEY}</SecretAccessKey>"
            f"<SessionToken>{TOKEN}</SessionToken><Expiration>{expiry.isoformat()}</Expiration>"
            "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that signs itself, and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(alternative, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, key_file = folder / "ca.pem", folder / "key.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, key_file
