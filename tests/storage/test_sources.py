"""What is only read: Google Cloud Storage, Azure Blob Storage, the Hugging Face Hub, each a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem

from sdbatch.engine.making.pictures import BadPicture, read_picture
from sdbatch.engine.planning import planner
from sdbatch.engine.planning.reading import check_columns, read_slices
from sdbatch.errors import InputError, ObjectNotFound, OutputError, StorageError, StoreAway
from sdbatch.prompts import InputFile, Table, changed_files, find_table, read_wildcards
from sdbatch.spec import Input, Prompt, parse_spec
from sdbatch.storage import Entry, filesystems, open_source, open_store
from sdbatch.storage.buckets import BucketFiles
from sdbatch.storage.hub import HubFiles
from tests import azure_server, hub_server
from tests.hub_server import NEW, OLD, Hub
from tests.outputs.test_outputs import picture


def eggs() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"prompt": [f"{i} eggs" for i in range(300)], "n": list(range(300))})
    pq.write_table(table, sink, row_group_size=100)
    return bytes(sink.getvalue().to_pybytes())


#: What every source holds; tables in order, and what is none.
FILES = {
    "in/a.csv": b"prompt,n\na cat,1\n",
    "in/b é.csv": b"prompt,n\na dog,2\n",
    "in/deep/c.csv": b"prompt,n\na hen,3\n",
    "in/.hidden.csv": b"prompt,n\nno,0\n",
    "eggs.parquet": eggs(),
    "p.jsonl": b'{"prompt": "a cow"}\n',
    "init.png": picture(0).data,
    "words/animal.txt": b"a yak\n",
    "README.md": b"# a data set\n",
}


@dataclass
class Place:
    """A source's root, and how its files are changed."""

    uri: str
    put: Callable[[str, bytes], None]


@pytest.fixture(scope="module")
def gcs() -> Iterator[Place]:
    """An emulator from the package index, with the storage API's JSON. In this process it would wait for an interpreter
    that waits for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    at, command = f"127.0.0.1:{port}", [sys.executable, "-m", "gcp_storage_emulator", "start", "--in-memory", "--quiet"]
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port), "--default-bucket", "bucket"])
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline, "the emulator does not start"
            time.sleep(0.05)
        files = pa.fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=at, project_id="p")

        def put(key: str, data: bytes) -> None:
            with files.open_output_stream(f"bucket/root/{key}") as stream:
                stream.write(data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://{at}")
            yield Place("gs://bucket/root", put)
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def azure() -> Iterator[Place]:
    blobs: azure_server.Blobs = {"container": {}}

    def put(key: str, data: bytes) -> None:
        blobs["container"][f"root/{key}"] = data

    with azure_server.serving(blobs) as connection, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        yield Place("az://container/root", put)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Place]]:
    folder = tmp_path_factory.mktemp("dataset")

    def put(key: str, data: bytes) -> None:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)

    known = {"datasets/studio/prompts": {"main": NEW, "v1": OLD, "refs%2Fpr%2F3": OLD}}
    hub = Hub(known, {("datasets/studio/prompts", NEW): folder, ("datasets/studio/prompts", OLD): folder})
    with hub_server.serving(hub), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield hub, Place("hf://datasets/studio/prompts", put)


@pytest.fixture(params=["gcs", "azure", "hub"])
def place(request: pytest.FixtureRequest) -> Place:
    found = request.getfixturevalue(request.param)
    place: Place = found[1] if isinstance(found, tuple) else found
    for key, data in FILES.items():
        place.put(key, data)
    return place


def tables(uri: str) -> list[str]:
    return [file.name for file in find_table(Input(uri=uri)).files]


def test_a_source_is_listed_and_read(place: Place) -> None:
    source = open_source(place.uri)
    assert {entry.key: entry.size for entry in source.list()} == {key: len(data) for key, data in FILES.items()}
    assert [entry.key for entry in source.list()] == sorted(FILES)
    assert [entry.key for entry in source.list("in/d")] == ["in/deep/c.csv"]
    assert all(source.get(key) == data for key, data in FILES.items())
    assert [source.exists(key) for key in ("in/a.csv", "in", "in/none.csv")] == [True, False, False]
    with pytest.raises(ObjectNotFound, match=r"in/none\.csv does not exist"):
        source.get("in/none.csv")
    with pytest.raises(StorageError, match="is not a key"):
        source.get("../x")
    assert list(open_source(f"{place.uri}/nowhere").list()) == []


def test_a_single_table_is_found_without_listing_what_lies_beside_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(*given: object) -> Iterator[Entry]:
        raise AssertionError("a bucket may hold millions of objects")

    monkeypatch.setattr(BucketFiles, "list", listed)
    monkeypatch.setattr(HubFiles, "list", listed)
    (file,) = find_table(Input(uri=f"{place.uri}/p.jsonl")).files
    assert (file.name, file.bytes) == ("p.jsonl", len(FILES["p.jsonl"]))


@pytest.mark.parametrize("place", ["gcs", "azure"], indirect=True)  # of a commit on the Hub there are no others
def test_a_version_tells_other_bytes(place: Place) -> None:
    source = open_source(place.uri)
    before = source.version("in/a.csv")
    assert source.version("in/a.csv") == before != source.version("p.jsonl")
    place.put("in/a.csv", b"prompt,n\na fox,1\n")
    assert open_source(f"{place.uri}/in").version("a.csv") != before


def test_files_folders_and_globs_are_found(place: Place) -> None:
    assert tables(f"{place.uri}/in/a.csv") == ["a.csv"]
    assert tables(f"{place.uri}/in") == ["a.csv", "b é.csv", "deep/c.csv"]
    assert tables(f"{place.uri}/in/*.csv") == [".hidden.csv", "a.csv", "b é.csv"]
    assert tables(f"{place.uri}/**/c.csv") == ["in/deep/c.csv"]
    with pytest.raises(InputError, match="names no table"):
        tables(f"{place.uri}/nothing")
    with pytest.raises(InputError, match=r"mixes formats: .*narrow it by a glob"):
        tables(place.uri)


def test_rows_may_start_from_pictures_beside_the_table(place: Place) -> None:
    assert read_picture("init.png", open_source(place.uri).uri, (16, 8)).shape == (8, 16, 3)
    with pytest.raises(BadPicture, match=r"none\.png does not exist"):
        read_picture("none.png", place.uri, (16, 8))


def test_a_row_is_at_fault_for_a_picture_that_it_may_not_have(hub: tuple[Hub, Place]) -> None:
    for where, told in (
        ("hf://datasets/studio/gated/a.png", "terms must be accepted"),
        ("hf://datasets/studio/none/a.png", "there is no such data set, or it is private"),
        ("hf://datasets/studio/prompts@v9/a.png", "has no such revision"),
        ("hf://studio/a.png", "should be hf://datasets/OWNER/NAME"),
        ("hf://datasets/studio/two--dashes/a.png", "Cannot have -- or"),
    ):
        with pytest.raises(BadPicture, match=told):
            read_picture(where, "/", (16, 8))


@pytest.mark.parametrize(
    ("scheme", "answer", "is_away"),
    [
        ("gs", None, True),
        ("gs", 401, True),
        ("gs", 403, False),
        ("gs", 503, True),
        ("az", None, True),
        ("az", 403, False),
        ("az", 503, True),
        ("hf", None, True),
        ("hf", 403, False),
        ("hf", 429, True),
        ("hf", 500, True),
    ],
)
def test_a_store_that_is_away_ends_the_job_and_no_row(
    scheme: str, answer: int | None, is_away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``answer``: to whatever is asked; None: nobody is there."""
    monkeypatch.setattr(filesystems, "_PATIENCE", timedelta(seconds=1))
    with answering(answer) as at:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{at}")
        monkeypatch.setenv("HF_ENDPOINT", f"http://{at}")
        monkeypatch.setenv(
            "AZURE_STORAGE_CONNECTION_STRING",
            f"AccountName=a;AccountKey={azure_server.KEY};BlobEndpoint=http://{at}/a;",
        )
        where = f"{scheme}://{f'datasets/{scheme}{answer}/name' if scheme == 'hf' else f'{scheme}{answer}'}/a.png"
        with pytest.raises(StoreAway if is_away else BadPicture, match="can't be read"):
            read_picture(where, "/", (16, 8))
        if scheme != "hf":  # whose addresses of tables say the commit
            table = Table("csv", (InputFile("a.csv", f"{where.removesuffix('.png')}.csv", 1, "1"),))
            spec = parse_spec({"name": "t", "input": {"uri": table.files[0].uri}, "output": {"uri": "out"}})
            with pytest.raises(StoreAway if is_away else InputError, match="can't be read"):
                check_columns(spec, table)


@contextmanager
def answering(status: int | None) -> Iterator[str]:
    """Where a server refuses everything with that status; with None, where none is."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status or 0)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        if status is None:
            server.server_close()
        else:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        if status is not None:
            server.shutdown()


def test_wildcards_are_read_from_there(place: Place) -> None:
    found = read_wildcards(Prompt(template="__animal__ in snow", wildcards=f"{place.uri}/words"))
    assert found.sha256 == {"animal": hashlib.sha256(b"a yak\n").hexdigest()}


def test_nothing_is_written_there(place: Place) -> None:
    with pytest.raises(StorageError, match=r"is only read from; use a folder or s3://bucket/prefix"):
        open_store(place.uri)
    spec = parse_spec({"name": "t", "input": {"uri": "x.csv"}, "output": {"uri": place.uri}})
    with pytest.raises(OutputError, match=r"output\.uri: .* is only read from"):
        planner.open_output(spec)


@pytest.mark.usefixtures("ray_here")
def test_tables_are_read_by_ray(place: Place) -> None:
    for what, expected in (
        ("in", ["a cat", "a dog", "a hen"]),
        ("p.jsonl", ["a cow"]),
        ("eggs.parquet", [f"{i} eggs" for i in range(300)]),
    ):
        spec = parse_spec({"name": "t", "input": {"uri": f"{place.uri}/{what}"}, "output": {"uri": "out"}})
        rows = [row for rows in read_slices(spec, find_table(spec.input)) for row in rows.to_pylist()]
        assert [row["prompt"] for row in rows] == expected


def test_a_table_on_the_hub_is_that_of_one_commit(hub: tuple[Hub, Place], tmp_path: Path) -> None:
    server, place = hub
    for key, data in FILES.items():
        place.put(key, data)
    found = find_table(Input(uri=f"{place.uri}/p.jsonl"))
    assert found.files[0].uri == f"hf://datasets/studio/prompts@{NEW}/p.jsonl"
    assert tables(f"{place.uri}@v1/p.jsonl") == ["p.jsonl"]
    for revision in ("v1", "refs/pr/3", "refs%2Fpr%2F3"):
        assert open_source(f"{place.uri}@{revision}").uri == f"hf://datasets/studio/prompts@{OLD}"
        assert tables(f"{place.uri}@{revision}/in/a.csv") == ["a.csv"]
    with pytest.raises(InputError, match="mixes formats"):
        tables(f"{place.uri}@refs/pr/3")

    # A commit later: another file there is no change, another table is, and what was planned is still to be had.
    later = tmp_path / "later"
    later.mkdir()
    (later / "p.jsonl").write_bytes(FILES["p.jsonl"])
    (later / "new.txt").write_bytes(b"x")
    server.folders["datasets/studio/prompts", "2" * 40] = later
    server.revisions["datasets/studio/prompts"]["main"] = "2" * 40
    try:
        before = json.loads(json.dumps([file.told() for file in found.files]))
        assert changed_files(before, find_table(Input(uri=f"{place.uri}/p.jsonl"))) == []
        (later / "p.jsonl").write_bytes(b'{"prompt": "a bull"}\n')
        server.folders["datasets/studio/prompts", "3" * 40] = later
        server.revisions["datasets/studio/prompts"]["main"] = "3" * 40
        (told,) = changed_files(before, find_table(Input(uri=f"{place.uri}/p.jsonl")))
        assert told.endswith(f"what was planned is hf://datasets/studio/prompts@{NEW}/p.jsonl)")
        assert changed_files(before, find_table(Input(uri=f"{place.uri}@{NEW}/p.jsonl"))) == []
    finally:
        server.revisions["datasets/studio/prompts"]["main"] = NEW


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("hf://datasets/studio/none/p.csv", "there is no such data set, or it is private"),
        ("hf://datasets/studio/gated/p.csv", r"accepted at https://huggingface\.co/datasets/studio/gated"),
        ("hf://datasets/studio/prompts@v9/p.csv", "has no such revision"),
        ("hf://studio/prompts/p.csv", r"should be hf://datasets/OWNER/NAME, and @REVISION and /path"),
        ("hf://datasets/studio", r"should be hf://datasets/OWNER/NAME"),
        ("gs://", "names no bucket; write gs://bucket/prefix"),
        ("ftp://host/p.csv", "nothing of that kind is read; use a path, s3://…, gs://…, az://…, hf://…"),
    ],
)
def test_what_can_not_be_read_is_told_with_its_field(uri: str, told: str, hub: tuple[Hub, Place]) -> None:
    with pytest.raises(InputError, match=rf"input\.uri: .*{told}"):
        find_table(Input(uri=uri))


def test_azure_needs_an_account_and_a_key_that_fits(azure: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    azure.put("p.jsonl", FILES["p.jsonl"])
    connection = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection.replace(azure_server.KEY, "QSB3cm9uZyBrZXk="))
    with pytest.raises(StoreAway, match=r"input\.uri: .*AuthenticationFailed") as refused:
        tables(f"{azure.uri}/p.jsonl")
    assert "QSB3cm9uZyBrZXk=" not in str(refused.value)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    with pytest.raises(InputError, match="set AZURE_STORAGE_ACCOUNT"):
        tables(f"{azure.uri}/p.jsonl")


@pytest.mark.parametrize("signature", ["sv=2024-11-04&sig=a%2Fsecret%3D", "?sv=2024-11-04&sig=a%2Fsecret%3D"])
def test_azure_reads_with_a_shared_access_signature(signature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with azure_server.serving({"container": {"p.csv": b"prompt\na cat\n"}}, signature) as connection:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        assert open_source("az://container").get("p.csv") == b"prompt\na cat\n"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection.replace(signature, ""))
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", signature)
        assert open_source("az://container").get("p.csv") == b"prompt\na cat\n"


@pytest.mark.parametrize("signature", ["sig=a%2Fsecret%3D", "?sig=a%2Fsecret%3D"])
def test_no_error_tells_a_shared_access_signature(signature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with azure_server.serving({"container": {"p.csv": b"prompt\na cat\n"}}, "sig=another") as connection:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection.replace("sig=another", signature))
        with pytest.raises(StorageError, match="AuthenticationFailed") as refused:
            open_source("az://container").get("p.csv")
        assert "secret" not in str(refused.value)
        file = InputFile("p.csv", "az://container/p.csv", 14, "1")
        spec = parse_spec({"name": "t", "input": {"uri": file.uri}, "output": {"uri": "out"}})
        with pytest.raises(StoreAway, match="AuthenticationFailed") as refused:
            check_columns(spec, Table("csv", (file,)))
        assert "secret" not in str(refused.value)


def test_no_error_of_the_hub_tells_a_signed_address(hub: tuple[Hub, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    hub[1].put("p.jsonl", FILES["p.jsonl"])
    source = open_source(hub[1].uri)

    def refused(*given: object) -> bytes:
        raise OSError("403 Forbidden for url 'https://cdn.example/p?X-Amz-Signature=secret'; try again")

    monkeypatch.setattr(HfFileSystem, "cat_file", refused)
    with pytest.raises(StorageError, match=r"for url 'https://cdn\.example/p'; try again"):
        source.get("p.jsonl")
