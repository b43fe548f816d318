"""A whole Flower deployment on this machine: a SuperLink and SuperNodes, TLS, authenticated nodes.

    python examples/flower_deployment.py -o runs

makes certificates and keys in a temporary folder, starts everything on free ports of 127.0.0.1,
runs the app in flower_app (two rounds on digits), and shuts everything down. On real machines the
commands are the same ones, with names instead of 127.0.0.1 and keys that never leave their owner.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import TracebackType

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

APP = Path(__file__).parent / "flower_app"
HOST = "127.0.0.1"
NAME = "loopback"  # of the SuperLink, for the flwr command


class Deployment:
    """A SuperLink with `nodes` SuperNodes; everything is gone when the block ends.

    Parameters
    ----------
    nodes : int
    folder : path
        For certificates, keys, logs, the SuperLink's database and what nodes keep.
    """

    def __init__(self, nodes: int, folder: Path) -> None:
        self.count, self.folder = nodes, folder
        self.ports = free_ports(nodes + 1)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        scripts = Path(sys.executable).parent  # Flower starts its parts by name
        self.env = os.environ | {
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def __enter__(self) -> Deployment:
        try:
            make_certificates(self.folder)
            (self.folder / "flwr").mkdir()
            (self.folder / "flwr" / "config.toml").write_text(
                f'[superlink.{NAME}]\naddress = "{HOST}:{self.ports[0]}"\n'
                f'root-certificates = "{self.folder / "ca.crt"}"\n'
            )
            self.start_superlink()
            for i in range(self.count):
                make_key(self.folder, f"node{i}")
                self.flwr("supernode", "register", f"{self.folder}/node{i}.pub", NAME)
                self.start_node(i)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start_superlink(self) -> None:
        self._start(
            "superlink", "flower-superlink", "--host", HOST, "--port", str(self.ports[0]),
            "--database", f"{self.folder}/superlink.db", "--enable-supernode-auth",
            "--disable-runtime-dependency-installation", *self._certificates(),
        )  # fmt: skip
        self._wait_for(self.ports[0], "superlink")

    def start_node(self, i: int) -> None:
        self._start(
            f"node{i}", "flower-supernode", "--superlink", f"{HOST}:{self.ports[0]}",
            "--host", HOST, "--port", str(self.ports[1 + i]),
            "--root-certificates", f"{self.folder}/ca.crt",
            "--auth-supernode-private-key", f"{self.folder}/node{i}",
            "--node-config", f'partition-id={i} state-dir="{self.folder}/state{i}"',
            *self._certificates(),
        )  # fmt: skip

    def run(self, seconds: float, app: Path = APP, **config: str | int | float | bool) -> str:
        """``flwr run`` to the end; its log. `config` overrides the app's run configuration."""
        given = " ".join(f"{k.replace('_', '-')}={json.dumps(v)}" for k, v in config.items())
        return self.flwr("run", str(app), NAME, "--stream", "--run-config", given, timeout=seconds)

    def flwr(self, *command: str, timeout: float = 120) -> str:
        done = subprocess.run(
            ["flwr", *command], env=self.env, cwd=self.folder, timeout=timeout, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"flwr {' '.join(command)}:\n{done.stdout}\n{self.logs()}")
        return done.stdout

    def kill(self, name: str) -> None:
        """SIGKILL to a SuperLink or SuperNode and all that it started."""
        kill_tree(self.processes.pop(name))

    def stop(self) -> None:
        for name in reversed(list(self.processes)):
            self.kill(name)

    def logs(self, lines: int = 30) -> str:
        """The ends of all logs."""
        ends = [(p.stem, p.read_text(errors="replace")) for p in sorted(self.folder.glob("*.log"))]
        return "\n".join(f"--- {name}\n" + "\n".join(t.splitlines()[-lines:]) for name, t in ends)

    def _certificates(self) -> list[str]:
        files = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
        return [x for k, v in files.items() for x in (f"--ssl-{k}", f"{self.folder}/{v}")]

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _wait_for(self, port: int, name: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while self.processes[name].poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"{name} does not listen on port {port}\n{self.logs()}")


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """The parent first, that it starts nothing more."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    process.kill()
    process.wait()
    for child in children:
        try:
            children += [c for c in child.children(recursive=True) if c not in children]
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=10)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind((HOST, 0))
        return [s.getsockname()[1] for s in sockets]


def make_certificates(folder: Path) -> None:
    """ca.crt, and server.crt with server.key for 127.0.0.1, good for a day."""
    now = datetime.now(timezone.utc)

    def certificate(
        name: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False
            )
            .add_extension(x509.BasicConstraints(ca=key is signer, path_length=None), True)
        )

    ca, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    usage = {
        "digital_signature": False, "content_commitment": False, "key_encipherment": False,
        "data_encipherment": False, "key_agreement": False, "key_cert_sign": True,
        "crl_sign": True, "encipher_only": False, "decipher_only": False,
    }  # fmt: skip
    for_ca = certificate("loopback CA", ca, "loopback CA", ca).add_extension(
        x509.SubjectKeyIdentifier.from_public_key(ca.public_key()), False
    )
    for_ca = for_ca.add_extension(x509.KeyUsage(**usage), True)
    names = [x509.IPAddress(ipaddress.ip_address(HOST)), x509.DNSName("localhost")]
    for_server = certificate(HOST, server, "loopback CA", ca).add_extension(
        x509.SubjectAlternativeName(names), False
    )
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(for_ca.sign(ca, hashes.SHA256()).public_bytes(pem))
    (folder / "server.crt").write_bytes(for_server.sign(ca, hashes.SHA256()).public_bytes(pem))
    key = server.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_secret(folder / "server.key", key)


def make_key(folder: Path, name: str) -> None:
    """A node's key pair in OpenSSH's format: `name` and `name`.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    encoding, formats = serialization.Encoding, serialization
    private = key.private_bytes(
        encoding.PEM, formats.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_secret(folder / name, private)
    public = key.public_key().public_bytes(encoding.OpenSSH, formats.PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public)


def write_secret(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--nodes", type=int, default=3, help="SuperNodes, one per client")
    parser.add_argument("--resume", action="store_true", help="go on with a run in that folder")
    parser.add_argument("--limit", type=float, default=600, help="seconds it may take")
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    with (
        tempfile.TemporaryDirectory(prefix="glora-flower-") as folder,
        Deployment(given.nodes, Path(folder)) as deployment,
    ):
        out = str(given.out.resolve())
        print(deployment.run(given.limit, out=out, resume=given.resume))
        runs = [p.parent for p in given.out.rglob("run.json")]
        if not all((run / "done").exists() for run in runs):
            raise SystemExit(f"a run did not finish\n{deployment.logs()}")
    for run in runs:
        print(run)
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
            print(line["round"], line["metrics"], line["bytes_up"], line.get("processes", ""))


if __name__ == "__main__":
    main()
