"""What a table, spec, picture or checkpoint of a stranger holds stays data: it never escapes, runs or crashes."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import resource
import struct
import tarfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from sdbatch.diffusion import weights
from sdbatch.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from sdbatch.diffusion.weights import Weights, skeletons
from sdbatch.engine.making.pictures import BadPicture, read_picture
from sdbatch.errors import ModelError, SpecError
from sdbatch.spec import load_spec
from sdbatch.storage import Store, open_store
from tests.conftest import CommandLine
from tests.report.reading import read_report
from tests.s3_server import ACCESS_KEY, SECRET_KEY

Write = Callable[..., Path]


@contextmanager
def megabytes(count: int) -> Iterator[None]:
    """No more memory than this beyond what the process has: who asks for it gets an error."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (count << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# -- tables ---------------------------------------------------------------------------------------------------

IDS = [
    "../../x",
    "..",
    "a/b",
    "a\\b",
    "a?b",
    "/etc/passwd",
    "C:\\x",
    "~",
    "-rf",
    ".",
    "nul\0nul",
    "l" * 300,
    "h" * 100_000,
    "\u202egnp.exe",
    "zero\u200bwidth",
    "line\nbreak\r\ttab",
    "\x1b[31mred\x1b]0;title\x07",
    "\x9b31m",
    "[red]rich[/red]",
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</style></title><b>",
    "{{ 7 * 7 }}{% raw %}",
    "=cmd|' /C calc'!A0",
    "CON",
    "aux.txt",
    "Case",
    "case",
    unicodedata.normalize("NFC", "é"),
    unicodedata.normalize("NFD", "é"),
    "🟥" * 50,
    "\ufeff",
]
COLUMNS = ["__proto__", "<b>", "c" * 1000, "new\nline", "../x", "\u202eltr", "\x1b[2J", "image/..", "kept"]
FAULTY = ["\x1b[31mfault\u202e", "<i>fault</i>"]


def write_table(folder: Path) -> None:
    rows: list[dict[str, Any]] = [{"name": name, "prompt": name[:500].replace("\0", "")} for name in IDS]
    rows += [{"name": name, "prompt": ""} for name in FAULTY]
    with (folder / "prompts.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps(row | dict.fromkeys(COLUMNS, row["name"][:1000])) + "\n")
        file.write('{"name": "lone \\ud800", "prompt": "lone \\udfff"}\n')


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def control_characters(text: str) -> set[str]:
    return {char for char in text if char != "\n" and unicodedata.category(char) in {"Cc", "Cf"}}


class Page(HTMLParser):
    """Elements, their attributes, and all text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: set[tuple[str, str]] = set()
        self.sources: list[str] = []
        self.policies: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes |= {(tag, name) for name, _ in attrs}
        given = dict(attrs)
        self.sources += [given["src"] or ""] if "src" in given else []
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policies.append(given["content"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def refuse_markup(page: Page) -> None:
    assert not page.elements.keys() & {"iframe", "object", "embed", "form", "base", "a", "svg", "i", "b", "img"}
    assert page.elements["script"] == 4  # the summary, the rows, the thumbnails, and the page's own
    assert (page.elements["ul"], page.elements["li"], page.elements["title"], page.elements["h1"]) == (1, 0, 1, 1)
    assert page.attributes <= {
        *(("meta", name) for name in ("charset", "name", "content", "http-equiv")),
        *(("script", name) for name in ("type", "id")),
        *(("link", name) for name in ("rel", "href")),
        *((name, "id") for name in ("p", "ul", "div", "section", "dialog", "button", "input")),
        *((name, "hidden") for name in ("p", "div", "section")),
        *((name, "aria-label") for name in ("section", "ul", "dialog", "button", "input")),
        *((name, "type") for name in ("button", "input")),
        *(("input", name) for name in ("placeholder", "autocomplete", "spellcheck")),
        ("html", "lang"),
        ("p", "class"),
        ("p", "aria-live"),
        ("button", "title"),
    }
    assert page.sources == []
    (policy,) = page.policies
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]{44}'", rules.pop("script-src"))
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]{44}'", rules.pop("style-src"))
    assert rules == {"img-src": "'self' file: data:"}


def test_ids_and_columns_never_become_paths_markup_or_orders_to_a_terminal(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    write_table(tmp_path)
    before, parent = everything_in(tmp_path), set(os.listdir(tmp_path.parent))
    for form in ("images", "webdataset", "parquet"):
        job = write_job(
            input={"uri": str(tmp_path / "prompts.jsonl"), "columns": {"id": "name"}, "keep": COLUMNS},
            generate={"num_inference_steps": 1, "width": 32, "height": 32},
            output={"uri": str(tmp_path / form), "format": form, "shard_size": 64},
            resources={"batch_size": 16},
        )
        told = sdbatch("run", job, code=3).stderr
        assert sdbatch.json("verify", form)["ok"]
        rows = {row["image_id"]: row for row in pq.read_table(tmp_path / form / "metadata").to_pylist()}
        assert rows.keys() == {f"{name}-0" for name in [*IDS, *FAULTY, "lone ?"]}
        for name in IDS:
            row = rows[f"{name}-0"]
            assert (row["row_id"], row["status"]) == (name, "committed")
            assert all(row[column] == name[:1000] for column in COLUMNS)
        for key in [entry.key for entry in open_store(str(tmp_path / form)).list()]:
            assert re.fullmatch(r"[A-Za-z0-9_./-]+", key)
            assert all(len(part) < 200 for part in key.split("/"))
        sdbatch("report", form)
        refuse_markup(Page((tmp_path / form / "report.html").read_bytes().decode()))
        _, shown, thumbnails = read_report(tmp_path / form / "report.html")
        assert {row["image_id"] for row in shown} == rows.keys()
        assert sum(map(bool, thumbnails)) == len(IDS) + 1
        told += sdbatch("errors", form).stderr + sdbatch("status", form).stderr
        assert control_characters(told) == set()
    assert everything_in(tmp_path) - before - {"job.yaml"} == {
        name for name in everything_in(tmp_path) if name.split("/")[0] in {"images", "webdataset", "parquet"}
    }
    assert set(os.listdir(tmp_path.parent)) == parent

    with tarfile.open(tmp_path / "webdataset/data/0000000.tar") as archive:
        members = archive.getmembers()
        assert all(
            member.isfile() and re.fullmatch(r"0000000-\d{5}\.(png|json|txt)", member.name) for member in members
        )
        described = [json.load(archive.extractfile(m) or io.BytesIO()) for m in members if m.name.endswith(".json")]
    assert {row["row_id"] for row in described} == {*IDS, "lone ?"}

    # Ids that look alike once they are safe have their places in the names: no two share a file, whatever its case.
    files = [path.name for path in (tmp_path / "images/data/0000000").glob("*.png")]
    assert len({name.casefold() for name in files}) == len(files) == len(IDS) + 1
    assert len({name.partition("-")[2] for name in files if re.fullmatch(r"\d+-a_b-0\.png", name)}) == 1
    paths = [row["path"] for row in rows.values() if row["status"] == "committed"]
    assert len(set(paths)) == len(paths)
    for path in (tmp_path / "images/data/0000000").glob("*.png"):
        path.unlink()
    told = sdbatch("verify", "images", code=1).stderr
    assert "33 missing" in told
    assert control_characters(told) == set()


# -- specs ----------------------------------------------------------------------------------------------------

SPEC = "name: a\ninput: {uri: p.csv}\noutput: {uri: out}\n"
LETTERS = "abcdefghij"
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in itertools.pairwise(LETTERS)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 10)}]}}\n" for old, new in itertools.pairwise(LETTERS)
)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (LAUGHS, "has more than 20,000 parts, in line 5"),
        (MERGED, "has more than 20,000 parts, in line 5"),
        ("a: &a [*a]", "'a' is a part of itself"),
        ("[" * 10_000, "is nested more than 20 levels deep"),
        ("a: " + "{b: " * 10_000, "is nested more than 20 levels deep"),
        ("- " * 10_000, "is nested more than 20 levels deep"),
        (
            "name: !!python/object/apply:os.system ['touch ran']",
            "tag 'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        (f"{SPEC}name: b\n", "the key 'name' is there twice, in line 4, column 1"),
        ("name: a\ninput: {uri: x, uri: y}", "the key 'uri' is there twice, in line 2, column 17"),
        (f"{SPEC}1: x\n", "the key '1' is no text; put it in quotes"),
        (f"{SPEC}[a]: x\n", "the key list is no text"),
        (f"name: {'9' * 5000}", "9…' is no 'int', in line 1"),
        (f"name: 0x{'f' * 50_000}", "name: is a number of more than 100 digits"),
        ("name: 2024-99-99", "'2024-99-99' is no 'timestamp'"),
        ("name: !!bool x", "'x' is no 'bool'"),
        ('name: "\\ud800"', r"name: is '\ud800'"),
        ('"\\e[31m": 1', "�[31m: no such field"),
        ("\0\1\2", "unacceptable character"),
        (bytes(range(256)), "can't be read: 'utf-8' codec can't decode"),
    ],
)
def test_a_hostile_spec_is_one_clear_error(content: str | bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with megabytes(256), pytest.raises(SpecError) as caught:
        load_spec(path)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert control_characters(str(caught.value)) == set()
    assert os.listdir(tmp_path) == ["job.yaml"]


def test_a_spec_of_100_megabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "job.yaml").open("wb") as file:
        file.truncate(100_000_000)
    with megabytes(64), pytest.raises(SpecError, match="has more than 100,000 bytes"):
        load_spec(tmp_path / "job.yaml")
    with megabytes(64), pytest.raises(SpecError, match="has more than 100,000 bytes"):
        load_spec("/dev/zero")


def test_overrides_are_read_as_carefully_as_the_spec(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(SPEC)
    for override, told in (
        ("generate.seed=" + "[" * 10_000, "is nested more than 20 levels deep"),
        ("generate.seed=" + LAUGHS, "has more than 20,000 parts"),
        ("generate={seed: 1, seed: 2}", "the key 'seed' is there twice"),
        ("generate.seed=!!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("generate.seed=2024-99-99", "is no 'timestamp'"),
        ("\x1b[31m=1", "no such field"),
        ("\x1b[31m", "should read field.path=value"),
        (".".join("a" * 10_000) + "=1", "a: no such field"),
    ):
        with megabytes(256), pytest.raises(SpecError, match=re.escape(told)) as caught:
            load_spec(path, [override])
        assert len(str(caught.value)) < 1000
        assert control_characters(str(caught.value)) == set()


def test_anchors_and_merges_stay_allowed(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    text = "model: {loras: [&l {uri: a.safetensors}, {<<: *l, weight: 0.5}, *l]}"
    path.write_text(f"{SPEC}{text}\n")
    loras = load_spec(path).model.loras
    assert [(lora.uri, lora.weight) for lora in loras] == [("a.safetensors", w) for w in (1.0, 0.5, 1.0)]


# -- pictures -------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def forged_png(width: int, height: int, pixels: bytes = b"", *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def test_hostile_pictures_are_refused_with_their_names(tmp_path: Path) -> None:
    def save(name: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)

    Image.new("RGB", (64, 64), "red").save(tmp_path / "good.png")
    save("claims.png", forged_png(100_000, 100_000))
    save("long.png", forged_png(60_000_000, 1, zlib.compress(bytes(60_000_001), 9)))
    save("text.png", forged_png(1, 1, zlib.compress(b"\0\0"), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8)))))
    save("cut.png", (tmp_path / "good.png").read_bytes()[:-30])
    for form in ("GIF", "TIFF", "EPS"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / "other.png", form)
        (tmp_path / "other.png").rename(tmp_path / f"{form}.png")
    save("svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    save("empty.png", b"")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(10 << 30)
    unread = "should be a path, or begin with s3://…, gs://…, az://…, hf://…; nothing else is read"
    for where, told in (
        ("claims.png", "has more pixels than are read"),
        ("long.png", "has 60000000x1 pixels, more than are read"),
        ("text.png", "can be read: Decompressed data too large"),
        ("cut.png", "can be read: image file is truncated"),
        *((f"{form}.png", "is no PNG, JPEG or WebP picture") for form in ("GIF", "TIFF", "EPS", "svg")),
        ("empty.png", "is empty"),
        ("/proc/self/environ", "is empty"),
        ("/etc/passwd", "/etc/passwd is no PNG, JPEG or WebP picture that can be read"),
        ("pipe.png", "is no file"),
        (f"file://{tmp_path}/pipe.png", "is no file"),
        ("device.png", "is no file"),
        ("loop.png", "does not exist"),
        ("large.png", "has 10,737,418,240 bytes, more than are read"),
        ("x" * 5000, "can't be read: File name too long"),
        *((where, unread) for where in ("http://user:word@host/x.png", "https://169.254.169.254/", "ftp://h/x", "://")),
        *((where, unread) for where in ("s3://", "s3://b", "s3://../../etc/passwd", "file://../x", "a://b://c")),
    ):
        with megabytes(512), pytest.raises(BadPicture, match=re.escape(told)) as caught:
            read_picture(where, str(tmp_path), (64, 64))
        assert str(caught.value).startswith("init_image: ")
        assert "0x7" not in str(caught.value)  # no address in memory: every run says the same
        assert "word" not in str(caught.value)


def test_a_small_file_of_many_pixels_is_read_in_bounded_memory(tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(forged_png(8000, 7500, zlib.compress(bytes(7500 * 8001), 9)))
    with megabytes(1024):
        assert read_picture("wide.png", str(tmp_path), (64, 64)).shape == (64, 64, 3)


def test_rows_name_pictures_anywhere_the_workers_may_read(tmp_path: Path) -> None:
    """By design: a spec that maps init_image lets its rows name files. Only pictures come of it."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "good.png")
    (tmp_path / "table").mkdir()
    (tmp_path / "table/link.png").symlink_to(tmp_path / "good.png")
    for where in ("../good.png", str(tmp_path / "good.png"), f"file://{tmp_path}/good.png", "link.png"):
        assert read_picture(where, str(tmp_path / "table"), (8, 8))[0, 0].tolist() == [255, 0, 0]


# -- checkpoints ----------------------------------------------------------------------------------------------


def forged(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str = "F32", shape: tuple[int, ...] = (1,), offsets: tuple[int, int] = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ONE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
MANY = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(40_000))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(forged(b"{}", length=2**63), id="a header of 2^63 bytes"),
        pytest.param(forged(b"{}", length=1000), id="a header beyond the file"),
        pytest.param(forged({"a": tensor(), "b": tensor()}, bytes(4)), id="overlapping tensors"),
        pytest.param(forged({"a": tensor(offsets=(0, 4000))}, bytes(4)), id="a tensor beyond the file"),
        pytest.param(forged({"a": tensor(offsets=(4, 0))}, bytes(4)), id="a tensor of negative length"),
        pytest.param(forged({"a": tensor("Q17")}, bytes(4)), id="an unknown dtype"),
        pytest.param(forged({"a": tensor(shape=(2**62, 2**62))}, bytes(4)), id="a shape that overflows"),
        pytest.param(forged({"a": tensor(shape=(-1,))}, bytes(4)), id="a negative dimension"),
        pytest.param(forged(b"{" + ONE + b"," + ONE.replace(b"0,4", b"4,8") + b"}", bytes(8)), id="a tensor twice"),
        pytest.param(forged(b"{" + b" " * 100_000_000 + ONE + b"}", bytes(4)), id="a header of 100 MB"),
        pytest.param(forged(b"{" + MANY + b"}"), id="40,000 tensors"),
        pytest.param(forged(b"[" * 100_000), id="a deep header"),
        pytest.param(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.", id="a pickle"),
        pytest.param(b"PK\x03\x04" + bytes(100), id="a zip"),
        pytest.param(b"\1\2", id="two bytes"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_a_forged_weight_file_is_an_error_with_its_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with megabytes(128), pytest.raises(ModelError, match=r"m\.safetensors"):
        Weights([path])
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_shapes_without_end_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(forged({"a": tensor(shape=(2**62, 0), offsets=(0, 0))}))
    with megabytes(128):
        assert Weights([path]).shapes == {"a": (2**62, 0)}


def test_networks_without_end_are_refused_before_memory_is_taken() -> None:
    small = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 1, "max_position_embeddings": 77}
    with megabytes(512):
        for change in ({"num_hidden_layers": 10**9}, {"vocab_size": 10**30}):
            with pytest.raises(ModelError, match="no network can be built as its config says"), skeletons():
                TextEncoder(TextEncoderConfig(**{**small, **change}))
        with skeletons():  # wide alone costs nothing: no file has weights that fit
            encoder = TextEncoder(TextEncoderConfig(**{**small, "hidden_size": 10**9}))
    assert all(value.is_meta for value in encoder.state_dict().values())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("most", range(100, 110))
def test_a_network_refused_at_any_layer_leaves_torch_as_it_was(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_MOST_TENSORS", most)
    config = TextEncoderConfig(hidden_size=64, intermediate_size=64, num_attention_heads=1, num_hidden_layers=10**9)
    with pytest.raises(ModelError, match="more layers"), skeletons():
        TextEncoder(config)
    assert torch.is_grad_enabled()


# -- secrets --------------------------------------------------------------------------------------------------


def texts_of(store: Store) -> Iterator[tuple[str, str]]:
    for entry in store.list():
        data = store.get(entry.key)
        yield entry.key, data.decode("latin-1")
        if entry.key.endswith(".parquet"):
            yield entry.key, str(pq.read_table(io.BytesIO(data)).to_pylist())


def test_credentials_are_in_nothing_that_a_job_leaves_behind(
    sdbatch: CommandLine, write_job: Write, tmp_path: Path, bucket: str
) -> None:
    store = open_store(f"s3://{bucket}/out")
    open_store(f"s3://{bucket}").put("p.csv", b"prompt\na red circle\n\na blue ring\n")
    job = write_job(input={"uri": f"s3://{bucket}/p.csv"}, output={"uri": store.uri})
    ended = [sdbatch(command, job) for command in ("validate", "plan", "run")]
    ended += [sdbatch(command, store.uri) for command in ("status", "watch", "verify", "errors", "report")]
    ended.append(sdbatch("run", write_job(output={"uri": "s3://no-such-bucket/x"}), code=2))
    told = [(f"command {i}", end.stdout + end.stderr) for i, end in enumerate(ended)]
    node: Any = ray._private.worker._global_node
    logs = Path(node.get_logs_dir_path())
    told += [(str(path), path.read_text(errors="replace")) for path in logs.rglob("*") if path.is_file()]
    told += texts_of(store)
    assert len(told) > 20
    for where, text in told:
        assert SECRET_KEY not in text, where
        assert ACCESS_KEY not in text, where


@pytest.mark.parametrize("uri", ["s3://key:hunter2@bucket/x", "https://user:hunter2@host/x", "s3://hunter2@bucket"])
def test_credentials_in_a_spec_are_refused_and_not_repeated(
    uri: str, sdbatch: CommandLine, write_job: Write, tmp_path: Path
) -> None:
    for section in (
        {"input": {"uri": uri}},
        {"output": {"uri": uri}},
        {"model": {"uri": uri}},
        {"model": {"tokenizer": uri}},
        {"model": {"loras": [{"uri": uri}]}},
        {"model": {"embeddings": [{"uri": uri}]}},
    ):
        ended = sdbatch("validate", write_job(**section), "--json", code=2)
        assert "holds credentials, which don't belong in a job spec" in ended.stderr
        assert "hunter2" not in ended.stdout + ended.stderr
    assert not (tmp_path / "out").exists()
