"""The page of search.py serve, in a browser and as a program on the same machine could misuse it."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

import search
from tests.conftest import write_pictures

pytest.importorskip("lancedb")
pytest.importorskip("gradio", reason="needs Gradio: pip install gradio")
pytest.importorskip("playwright", reason="needs Playwright: pip install playwright")

from playwright import sync_api

from lib.search import Index

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CUT_OFF = 0  # instead of a status
LINKED, DELETED = "10.png", "11.png"
SLOW = "slowly"  # a query with this word takes a second longer
PROGRAM = f"""
import signal, sys, time, search
from lib.search import Index
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
query = Index.query
Index.query = lambda self, text, *others: time.sleep({SLOW!r} in text) or query(self, text, *others)
sys.exit(search.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def served(pixels, tmp_path_factory):
    """search.py serve of twelve pictures with captions: one is a link out of their folder, one has been deleted."""
    root = tmp_path_factory.mktemp("served")
    data, names = root / "data", [f"{k}.png" for k in range(12)]
    photos = write_pictures(data / "images", names)
    (photos / LINKED).rename(root / "secret.png")
    (photos / LINKED).symlink_to(root / "secret.png")
    (data / "test_ids.txt").write_text("".join(f"{name}\n" for name in names))
    (data / "test_caps.txt").write_text("".join(f"a dog <b>in</b> {name} {k}\n" for name in names for k in range(5)))
    flags = ["--checkpoint", str(pixels), "--index", str(root / "index"), "--device", "cpu"]
    assert search.main(["index", "--data_path", str(root), "--data_name", "data", *flags]) == 0
    (photos / DELETED).unlink()
    command = [sys.executable, "-c", PROGRAM, "serve", "--port", "0", *flags]
    environment = {**os.environ, "TMPDIR": str(root), "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "True"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    url = re.search(r"http://127.0.0.1:\d+", process.stdout.readline())[0]
    yield SimpleNamespace(url=url, process=process, root=root, photos=photos, index=Index.open(root / "index"))
    process.kill()


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_api.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync_api.Error:
            pytest.skip("needs a browser: apt-get install chromium, or playwright install chromium")
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served):
    """A visitor of the page, which must fetch nothing from elsewhere and end without an error in its scripts."""
    page, errors = open_page(browser, served)
    yield page
    page.context.close()
    assert errors == []


def open_page(browser, served):
    page, errors = browser.new_context().new_page(), []
    page.set_default_timeout(30_000)
    page.on("request", lambda one: one.url.startswith((served.url, "data:", "blob:")) or errors.append(one.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(served.url)
    return page, errors


def ask(page, text):
    page.get_by_label("What is to be seen").fill(text)
    page.keyboard.press("Enter")


def see(page, where, text):
    """Wait until a text is there."""
    page.locator(where, has_text=text).first.wait_for()


def shown(page):
    return page.locator("#results .caption-label").all_inner_texts()


def picture_of(image):
    """The pixels of an image on the page."""
    read = "async image => [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())]"
    return np.asarray(PIL.Image.open(io.BytesIO(bytes(image.evaluate(read)))), float)


def test_a_sentence_finds_pictures_and_a_click_shows_what_each_word_looks_at(page, served):
    ask(page, "a red ball")
    see(page, "#times", r"ms = encode")
    assert re.fullmatch(
        r"\d+ ms = encode \d+ \+ find \d+ \+ read \d+ \+ rank \d+; 12 of 12 scored exactly",
        page.locator("#times").inner_text(),
    )
    found = served.index.query("a red ball", top=12)
    assert shown(page) == [f"{one.score:.2f}" for one in found]
    best = next(k for k, one in enumerate(found) if one.id not in (LINKED, DELETED))
    page.locator("#results button").nth(best).click()
    page.locator("#details table").wait_for()
    assert page.locator("#details h3").inner_text() == f"{found[best].id}: {found[best].score:.2f}"
    expected = [f"{word} {score:.2f}" for word, score in found[best].words]
    assert page.locator("#details figcaption").all_inner_texts() == ["the picture", *expected]
    seen = served.index.explain(found[best].id, "a red ball")
    plain, *lit = map(picture_of, page.locator("#details img").all())
    x1, y1, x2, y2 = (seen.boxes * plain.shape[1] / 40).round().T[:, :, None, None]  # each (R, 1, 1); 40 pixels wide
    y, x = np.mgrid[: plain.shape[0], : plain.shape[1]]
    for weights, picture in zip(seen.weights, lit, strict=True):
        shares = (inside := (x >= x1) & (x < x2) & (y >= y1) & (y < y2)) / inside.sum(axis=(1, 2), keepdims=True)
        heat = (weights[:, None, None] * shares).sum(axis=0) / shares.sum(axis=0)
        expected = plain * (0.25 + 0.75 * heat / heat.max())[:, :, None]
        assert abs(picture - expected).mean() < 4 < abs(picture - plain).mean()
    rows = [row.split("\t") for row in page.locator("#details table").inner_text().splitlines()]
    assert len(rows) == 11
    added = [float(row[1]) for row in rows[1:]]
    assert added == pytest.approx(sorted(seen.groups, key=abs, reverse=True)[:10], abs=6e-4)
    assert all(row[2].count("(") == 3 for row in rows[1:])


def test_a_picture_that_is_gone_or_lies_outside_is_not_shown_and_the_page_says_so(page, served):
    ask(page, "a red ball")
    see(page, "#times", "ms = encode")
    ids = [one.id for one in served.index.query("a red ball", top=12)]
    for name, reason in ((LINKED, "a link out of the folder"), (DELETED, "deleted since")):
        place = ids.index(name)
        assert (picture_of(page.locator("#results img").nth(place))[:50] > 200).all()  # grey, with a text below
        page.locator("#results button").nth(place).click()
        see(page, "#details", f"Nothing to draw: {reason}")
        assert page.locator("#details img").count() == 0


def test_a_query_that_comes_while_another_runs_is_answered_next_and_visitors_have_their_own(page, browser, served):
    other, errors = open_page(browser, served)
    ask(page, f"a dog {SLOW}")
    ask(page, "a cat")
    ask(other, "two men")
    see(page, "b", "a cat")
    see(other, "b", "two men")
    for one, text in ((page, "a cat"), (other, "two men")):
        found = served.index.query(text, top=12)
        assert shown(one) == [f"{each.score:.2f}" for each in found]
        one.locator("#results button").first.click()
        see(one, "#details h3", found[0].id)
        see(one, "#details", text.split()[1])
    other.context.close()
    assert errors == []


def test_a_picture_that_is_dropped_finds_itself_and_captions(page, served):
    page.locator("input[type=file]").set_input_files(served.photos / "3.png")
    see(page, "#details", "Captions nearest to your picture")
    assert shown(page)[0] == "1.00"
    captions = served.index.query_picture(served.photos / "3.png", 12)[1]
    listed = page.locator("#details li").all_inner_texts()
    assert listed == [f"{one.score:.2f} {one.caption}" for one in captions]
    page.locator("#results button").first.click()
    see(page, "#details", "compared by vectors alone")


def test_what_is_too_large_too_long_or_no_picture_is_refused_with_a_message(page, served, tmp_path):
    ask(page, "a red ball")
    see(page, "#times", "ms = encode")
    before = shown(page)
    (tmp_path / "large.jpg").write_bytes(bytes(50 * 2**20))
    (tmp_path / "fake.jpg").write_bytes(b"no picture")
    for text, message in (("word " * 501, "has 501 words, the page takes 500"), (" ", "the query is empty")):
        ask(page, text)
        see(page, ".toast-body", message)
    for name, message in (
        ("large.jpg", "exceed the maximum allowed size"),
        ("fake.jpg", "not a picture, or of a kind"),
    ):
        page.locator("input[type=file]").set_input_files(tmp_path / name)
        see(page, ".toast-body", message)
    assert shown(page) == before


# Without a browser


def request(served, path, body=None, **headers):
    """Status and text of an answer."""
    headers = {"Content-Type": "application/json", **headers}
    asked = urllib.request.Request(served.url + path, body, headers)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, ""
    except urllib.error.URLError:  # refused while it was being sent
        return CUT_OFF, ""


def join(served, session, *data, number=0):
    """Ask as the page does. number: of search, search_picture or explain."""
    body = {"data": data, "fn_index": number, "session_hash": session, "event_data": None, "trigger_id": None}
    return request(served, "/gradio_api/queue/join", json.dumps(body).encode())[0]


def test_forty_queries_of_four_visitors_are_answered_each_with_its_own(served):
    def visit(visitor):
        for number in range(10):
            session, text = f"visitor{visitor}{number}", f"a dog number {visitor} {number}"
            assert join(served, session, text, 12) == 200
            status, events = request(served, f"/gradio_api/queue/data?session_hash={session}")
            assert status == 200
            (done,) = (one for one in events.splitlines() if "process_completed" in one)
            done = json.loads(done.removeprefix("data: "))
            assert done["success"], done
            title, pictures, *_ = done["output"]["data"]
            assert text in title
            assert len(pictures) == 12

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(visit, range(4)))


def test_nothing_but_the_pages_own_files_is_served_or_read(served):
    outside = str(served.photos / "3.png")
    own = next(served.root.glob("x-dim-*"))
    (own / "link.png").symlink_to(outside)
    (own / "own.png").write_bytes(b"its own")
    for path in (
        outside,
        "/etc/passwd",
        f"{own}/../data/images/3.png",
        f"{own}/link.png",
        "https://example.org/a.png",
        "",
    ):
        assert request(served, f"/gradio_api/file={path}")[0] == 403
        assert request(served, f"/gradio_api/file/{path}")[0] == 403
        if path:
            picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
            assert join(served, "thief", picture, number=1) == 403
            assert join(served, "thief", picture, 12) == 403
    assert request(served, f"/gradio_api/file={own}/own.png")[0] == 200
    for path in (
        "/config",
        "/monitoring",
        "/docs",
        "/gradio_api/info",
        "/gradio_api/proxy=https://example.org/",
        "/data",
    ):
        assert request(served, path)[0] == 403
    assert request(served, "/", Host="elsewhere.example")[0] == 403
    assert request(served, "/")[0] == 200
    assert request(served, "/gradio_api/queue/join", b" " * (2**20 + 1))[0] in (403, CUT_OFF)
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.svg"\r\n\r\n'
    upload = partial(request, served, "/gradio_api/upload", **{"Content-Type": "multipart/form-data; boundary=x"})
    assert upload(head + bytes(20 * 2**20 + 9) + b"\r\n--x--")[0] in (413, CUT_OFF)
    (drawing,) = json.loads(upload(head + b"<svg><script>alert(1)</script></svg>\r\n--x--")[1])
    assert join(served, "drawer", {"path": drawing, "meta": {"_type": "gradio.FileData"}}, number=1) == 200
    request(served, "/gradio_api/queue/data?session_hash=drawer")
    with urllib.request.urlopen(f"{served.url}/gradio_api/file={drawing}") as answer:  # which no browser would run
        assert answer.headers["Content-Type"] == "application/octet-stream"


def test_wrong_ports_and_missing_packages_are_refused_in_one_line_and_ctrl_c_ends_it(
    served, browser, capfd, monkeypatch
):
    flags = ["serve", "--index", str(served.root / "index"), "--device", "cpu"]
    port = served.url.split(":")[-1]
    none = ["serve", "--index", str(served.root / "none")]
    for given, message in (
        ([*flags, "--port", port], f"--port {port}: cannot listen there (Address already in use"),
        ([*flags, "--port", "65536"], "cannot listen there"),
        ([*flags, "--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 7860: cannot listen there"),
        (none, "no index there; make one"),
    ):
        capfd.readouterr()
        assert search.main(given) == 2
        line = capfd.readouterr().err
        assert message in line
        assert len(line.splitlines()) == 1
    monkeypatch.delitem(sys.modules, "lib.search.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert search.main(flags) == 2
    assert "pip install gradio" in capfd.readouterr().err
    page, _ = open_page(browser, served)
    ask(page, "a red ball")
    see(page, "#times", "ms = encode")
    served.process.send_signal(signal.SIGINT)  # the page is open, and it ends all the same
    _, err = served.process.communicate(timeout=300)
    assert (served.process.returncode, err) == (130, "interrupted\n")
    assert not list(Path(served.root).glob("x-dim-*"))
