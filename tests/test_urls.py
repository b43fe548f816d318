"""Clients behind URLs: the state of folders, whatever servers do; and no secret anywhere."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
import torch
from job_clients import save_clients
from object_server import BUCKET, SECRET, ObjectServer, serving, upload
from typer.testing import CliRunner

from glora_ops import State, aggregate_adapters, job
from glora_ops.adapters import remote
from glora_ops.cli import app
from glora_ops.errors import GloraError, Refused, shown
from glora_ops.merging.update import update_adapters
from glora_ops.runtime import objects

pytestmark = pytest.mark.filterwarnings("ignore::glora_ops.errors.GloraWarning")
TENSORS = "adapter_model.safetensors"
LIMIT = 8_000  # bytes of a batch: several of them


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with serving() as started:
        yield started


@pytest.fixture
def store(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    """The server, with its address and credentials where s3fs looks for them."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    server.faults.clear()
    return server


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return save_clients(tmp_path / "clients")


@pytest.fixture
def urls(store: ObjectServer, folders: list[Path], request: pytest.FixtureRequest) -> list[str]:
    found = upload(folders, f"{request.node.name}/")
    store.asked.clear()
    return found


def in_memory(folders: list[Path]) -> list[str]:
    store = fsspec.filesystem("memory")
    for path in folders[0].parent.rglob("*"):
        if path.is_file():
            name = path.relative_to(folders[0].parent).as_posix()
            store.pipe_file(f"/clients/{name}", path.read_bytes())
    return [f"memory://clients/{folder.name}" for folder in folders]


def assert_same(found: State, expected: State) -> None:
    """To the bit, and in everything recorded but where the clients lie."""
    assert found.modules.keys() == expected.modules.keys()
    for name, module in expected.modules.items():
        for field, value in vars(module).items():
            assert torch.equal(vars(found.modules[name])[field], value), (name, field)
    for name, dense in expected.dense.items():
        assert torch.equal(found.dense[name], dense)
    assert found.settings == expected.settings
    assert found.layout == expected.layout
    records = [json.loads(json.dumps(state.record)) for state in (found, expected)]
    for record in records:
        for client in record["clients"]:
            del client["path"]
    assert records[0] == records[1]


def fetched(store: ObjectServer) -> int:
    """Requests for bytes of tensor files."""
    asked = store.asked.items()
    return sum(n for (how, path, _), n in asked if how == "GET" and path.endswith(TENSORS))


def glora(*arguments: object, codes: tuple[int, ...] = (0,)) -> str:
    """All that a command says."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code in codes, (arguments, result.output, result.exception)
    return result.output + result.stderr


def spoil(store: ObjectServer, url: str, *faults: str) -> None:
    store.faults[f"{url.removeprefix('s3:/')}/{TENSORS}"] = list(faults)


def overwrite(url: str, folder: Path) -> None:
    """The same bytes with one bit flipped: the size stays."""
    content = bytearray((folder / TENSORS).read_bytes())
    content[-1] ^= 1
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{url}/{TENSORS}", bytes(content))


# --- the same state ----------------------------------------------------------------------------


def test_a_state_of_urls_is_that_of_folders(
    urls: list[str], folders: list[Path], tmp_path: Path
) -> None:
    """From S3, from memory, from file://, mixed with folders; in one go, and as a job."""
    expected = aggregate_adapters(folders, max_bytes=LIMIT)
    memory = in_memory(folders)
    assert_same(aggregate_adapters(urls, max_bytes=LIMIT), expected)
    assert_same(aggregate_adapters([*memory[:2], *folders[2:]], max_bytes=LIMIT), expected)
    files = aggregate_adapters([f"file://{folder}" for folder in folders], max_bytes=LIMIT)
    assert files.record == expected.record
    made = aggregate_adapters(urls, max_bytes=LIMIT, job=tmp_path / "job")
    assert_same(made, expected)
    assert made.record is not None
    assert [client["path"] for client in made.record["clients"]] == urls
    robust = {"robust": "gate", "rank": 4}
    assert_same(aggregate_adapters(memory, **robust), aggregate_adapters(folders, **robust))


@pytest.mark.parametrize("room", [0, 2**27])
def test_a_module_is_one_request_and_a_small_file_one_altogether(
    store: ObjectServer, urls: list[str], folders: list[Path], monkeypatch: pytest.MonkeyPatch,
    room: int,
) -> None:  # fmt: skip
    """Without room to keep files: header, end (duplicates), values, and each module once."""
    monkeypatch.setattr(remote, "KEPT", room)
    expected = aggregate_adapters(folders, dense="mean", max_bytes=LIMIT)
    store.asked.clear()
    state = aggregate_adapters(urls, max_bytes=LIMIT)
    assert_same(state, expected)
    heads = 2  # full weights of two clients, read once for their mean
    slices = len(folders) * (3 + len(state.modules)) + heads
    assert fetched(store) == (2 * len(folders) if room else slices)
    ranges = [with_range for (how, _, with_range) in store.asked if how == "GET"]
    assert all(ranges)


def test_what_is_kept_of_files_is_bounded_and_given_back(
    urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remote._kept == 0
    held: list[int] = []
    monkeypatch.setattr(remote, "KEPT", 10_000)
    aggregate_adapters(urls, progress=lambda *_: held.append(remote._kept))
    assert 0 < max(held) <= 10_000
    assert remote._kept == 0


def test_no_more_requests_at_a_time_than_are_promised(
    urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, most, lock = 0, 0, threading.Lock()
    call = objects._call

    def counting(*arguments: Any, **how: Any) -> Any:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        try:
            return call(*arguments, **how)
        finally:
            with lock:
                at_work -= 1

    monkeypatch.setattr(objects, "_call", counting)
    monkeypatch.setattr(objects, "_turn", threading.BoundedSemaphore(2))
    aggregate_adapters(urls, max_bytes=LIMIT)
    assert most == 2


# --- servers ----------------------------------------------------------------------------------


def test_faults_that_pass_change_no_bit(
    store: ObjectServer, urls: list[str], folders: list[Path]
) -> None:
    for url, fault in zip(urls, ("500", "cut", "short", "long"), strict=True):
        spoil(store, url, fault, fault)
    assert_same(aggregate_adapters(urls), aggregate_adapters(folders))
    assert not any(store.faults.values())


FAULTS = {
    "500": "status 500", "403": "status 403, no permission", "404": "no such file",
    "cut": "a body that was cut", "short": "not as many bytes as asked for",
    "long": "not as many bytes as asked for", "html": "not as many bytes as asked for",
    "slow": "no answer in time",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_stay_are_refused_by_client_url_and_kind(
    store: ObjectServer, urls: list[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """And the server's page, which quotes a signature, is not."""
    if fault == "slow":
        monkeypatch.setattr(objects, "SECONDS", 0.2)
    spoil(store, urls[1], *[fault] * 100)
    with pytest.raises(Refused) as refused:
        aggregate_adapters(urls)
    (found,) = refused.value.refusals
    assert (found.client, found.file) == ("c1", f"{urls[1]}/{TENSORS}")
    assert found.found.startswith(FAULTS[fault])
    assert found.remedy
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_client_that_cannot_be_read_is_skipped_by_name(
    store: ObjectServer, urls: list[str]
) -> None:
    spoil(store, urls[1], *["500"] * 100)
    state = aggregate_adapters(urls, on_bad_client="skip")
    assert state.clients == ("c0", "c2", "c3")
    (said,) = state.settings["skipped"]
    assert "status 500" in said


def test_a_client_that_changes_is_refused_by_name_at_every_step(
    urls: list[str], folders: list[Path], tmp_path: Path
) -> None:
    place = tmp_path / "job"
    changed = "client 'c2', file 'adapter_model.safetensors': the client is not what it was"
    job.plan(urls, place, max_bytes=LIMIT)
    overwrite(urls[2], folders[2])
    with pytest.raises(Refused, match=changed):
        job.work(place)
    upload(folders, urls[0].removeprefix(f"s3://{BUCKET}/").removesuffix("c0"))
    job.plan(urls, tmp_path / "again", max_bytes=LIMIT)
    job.work(tmp_path / "again")
    overwrite(urls[2], folders[2])
    with pytest.raises(Refused, match=changed):
        job.join(tmp_path / "again")


@pytest.mark.parametrize("room", [0, 2**27])
def test_a_client_that_changes_while_it_is_used_is_refused(
    urls: list[str], folders: list[Path], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(remote, "KEPT", room)
    monkeypatch.setattr(remote, "REQUEST", 2**12)

    def progress(step: str, done: int, total: int) -> None:
        if (step, done) == ("headers", total):
            overwrite(urls[3], folders[3])

    with pytest.raises(Refused, match=r"client 'c3'.*changed while it was being used"):
        aggregate_adapters(urls, max_bytes=LIMIT, progress=progress)


class Odd(BaseHTTPRequestHandler):
    """Files of a folder, answered in the way that the first part of the path says."""

    protocol_version = "HTTP/1.1"
    root: Path

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        _, way, name = self.path.split("/", 2)
        path = self.root / name
        if not path.is_file():
            return self.say(404, b"nothing here", {}, body)
        content = path.read_bytes()
        marks = {} if way == "unmarked" else {"ETag": f'"{path.stat().st_mtime_ns}"'}
        first, last = 0, len(content) - 1
        if "Range" in self.headers:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        if way == "moved" and body:
            return self.say(302, b"", {"Location": f"/plain/{name}?token={SECRET}"}, body)
        if way == "page" and name.endswith(".safetensors"):
            part = (b"<html>log in</html>" * len(part))[: len(part)]
        if way == "whole":
            part, status = content, 200
        else:
            status = 206 if "Range" in self.headers else 200
        if way == "packed" and body:
            marks["Content-Encoding"] = "gzip"
        return self.say(status, part, marks, body)

    def say(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


Web = Callable[[str], list[str]]


@pytest.fixture
def web(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """The clients' URLs on an HTTP server that answers in a certain way."""
    monkeypatch.setattr(objects, "PAUSES", (0.01,))
    monkeypatch.setattr(Odd, "root", folders[0].parent, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield lambda way: [
            f"http://127.0.0.1:{server.server_port}/{way}/{folder.name}" for folder in folders
        ]
        server.shutdown()
        thread.join()


def test_plain_http_with_ranges_is_read(web: Web, folders: list[Path]) -> None:
    assert_same(aggregate_adapters(web("plain")), aggregate_adapters(folders))


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("moved", "status 302, a redirect"),
        ("page", "the header does not fit"),
        ("packed", "not the range of bytes that was asked for"),
        ("unmarked", "neither ETag nor version nor time of change"),
        ("nowhere/at-all", "the file is missing"),
    ],
)
def test_odd_servers_are_refused_by_what_they_do(web: Web, way: str, said: str) -> None:
    with pytest.raises(Refused, match=said) as refused:
        aggregate_adapters(web(way))
    assert SECRET not in str(refused.value)


def test_a_server_without_ranges_is_refused_where_they_are_needed(
    web: Web, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the body is read; a file that is asked for as a whole may come as one."""
    assert_same(aggregate_adapters(web("plain")), aggregate_adapters(folders))
    monkeypatch.setattr(remote, "HEAD", 100)
    with pytest.raises(Refused, match="status 200, but not the range of bytes"):
        aggregate_adapters(web("whole"))


@pytest.mark.parametrize(
    ("url", "package", "remedy"),
    [
        ("gs://bucket/a", "gcsfs", "pip install gcsfs"),
        ("az://bucket/a", "adlfs", "pip install adlfs"),
        ("odd://bucket/a", "odd", "one of s3, gs"),
    ],
)
def test_a_missing_package_is_named(
    url: str, package: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Refused, match=remedy):
        aggregate_adapters([url])


# --- secrets ----------------------------------------------------------------------------------

SECRETS = [
    f"s3://{BUCKET}/a?X-Amz-Signature={SECRET}",
    f"https://account.example/a?sv=1&sig={SECRET}",
    f"https://user:{SECRET}@account.example/a",
    f"https://user:pa/{SECRET}@account.example/a",
    f"https://user:pa?{SECRET}@account.example/a",
    f"https://{SECRET}@account.example/a",
    f"s3://key:{SECRET}@{BUCKET}/a",
    f"https://account.example/a#token={SECRET}",
    f"simplecache::s3://{BUCKET}/a b?token={SECRET}",
    f"abfs://box:{SECRET}@account.example/a",
]


@pytest.mark.parametrize("url", SECRETS)
def test_a_secret_in_a_url_is_refused_and_shown_nowhere(url: str, tmp_path: Path) -> None:
    """By every command that takes clients, before anything is asked for, in any form."""
    listed, recipe, out = tmp_path / "clients.tsv", tmp_path / "merge.toml", tmp_path / "out"
    listed.write_text(f"{url}\tann\n{url}\todd name\t1\tmore\n")
    recipe.write_text(f"clients = [{json.dumps(url)}, {{path = {json.dumps(url)}, x = 1}}]\n")
    state = tmp_path / "state"
    clients = save_clients(tmp_path / "clients", 2)
    glora("aggregate", *clients, "-o", state)
    for command in (
        ["aggregate", url, f"ann={url}", "-o", out],
        ["aggregate", url, "-o", out, "--json"],
        ["aggregate", "--clients", listed, "-o", out],
        ["aggregate", recipe, "-o", out],
        ["aggregate", *clients, "-o", url],
        ["compare", url, *clients],
        ["job", "plan", url, *clients, "-o", tmp_path / "job", "--on-bad-client", "skip"],
        ["job", "work", url],
        ["update", state, "--add", url],
        ["inspect", url],
        ["readout", state, "-r", 2, "-o", url],
        ["apply", url, "--base", url, "-o", out],
        [url],
    ):
        assert SECRET not in glora(*command, codes=(1, 2, 3)), command
    for path in (tmp_path / "job").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()
    assert not out.exists()
    with pytest.raises(GloraError) as refused:
        aggregate_adapters([url])
    assert SECRET not in repr(refused.value)


def test_no_credential_is_kept(urls: list[str], tmp_path: Path) -> None:
    """Those of the environment, in job, state and readouts."""
    command = ["aggregate", *urls, "-o", tmp_path / "out", "--readout", 2, "-v", "--json"]
    said = glora(*command)
    aggregate_adapters(urls, job=tmp_path / "job")
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in said


def test_texts_lose_what_urls_hold_in_secret_and_nothing_else() -> None:
    for text in (
        "see https://host:8080/a/b, s3://bucket/a@b/c and abfs://box@account.example/a; why? so",
        "C:/folder and /a:/b@c", "http://[::1]:80/a", "lr=3", "a: b?",
    ):  # fmt: skip
        assert shown(text) == text
    said = shown("'s3:/b/a?x=y' and \"http://u:p@h/a#b\" fail")
    assert said == "'s3:/b/a' and \"http://h/a\" fail"


# --- what else there is -----------------------------------------------------------------------


def test_nothing_is_written_to_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clients = save_clients(tmp_path / "clients", 2)
    said = glora("aggregate", *clients, "-o", "s3://bucket/out", codes=(2,))
    assert "Invalid value for '--out'" in " ".join(said.split())
    state = aggregate_adapters(clients)
    for write in (
        lambda: state.save("s3://bucket/x.safetensors"),
        lambda: state.write_adapter("s3://bucket/r2", rank=2),
        lambda: job.plan(clients, "s3://bucket/job"),
    ):
        with pytest.raises(GloraError, match="a place on this machine"):
            write()
    assert os.listdir(tmp_path) == ["clients"]


def test_an_update_fetches_urls_that_are_named_only(
    store: ObjectServer, urls: list[str], folders: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    aggregate_adapters(urls[:3]).save(out / "server.safetensors")
    store.asked.clear()
    said = glora("update", out, "--remove", "c1", codes=(1,))
    assert "URLs are fetched only where they are named" in said
    assert not store.asked
    state = State.load(out / "server.safetensors")
    assert state.record is not None
    assert [client["path"] for client in state.record["clients"]] == urls[:3]
    new = update_adapters(state, add=urls[:3])
    assert_same(new, aggregate_adapters(folders[:3]))


def test_clients_are_compared_and_planned_by_url(urls: list[str], tmp_path: Path) -> None:
    listed = tmp_path / "clients.tsv"
    listed.write_text("".join(f"{url}\n" for url in urls))
    assert "c3" in glora("compare", *urls)
    said = glora("job", "plan", "--clients", listed, "-o", tmp_path / "job")
    assert "4 clients" in said
    planned = json.loads((tmp_path / "job" / "plan.json").read_text())["clients"]
    assert [client["path"] for client in planned] == urls
    assert all(
        client["files"].keys() == {"size", "mark", "num_examples", "config_sha256"}
        for client in planned
    )
