"""Reading over HTTP from servers that behave, each in its own way."""

import random
import ssl
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from pipeline.common.errors import UserError
from pipeline.data.storage import RemotePolicy, ShardReadError, ShardState, open_storage
from tests.data.storage.fault_server import (
    Answer,
    Connection,
    Fault,
    FaultServer,
    Request,
    always,
    ignored_range,
    serving,
    short_body,
    stall,
    status,
)

CONTENT = random.Random(0).randbytes(100_000)


def redirect(target: str) -> Fault:
    def fault(connection: Connection, answer: Answer, rng: random.Random) -> None:
        connection.head(302, {"Location": target, "Content-Length": "0"})

    return fault


def answer_with(number: int, **headers: str) -> Fault:
    """The right body under other headers."""

    def fault(connection: Connection, answer: Answer, rng: random.Random) -> None:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        connection.head(number, answer.headers | named)
        connection.client.sendall(answer.body)

    return fault


def test_exactly_the_bytes_asked_for_are_requested():
    with serving(FaultServer({"a/b.tar": CONTENT})) as server:
        storage = open_storage(f"{server.url}/a/")
        assert storage.read("b.tar", 7, 20) == CONTENT[7:27]
        assert storage.read("b.tar", 99_999, 1) == CONTENT[-1:]
        assert storage.read("b.tar", 5, 0) == b""
        asked = [request.headers["range"] for request in server.requests]
        assert asked == ["bytes=7-26", "bytes=99999-99999"]
        assert server.requests[1].headers["if-match"] == '"a/b.tar-0"'
        assert server.most_open == 1  # the connection was used again
        with pytest.raises(ShardReadError, match="ends at byte 100000, before 100001"):
            storage.read("b.tar", 99_999, 2)
        with pytest.raises(ShardReadError, match="ends at byte 100000, before 200001"):
            storage.read("b.tar", 200_000, 1)


def test_long_ranges_are_read_in_parts_over_a_bounded_number_of_connections():
    policy = RemotePolicy(part_bytes=10_000, connections=3)
    server = FaultServer({"a.tar": CONTENT}, seconds_per_answer=0.05)
    with serving(server), closing(open_storage(server.url, policy)) as storage:
        threads = [threading.Thread(target=storage.read, args=("a.tar", 0, 9)) for _ in range(6)]
        for thread in threads:
            thread.start()
        assert storage.read("a.tar", 1, 99_998) == CONTENT[1:-1]
        for thread in threads:
            thread.join()
        assert server.most_open == 3
        assert len(server.requests) == 16


def test_a_broken_connection_gives_its_place_back():
    """With one place, the second broken answer would otherwise be the last."""
    policy = RemotePolicy(connections=1, max_wait_seconds=0.01, deadline_seconds=5)
    faults = [status(500), short_body, stall, status(404)]

    def plan(request: Request) -> Fault | None:
        return faults[request.number // 2 % 4] if request.number % 2 == 0 else None

    with serving(FaultServer({"a.tar": CONTENT}, plan)) as server:
        storage = open_storage(server.url, policy.model_copy(update={"timeout_seconds": 0.2}))
        for number in range(8):
            if number % 4 == 3:
                with pytest.raises(ShardReadError, match="404"):
                    storage.read("a.tar", 10, 1000)
            assert storage.read("a.tar", number, 1000) == CONTENT[number : number + 1000]


def test_states_are_asked_for_by_head_in_parallel():
    files = {f"{i}.tar": bytes(i) for i in range(40)}
    server = FaultServer(files, seconds_per_answer=0.02)
    with serving(server), closing(open_storage(server.url)) as storage:
        names = [*files, "none.tar"]
        states = storage.states(names)
        assert states == {
            name: ShardState(len(files[name]), f'"{name}-0"') if name in files else None
            for name in names
        }
        assert {request.method for request in server.requests} == {"HEAD"}
        assert server.most_open > 4


def test_states_without_head_come_from_the_first_byte():
    def plan(request: Request) -> Fault | None:
        return status(405) if request.method == "HEAD" else None

    with serving(FaultServer({"a.tar": CONTENT, "empty.tar": b""}, plan)) as server:
        states = open_storage(server.url).states(["a.tar", "empty.tar", "none.tar"])
        assert [state and state.num_bytes for state in states.values()] == [100_000, 0, None]


@pytest.mark.parametrize("number", [401, 403, 500])
def test_states_without_access_are_the_users_error(number):
    with serving(FaultServer({"a.tar": CONTENT}, always(status(number)))) as server:
        storage = open_storage(server.url, RemotePolicy(attempts=2))
        with pytest.raises(UserError, match=rf"{server.url}/a.tar.*{number}"):
            storage.states(["a.tar"])


def test_a_server_that_ignores_range_is_read_near_the_begin_only():
    content = CONTENT * 50
    server = FaultServer({"a.tar": content}, always(ignored_range))
    with serving(server), closing(open_storage(server.url, RemotePolicy(attempts=2))) as storage:
        assert storage.read("a.tar", 5000, 100) == content[5000:5100]
        assert storage.counters.num_bytes_skipped == 5000
        assert storage.read_whole("a.tar") == content
        with pytest.raises(ShardReadError, match="ignores Range, and 4900000 bytes lie before"):
            storage.read("a.tar", 4_900_000, 10)


@pytest.mark.parametrize(
    "headers, message",
    [
        ({"Content_Encoding": "gzip"}, "compressed"),
        ({"Content_Range": "bytes 0-9/*"}, "Content-Range 'bytes 0-9/\\*'"),
        ({"Content_Range": "bytes 1-10/100000"}, "holds bytes 1-10, not 0-9"),
        ({"Content_Length": "3"}, "Content-Length 3 for a range of 10 bytes"),
    ],
)
def test_an_answer_that_contradicts_the_question_is_never_used(headers, message):
    with serving(FaultServer({"a.tar": CONTENT}, always(answer_with(206, **headers)))) as server:
        storage = open_storage(server.url, RemotePolicy(attempts=2))
        with pytest.raises(ShardReadError, match=message):
            storage.read("a.tar", 0, 10)


@pytest.mark.parametrize("tag", ['W/"1"', "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_weak_tags_and_dates_pin_without_if_match(tag):
    """If-Match never matches a weak tag, so these are compared on our side."""
    name = "ETag" if tag.startswith("W") else "Last_Modified"
    tags = [tag, tag, tag.replace("1", "2")]

    def plan(request: Request) -> Fault | None:
        return answer_with(206, **{name: tags[request.number]})

    server = FaultServer({"a.tar": CONTENT}, plan, has_tags=False)
    with serving(server), closing(open_storage(server.url)) as storage:
        assert storage.read("a.tar", 0, 10) == CONTENT[:10]
        assert storage.read("a.tar", 10, 10) == CONTENT[10:20]
        assert "if-match" not in server.requests[1].headers
        with pytest.raises(ShardReadError, match="changed while it was in use: its tag is"):
            storage.read("a.tar", 20, 10)


def test_a_shard_of_another_size_than_the_index_says_is_an_error():
    with serving(FaultServer({"a.tar": CONTENT})) as server:
        storage = open_storage(server.url)
        storage.expect("a.tar", ShardState(99_999))
        with pytest.raises(ShardReadError, match="it has 100000 bytes, not 99999"):
            storage.read("a.tar", 0, 10)


def test_redirects_are_followed_with_range_but_without_foreign_credentials():
    with serving(FaultServer({"real/a.tar": CONTENT})) as other:

        def plan(request: Request) -> Fault | None:
            return redirect(f"{other.url}/real/{request.path}")

        with serving(FaultServer({}, plan)) as server:
            storage = open_storage(server.url.replace("//", "//me:secret@"))
            assert storage.read("a.tar", 3, 5) == CONTENT[3:8]
            assert storage.states(["a.tar"])["a.tar"] == ShardState(100_000, '"real/a.tar-0"')
            assert server.requests[0].headers["authorization"] == "Basic bWU6c2VjcmV0"
            assert "authorization" not in other.requests[0].headers


def test_a_ring_of_redirects_is_an_error():
    with serving(FaultServer({}, always(redirect("/x")))) as server:
        storage = open_storage(server.url)
        with pytest.raises(ShardReadError, match="more than 5 redirects"):
            storage.read("a.tar", 0, 1)


def test_queries_go_with_every_request_and_secrets_into_no_message():
    with serving(FaultServer({"p/a b.tar": CONTENT, "p/a%20b.tar": CONTENT})) as server:
        root = f"{server.url.replace('//', '//me:secret@')}/p?token=secret"
        storage = open_storage(root)
        assert storage.read("a b.tar", 0, 4) == CONTENT[:4]
        for action in (
            lambda: storage.read("c.tar", 0, 1),
            lambda: storage.read("a b.tar", 0, 1 << 40),
        ):
            with pytest.raises(ShardReadError) as caught:
                action()
            assert "secret" not in str(caught.value)
            assert f"{server.url}/p/" in str(caught.value)


def test_credentials_may_stand_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving(FaultServer({"a.tar": CONTENT})) as server:
        open_storage(server.url).read("a.tar", 0, 1)
        assert server.requests[0].headers["authorization"] == "Basic bWU6c2VjcmV0"


def silent(connection: Connection, answer: Answer, rng: random.Random) -> None:
    connection.server.stopped.wait(30)


def half_silent(connection: Connection, answer: Answer, rng: random.Random) -> None:
    connection.head(206, answer.headers)
    silent(connection, answer, rng)


@pytest.mark.parametrize(
    "fault", [status(503, Retry_After="60"), silent, half_silent], ids=["busy", "silent", "half"]
)
def test_closing_ends_a_wait_and_reading_goes_on_afterwards(fault: Fault):
    plan_of: list[Fault | None] = [fault]
    with serving(FaultServer({"a.tar": CONTENT}, lambda _: plan_of[0])) as server:
        storage = open_storage(server.url, RemotePolicy(max_wait_seconds=60))
        errors: list[str] = []

        def read() -> None:
            try:
                storage.read("a.tar", 0, 1)
            except ShardReadError as error:
                errors.append(str(error))

        thread = threading.Thread(target=read)
        thread.start()
        while storage.counters.num_requests == 0:
            time.sleep(0.01)
        time.sleep(0.1)
        storage.close()
        thread.join(timeout=3)
        assert not thread.is_alive()
        assert "reading was stopped" in errors[0]
        plan_of[0] = None
        assert storage.read("a.tar", 0, 1) == CONTENT[:1]


def write_certificate(path: Path) -> ssl.SSLContext:
    """Make a certificate for 127.0.0.1 that nobody has signed; return a server's side of it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(certificate.public_bytes(Encoding.PEM) + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def test_https_reads_from_trusted_servers_alone(tmp_path, monkeypatch):
    context = write_certificate(tmp_path / "certificate.pem")
    with serving(FaultServer({"a.tar": CONTENT}), context) as server:
        started = time.monotonic()
        storage = open_storage(server.url)
        with pytest.raises(ShardReadError, match="https://.*self.signed.*not tried again"):
            storage.read("a.tar", 0, 1)
        assert time.monotonic() - started < 10  # a second try would wait for the deadline
        assert server.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        storage = open_storage(server.url, RemotePolicy(part_bytes=9_999))
        assert storage.read("a.tar", 1, 99_998) == CONTENT[1:-1]


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    # A proxy sees the whole URL; the server here drops the first character of what it sees.
    with serving(FaultServer({"ttp://shards.invalid/a.tar": CONTENT})) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert open_storage("http://shards.invalid").read("a.tar", 3, 4) == CONTENT[3:7]


def test_nobody_listening_is_an_error_in_time():
    with serving(FaultServer({})) as server:
        url = server.url
    storage = open_storage(url, RemotePolicy(attempts=3, max_wait_seconds=0.05))
    with pytest.raises(ShardReadError, match=rf"{url}/a.tar: .*refused.*after 3 attempts"):
        storage.read("a.tar", 0, 1)
