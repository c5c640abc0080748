"""The report in a real browser: it opens from a disk and from a server, is searched, filtered, looked through."""

from __future__ import annotations

import json
import re
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from sdbatch.ledger import CommitRecord
from sdbatch.outputs import read_pictures
from sdbatch.outputs.metadata import COLUMNS
from sdbatch.report import Report, page, write_report
from sdbatch.report.columns import OURS, distributions, filters
from sdbatch.report.columns import text as shown
from sdbatch.report.timeline import timeline
from sdbatch.storage import LocalStore
from tests.browser import CHROMIUM, Opened, opened
from tests.ledger.planned import Planned

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; 'make test' installs it by apt-get")

#: What a card's text is, of the cards that are on the screen.
CARDS = "[...document.querySelectorAll('.card span')].map((card) => card.textContent)"
COUNT = "document.getElementById('count').textContent"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write(folder: Path, form: str = "images", limit: int = 1000) -> Report:
    """The report of a job of 30 requests: two can't be made, two failed, one is still to be told of."""
    planned = Planned(LocalStore(folder), form, slices=3)
    for shard in planned.shards[:-1]:
        planned.commit(shard.number, colour=10 * shard.number, failing=(1,) if shard.number in {0, 4} else ())
    return write_report(planned.store, read_pictures, limit, lambda done, total: None)


def look_through(found: Opened) -> None:
    """Search, filter, open, go on, close: by mouse and by keys."""
    shows, do = found.until, found.page
    shows(f"{COUNT} === '29 images' && document.querySelectorAll('.frame img').length > 5")
    do.keyboard.press("/")
    do.keyboard.type("PROMPT 7")
    shows(f"{COUNT} === '3 of 29' && {CARDS}.join() === 'prompt 7,prompt 7,prompt 7'")
    do.fill("#search", "")
    do.select_option("select[title='made or not']", label="quarantined")
    shows(f"{COUNT} === '4 of 29' && document.querySelectorAll('.frame p').length === 4")
    do.select_option("select[title='made or not']", index=0)
    do.click(".reason:has-text('it failed')")
    shows(f"{COUNT} === '2 of 29'")
    do.click(".chip")
    shows(f"{COUNT} === '29 images'")
    do.keyboard.press("/")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
        do.keyboard.press(key)
    shows("document.querySelector('dialog[open] .prompt').textContent === 'prompt 2'")
    shows("document.querySelector('dialog[open] figure img').naturalWidth === 8")
    assert "seed" in do.inner_text("dialog dl")
    do.keyboard.press("ArrowLeft")
    shows("document.querySelector('dialog[open] .prompt').textContent === 'prompt 1'")
    assert "it failed" in do.inner_text("dialog dl")
    do.keyboard.press("Escape")
    shows("!document.querySelector('dialog[open]') && document.activeElement.className === 'card'")
    assert found.said == []


@in_a_browser
@pytest.mark.parametrize("form", ["images", "webdataset"])
def test_a_small_job_is_one_file_that_opens_from_anywhere(form: str, tmp_path: Path) -> None:
    written = write(tmp_path / "out", form)
    assert (written.files, written.shown) == (0, 29)
    away = tmp_path / "away.html"
    (tmp_path / "out/report.html").rename(away)
    with opened(away.as_uri(), color_scheme="dark") as found:
        if form == "webdataset":  # its pictures are inside whatever becomes of the output
            look_through(found)
        dark = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        found.page.click("#theme")
        assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


@in_a_browser
def test_a_large_job_has_files_beside_it_for_a_disk_a_server_and_a_phone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_MOST_INSIDE", 0)
    written = write(tmp_path)
    assert written.files == len(list((tmp_path / "report").iterdir())) > 1
    with opened((tmp_path / "report.html").as_uri()) as found:
        look_through(found)
    with served(tmp_path) as address, opened(f"{address}/report.html") as found:
        look_through(found)
        found.page.set_viewport_size({"width": 390, "height": 844})
        wide = "document.documentElement.scrollWidth > innerWidth"
        found.until(f"!({wide})")
        found.page.evaluate("open(0)")
        found.until("document.querySelector('dialog[open] figure img')")
        assert not found.page.evaluate(wide)


@in_a_browser
def test_texts_of_strangers_are_shown_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [
        "</script><script>alert(1)</script>",
        "<img src=x onerror=alert(2)>",
        "'; rm -rf ~ #",
        "a\u202eb\x03\nc",
    ]
    planned = Planned(LocalStore(tmp_path))
    shard = planned.shards[0]
    ended = planned.ended(shard)
    for end, text in zip(ended, said, strict=True):
        cast(dict[str, Any], end.row).update(prompt=text, image_id=text)
    planned.committer.commit(shard, planned.keep(shard, ended), {"model": 1.0}, "w")
    for inside in (600, 0):
        monkeypatch.setattr(page, "_MOST_INSIDE", inside)
        write_report(planned.store, read_pictures, 100, lambda done, total: None)
        html = (tmp_path / "report.html").read_text()
        assert html.count("<script") == html.count("</script") == (2 if not inside else 4)
        assert "unsafe" not in html.partition("</head>")[0]
        with opened((tmp_path / "report.html").as_uri()) as found:
            found.until(f"{COUNT} === '4 images' && {CARDS}[0] !== ''")
            assert found.page.evaluate(CARDS) == said
            orders = []
            for place in range(4):
                found.page.evaluate(f"open({place})")
                found.until("document.querySelector('dialog[open] #order')")
                orders.append(shlex.split(found.page.inner_text("#order")))
            ids = [order[3] for order in orders]
            assert ids == [*said[:3], "0/3"]
            assert all(order[:3] == ["sdbatch", "remake", str(tmp_path)] for order in orders)
            assert found.said == []


def test_a_report_that_is_written_again_makes_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_MOST_INSIDE", 0)
    write(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "report").iterdir()}
    store, read = LocalStore(tmp_path), list[str]()

    def reading(store: Any, paths: Any) -> dict[str, bytes]:
        read.extend(paths)
        return read_pictures(store, read)

    write_report(store, reading, 1000, lambda done, total: None)
    assert read == []
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "report").iterdir()} == before
    write_report(store, reading, 5, lambda done, total: None)
    after = {path.name for path in (tmp_path / "report").iterdir()}
    assert after.isdisjoint(before)
    assert all(name.removesuffix(".js") in (tmp_path / "report.html").read_text() for name in after)


def test_a_job_without_pictures_and_one_with_damaged_ones_have_a_page(tmp_path: Path) -> None:
    planned = Planned(LocalStore(tmp_path))
    assert write_report(planned.store, read_pictures, 10, lambda done, total: None).shown == 0
    planned.commit(0)
    for number, path in enumerate(sorted((tmp_path / "data/0000000").iterdir())):
        path.write_bytes(b"") if number else path.unlink()
    write_report(planned.store, read_pictures, 10, lambda done, total: None)
    html = (tmp_path / "report.html").read_text()
    (pack,) = json.loads(re.search(r'"packs":(\[\[.*?\]\])', html)[1])  # type: ignore[index]
    assert json.loads(re.search(rf'id="data-{pack[0]}">(.*?)</script>', html)[1]) == [""] * 4  # type: ignore[index]


def test_time_when_nobody_worked_is_no_working_time() -> None:
    def record(number: int, at: float) -> CommitRecord:
        return CommitRecord(number, 0, "", "w", 8, 0, 0, "", "", [], {"model": 1.0, "shard": 2.0}, {}, at)

    steady = [record(i, 1000 + 2 * i) for i in range(30)]
    later = [record(30 + i, 90_000 + 2 * i) for i in range(30)]
    found = timeline([*later, *steady])
    assert found["seconds"] == 120
    assert found["pauses"] == [[60, 90_000 - 1058 - 2]]
    assert found["images"] == [16] * 30
    assert timeline([])["images"] == []


def test_the_columns_that_all_jobs_have_are_known_as_such() -> None:
    assert sorted(OURS) == sorted(["template", *(name for name, _ in COLUMNS)])


def test_columns_of_lists_are_told_and_numbers_of_checks_are_drawn() -> None:
    count = 20
    table = pa.table(
        {
            "width": [64] * count,
            "height": [64] * count,
            "failed_checks": ["", "clip_score"] * (count // 2),
            "clip_score": [0.2 + place / 100 for place in range(count)],
            "seeds_tried": [[place, 2**62] for place in range(count)],
            "scores_tried": [[0.5, None]] * count,
        }
    )
    assert [column["name"] for column in filters(table)] == ["failed_checks"]
    assert [column["name"] for column in distributions(table)] == ["clip_score"]
    assert shown(table.column("seeds_tried")[3].as_py()) == f"3 · {2**62}"
    assert shown([0.5, None]) == "0.5 · –"
