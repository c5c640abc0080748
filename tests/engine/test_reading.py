"""Tables of every format through Ray Data: order, text, faults and clear errors."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.engine.planning import reading
from sdbatch.engine.planning.reading import Row, read_slices
from sdbatch.errors import InputError
from sdbatch.prompts import find_table
from sdbatch.spec import Input, JobSpec, parse_spec

ROWS = 40_000  # more than two slices


pytestmark = pytest.mark.usefixtures("ray_here")


def job(uri: Path | str, **settings: object) -> JobSpec:
    return parse_spec({"name": "test", "input": {"uri": str(uri), **settings}, "output": {"uri": "out"}})


def read(uri: Path | str, **settings: object) -> list[list[Row]]:
    spec = job(uri, **settings)
    return [rows.to_pylist() for rows in read_slices(spec, find_table(spec.input))]


def prompts(slices: list[list[Row]]) -> list[str | None]:
    return [row["prompt"] for rows in slices for row in rows]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "txt", "parquet"])
def test_rows_keep_their_order_and_their_text(form: str, tmp_path: Path) -> None:
    texts = [f"{i:05d} a “cat”, it's 100% \\ fine" for i in range(ROWS)]
    path = tmp_path / f"p.{form}"
    if form == "parquet":
        pq.write_table(pa.table({"prompt": texts}), path, row_group_size=7000)
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    elif form == "csv":
        path.write_text("prompt\n" + "".join(f'"{text}"\n' for text in texts))
    else:
        path.write_text(("prompt\n" if form == "tsv" else "") + "".join(f"{text}\n" for text in texts))
    slices = read(path)
    assert [len(rows) for rows in slices] == [16_384, 16_384, ROWS - 2 * 16_384]
    assert prompts(slices) == texts


@pytest.mark.parametrize("name", ["line", "fault", "row", "keep:prompt", "__index__"])
def test_a_column_may_have_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(f"{name},prompt\n7,a cat\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(json.dumps({name: "7", "prompt": "a cat"}) + "\n", encoding="utf-8")
    pq.write_table(pa.table({name: ["7"], "prompt": ["a cat"]}), tmp_path / "p.parquet")
    for form in ("csv", "jsonl", "parquet"):
        ((row,),) = read(tmp_path / f"p.{form}", columns={"id": name}, keep={"mine": name})
        assert row == {"prompt": "a cat", "id": "7", "keep:mine": "7", "fault": None}


def test_a_folder_is_read_in_the_order_of_names_and_a_glob_chooses(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.csv").write_text(f"prompt\n{name}1\n{name}2\n")
    (tmp_path / "_skipped.csv").write_text("prompt\nno\n")
    (tmp_path / "notes.md").write_text("no table")
    assert prompts(read(tmp_path)) == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert prompts(read(f"{tmp_path}/[bc].csv")) == ["b1", "b2", "c1", "c2"]
    assert prompts(read(tmp_path, limit=3)) == ["a1", "a2", "b1"]


def test_csv_quotes_and_newlines_and_tsv_without_quoting(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,n\n"say ""hi"", twice\non two lines",007\n')
    assert read(tmp_path / "a.csv", columns={"id": "n"}) == [
        [{"prompt": 'say "hi", twice\non two lines', "id": "007", "fault": None}]
    ]
    (tmp_path / "a.tsv").write_text('prompt\tn\n"G I G G L E" painted on a wall\t1\n')
    assert prompts(read(tmp_path / "a.tsv")) == ['"G I G G L E" painted on a wall']


def test_numbers_of_any_type_become_text(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"prompt": ["a", "b"], "s": [2**62, None], "g": [7.5, float("nan")]}), tmp_path / "p.parquet"
    )
    (rows,) = read(tmp_path, columns={"seed": "s", "guidance_scale": "g"})
    assert rows[0] == {"prompt": "a", "seed": str(2**62), "guidance_scale": "7.5", "fault": None}
    assert (rows[1]["seed"], rows[1]["guidance_scale"]) == (None, None)


def test_a_bad_line_is_a_fault_of_its_row_alone(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": "a"}',
        b"{oops",
        b"[1, 2]",
        b'{"prompt": "\\ud800"}',
        b'{"other": 1}',
        b'{"prompt": "caf\xe9"}',
    ]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    (rows,) = read(tmp_path / "p.jsonl")
    assert rows[0] == {"prompt": "a", "fault": None}
    assert "is not JSON" in str(rows[1]["fault"])
    assert rows[2]["fault"] == "is not a JSON object"
    assert rows[3]["prompt"] == "?"
    assert rows[4] == {"prompt": None, "fault": None}
    assert rows[5]["fault"] is not None


def test_a_row_that_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"prompt\nfine\ncaf\xe9\n")
    (rows,) = read(tmp_path / "p.csv")
    assert rows[0]["fault"] is None
    assert rows[1]["fault"] == "prompt is not UTF-8 text"


def test_decimals_and_dates_become_plain_text(tmp_path: Path) -> None:
    table = {"prompt": ["a"], "w": [decimal.Decimal(512)], "day": [datetime.date(2024, 1, 2)], "ok": [True]}
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    (rows,) = read(tmp_path / "p.parquet", columns={"width": "w"}, keep=["day", "ok"])
    assert rows == [{"prompt": "a", "width": "512", "keep:day": "2024-01-02", "keep:ok": "true", "fault": None}]


def test_every_field_of_a_text_table_is_the_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (rows,) = read(tmp_path / "p.txt", keep={"line": "prompt"})
    assert [row["keep:line"] for row in rows] == ["one", "two"]


def test_tables_on_s3(bucket: str) -> None:
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="in/b.csv", Body=b"prompt\nb\n")
    client.put_object(Bucket=bucket, Key="in/a.csv", Body=b"prompt\na\n")
    assert prompts(read(f"s3://{bucket}/in")) == ["a", "b"]
    assert prompts(read(f"s3://{bucket}/in/*.csv")) == ["a", "b"]
    assert prompts(read(f"s3://{bucket}/in/b.csv")) == ["b"]
    for folder in ("in/", "in/more/"):  # as S3's console makes them
        client.put_object(Bucket=bucket, Key=folder)
    for uri in ("in/*", "in/**", "in", "**/*"):
        found = find_table(Input(uri=f"s3://{bucket}/{uri}")).files
        assert [file.uri for file in found] == [f"s3://{bucket}/in/a.csv", f"s3://{bucket}/in/b.csv"]
    with pytest.raises(InputError, match="names no table"):
        read(f"s3://{bucket}/none")


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"input\.uri: .*/none\.csv names no table; check the path"):
        read(tmp_path / "none.csv")
    (tmp_path / "p.csv").write_text("text,Note\na,b\n")
    with pytest.raises(
        InputError, match=r"input\.columns\.prompt: p\.csv has no column 'prompt'; it has: 'text', 'Note'"
    ):
        read(tmp_path / "p.csv")
    with pytest.raises(InputError, match=r"input\.keep: c: p\.csv has no column 'c'"):
        read(tmp_path / "p.csv", columns={"prompt": "text"}, keep=["c"])
    (tmp_path / "p.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"p\.parquet can't be read as parquet"):
        read(tmp_path / "p.parquet")
    with pytest.raises(InputError, match=r"mixes formats: p\.csv"):
        read(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n{"text": "b", "n": 1}\n')
    with pytest.raises(InputError, match=r"p\.jsonl has no column 'prompt'; it has: 'text', 'n'"):
        read(tmp_path / "p.jsonl")
    (tmp_path / "twice.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(InputError, match=r"twice\.csv has 2 columns 'prompt'; rename all but one"):
        read(tmp_path / "twice.csv")
    (tmp_path / "latin.csv").write_bytes("prompt,gr\u00f6\u00dfe\na,1\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"latin\.csv can't be read as csv"):
        read(tmp_path / "latin.csv")
    with pytest.raises(InputError, match="is no pattern"):
        read(tmp_path / "[z-a].csv")
    (tmp_path / "p.dat").write_text("x")
    with pytest.raises(InputError, match=r"p\.dat: the ending tells no format; set input\.format"):
        read(tmp_path / "p.dat")
    (tmp_path / "ragged.csv").write_text("prompt,n\na,1\nb,2,3\n")
    with pytest.raises(InputError, match=r"ragged\.csv.*Expected 2 columns, got 3: b,2,3"):
        read(tmp_path / "ragged.csv")


def test_slices_may_be_cut_as_they_were_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reading, "SLICE_ROWS", 4)
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("prompt\n" + "".join(f"{name}{i}\n" for i in range(7)))
    spec = job(tmp_path)
    slices = list(read_slices(spec, find_table(spec.input), planned=[4, 1, 2]))
    assert [len(rows) for rows in slices] == [4, 1, 2, 4, 3]
    assert pa.concat_tables(slices).column("prompt").to_pylist() == [f"{name}{i}" for name in "ab" for i in range(7)]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "txt"])
def test_a_row_without_end_is_refused_with_its_file(form: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{form}").write_text({"jsonl": '{"prompt": "a"}\n', "txt": "a\n"}.get(form, "prompt\na\n"))
    long = "x" * 50_000_000
    text = json.dumps({"prompt": long}) if form == "jsonl" else long if form == "txt" else f"prompt\n{long}"
    (tmp_path / f"b.{form}").write_text(f"{text}\n")
    for uri in (tmp_path, tmp_path / f"b.{form}"):
        with pytest.raises(InputError, match=rf"b\.{form}.*a row has more than 8 MiB; shorten it"):
            read(uri)


@pytest.mark.parametrize("form", ["csv", "jsonl", "txt"])
def test_a_compressed_file_is_told_from_a_table(form: str, tmp_path: Path) -> None:
    (tmp_path / f"b.{form}").write_bytes(gzip.compress(b"prompt\na\n"))
    with pytest.raises(InputError, match=rf"b\.{form} is compressed \(gzip\); unpack it"):
        read(tmp_path / f"b.{form}")


@pytest.mark.parametrize("lie", ["length", "footer", "data"])
def test_a_parquet_file_that_lies_about_itself_is_refused(lie: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [f"prompt {i}" for i in range(100)]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    forged = {
        "length": whole[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1",
        "footer": whole[:footer] + b"\xff" * 32 + whole[footer + 32 :],
        "data": whole[:4] + bytes(200) + whole[204:],
    }
    (tmp_path / "b.parquet").write_bytes(forged[lie])
    with pytest.raises(InputError, match=r"b\.parquet"):
        read(tmp_path)
