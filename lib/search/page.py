"""A page in the browser that asks an index: a sentence or a picture in, pictures out, and what the model looked at.

Gradio draws it, uvicorn serves it, and `guard` refuses every request that the page itself does not make. The pictures
that are shown are copies that the server makes of the files in the index's own rows.
"""

import atexit
import base64
import gc
import io
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw

from lib.cli import InputError, reason
from lib.config import ServeSettings
from lib.data.images import NotAPicture, open_picture
from lib.evaluation.attention import Attention, light, partners
from lib.search.index import Found, Index

try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI, Request, Response
except ModuleNotFoundError as error:
    raise InputError(f"{error}: the page needs Gradio, run: pip install gradio") from None

UPLOAD, REQUEST = 20 * 2**20, 2**20  # most bytes of a picture that is given, and of what else a request holds
WORDS = 500  # most words of a query
TOP, CANDIDATES, MOST = 12, 200, 5000  # answers; pictures that are scored exactly: at first, and the slider's end
SIDE, LIT = 320, 200  # pixels of a result's longer side, of that of a word's picture
DRAWN, GROUPS, PARTNERS = 40, 10, 3  # words that are drawn; rows of the table of groups, and what each names
CLEANING = (600, 3600)  # seconds between two looks at the server's copies, and their age at the end
LOOPBACK = ("127.0.0.1", "localhost")
ROUTES = re.compile(
    r"/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/.+"
    r"|/gradio_api/(queue/(join|data)|upload|upload_progress|heartbeat/\w+|cancel|reset|app_id|file=(?P<file>.+))"
)
CSS = ".words { display: flex; flex-wrap: wrap; gap: 12px } .words figure { margin: 0 } #details td { padding: 0 8px }"
CSS += ".words img { width: 200px } #results .grid-wrap { max-height: none }"


def told(work: Callable) -> Callable:
    """What is refused is said on the page, which stays as it is otherwise."""

    @wraps(work)
    def run(*given: Any) -> Any:
        try:
            return work(*given)
        except (InputError, NotAPicture) as error:
            gr.Warning(escape(str(error)))
            return gr.skip()

    return run


class Page:
    """The page of an index. What each visitor was shown last, the text and what was found, is kept in gr.State."""

    def __init__(self, index: Index):
        self.index, self.alone = index, threading.Lock()  # the model takes one thread at a time

    def build(self) -> Any:
        count, last = len(self.index), {"api_visibility": "private", "trigger_mode": "always_last"}
        most, info = min(count, MOST), "nearest pictures, which are scored exactly"
        about = f"## Search {count:,} pictures\nSay what is to be seen, or drop a picture to find what is like it."
        with gr.Blocks(title="X-Dim", analytics_enabled=False, delete_cache=CLEANING) as blocks:
            answer = gr.State(("", []))
            gr.Markdown(about)
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    example = "two dogs run on the beach"
                    text = gr.Textbox(label="What is to be seen", placeholder=example, submit_btn="Search")
                    drop = gr.Image(label="or a picture", sources=["upload", "clipboard"], height=200, buttons=[])
                    number = gr.Slider(1, most, min(CANDIDATES, most), step=1, label="Candidates", info=info)
                with gr.Column(scale=3, min_width=480):
                    title = gr.HTML("What is found is shown here.")
                    results = gr.Gallery(
                        show_label=False, elem_id="results", columns=4, object_fit="contain", format="jpeg",
                        allow_preview=False, buttons=[], interactive=False,
                    )  # fmt: skip
                    times = gr.HTML(elem_id="times")
            details = gr.HTML(elem_id="details")
            shown = [title, results, times, details, answer, text, drop]
            text.submit(self.search, [text, number], shown, **last)
            drop.upload(self.search_picture, drop, shown, preprocess=False, **last)
            results.select(self.explain, answer, details, **last)
        return blocks

    @told
    def search(self, text: str, candidates: int) -> tuple:
        """The best pictures for a sentence."""
        if (count := len((text := text or "").split())) > WORDS:
            raise InputError(f"the query has {count:,} words, the page takes {WORDS}")
        with self.alone:
            found = self.index.query(text, TOP, candidates, times := {"": time.perf_counter()})
        title = f"Pictures for <b>{escape(text)}</b>. Click one to see what the model looked at."
        how = f"{min(max(TOP, candidates), len(self.index)):,} of {len(self.index):,} scored exactly"
        return title, list(map(_thumbnail, found)), _spell(times, how), "", (text, found), gr.skip(), None

    @told
    def search_picture(self, given: dict[str, Any]) -> tuple:
        """The pictures and captions nearest to a picture that was dropped."""
        picture = open_picture(given["path"])
        with self.alone:
            found, captions = self.index.query_picture(picture, TOP, times := {"": time.perf_counter()})
        said = "".join(f"<li>{one.score:.2f} {escape(one.caption)}</li>" for one in captions)
        details = f"<h4>Captions nearest to your picture</h4><ol>{said}</ol>" if said else ""
        results, how = list(map(_thumbnail, found)), "by the cosine of vectors"
        return "Pictures most like yours.", results, _spell(times, how), details, ("", found), "", gr.skip()

    @told
    def explain(self, answer: tuple[str, list[Found]], event: gr.SelectData) -> str:
        """What an answer's score is made of."""
        (text, found), place = answer, event.index
        title = f"<h3>{escape(found[place].id)}: {found[place].score:.2f}</h3>"
        if not text:
            return f"{title}Pictures are compared by vectors alone: there are no words to look for."
        with self.alone:
            seen = self.index.explain(found[place].id, text)
            used = np.argsort(-np.abs(seen.groups), kind="stable")[:GROUPS].tolist()
            others = partners(self.index.dependency, used, PARTNERS)
        return title + _draw_words(found[place], seen) + _list_groups(seen.groups, used, others)


def _spell(times: dict[str, float], how: str) -> str:
    spent = dict(zip([*times][1:], 1000 * np.diff([*times.values()]), strict=True))
    return f"{sum(spent.values()):.0f} ms = {' + '.join(f'{part} {one:.0f}' for part, one in spent.items())}; {how}"


def open_own(found: Found) -> PIL.Image.Image:
    """The picture of an index's row. Raises NotAPicture, also where a link leads out of the folder of the pictures."""
    folder, real = found.path.removesuffix(f"/{found.id}"), Path(found.path).resolve()
    if not real.is_relative_to(Path(os.path.dirname(folder) if folder == found.path else folder).resolve()):
        raise NotAPicture("a link out of the folder")
    if not real.is_file():
        raise NotAPicture("deleted since" if found.path else "no file is known")
    return open_picture(real)


def _thumbnail(found: Found) -> tuple[PIL.Image.Image, str]:
    """A small copy, or in its place what is wrong; and the score."""
    try:
        picture = open_own(found)
        picture.thumbnail((SIDE, SIDE))
    except NotAPicture as error:
        picture = PIL.Image.new("RGB", (SIDE, SIDE), "lightgrey")
        PIL.ImageDraw.Draw(picture).text((20, SIDE // 2), str(error), "black", font_size=24)
    return picture, f"{found.score:.2f}"


def _draw_words(found: Found, seen: Attention) -> str:
    """The picture as each word sees it, or the words' scores alone."""
    named = [f"<b>{escape(word)}</b> {score:.2f}" for word, score in zip(seen.words, seen.scores, strict=True)]
    try:
        picture = open_own(found)
        if seen.boxes is None:
            raise NotAPicture("the index has no boxes of its regions")
    except NotAPicture as error:
        return f"<p>Nothing to draw: {escape(str(error))}. Scores of the words: {', '.join(named)}</p>"
    figures, lit = "", light(picture, seen.boxes, seen.weights[:DRAWN], LIT)
    for pixels, text in zip(lit, ["the picture", *named], strict=False):
        PIL.Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG")
        data = base64.b64encode(file.getvalue()).decode()
        figures += f'<figure><img src="data:image/jpeg;base64,{data}" alt=""><figcaption>{text}</figcaption></figure>'
    about = "Bright: where the model looks for the word. Number: how well the word fits what is there."
    return f'<p>{about}</p><div class="words">{figures}</div>'


def _list_groups(groups: np.ndarray, used: list[int], others: list[list[tuple[int, float]]]) -> str:
    rows = [("<b>dimension</b>", "<b>its group adds</b>", "<b>its largest partners (weight)</b>")]
    for dim, of_dim in zip(used, others, strict=True):
        rows.append((str(dim), f"{groups[dim]:+.3f}", ", ".join(f"{one} ({weight:.2f})" for one, weight in of_dim)))
    table = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
    title = f"The {len(used)} dependency groups that count most, of {len(groups)} whose sum is {groups.sum():.2f}"
    return f"<h4>{title}</h4><table>{table}</table>"


# The server


def guard(app: Callable, folder: str, local: bool) -> Callable:
    """An ASGI application that passes on what the page asks of its server, and refuses all else.

    folder: of the page's own files, the only ones that a request may name. local: only for browsers that call this
    machine so; else a page elsewhere could have its own name lead here.
    """
    own = Path(folder).resolve()

    def check_path(part: dict[str, Any]) -> None:
        if not Path(str(part.get("path") or own)).resolve().is_relative_to(own):
            raise ValueError

    async def check(request: Request) -> bytes:
        """The body of a request that may name files. Raises ValueError where the request is refused."""
        path, post = request.scope["path"], request.method == "POST"
        known, upload = ROUTES.fullmatch(path), path.endswith("/upload")
        length = int(request.headers.get("content-length", "unknown" if post else "0"))
        foreign = local and request.url.hostname not in LOOPBACK
        if not known or foreign or length > (UPLOAD + REQUEST if upload else REQUEST):
            raise ValueError
        check_path({"path": known["file"]})
        body = await request.body() if post and not upload else b""
        json.loads(body or "{}", object_hook=check_path)
        return body

    async def guarded(scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        try:
            body = await check(Request(scope, receive))
        except (ValueError, RecursionError):
            await Response(status_code=403)(scope, receive, send)
            return
        parts = [{"type": "http.request", "body": body}] if body else []

        async def again() -> dict[str, Any]:
            return parts.pop() if parts else await receive()

        await app(scope, again, send)

    return guarded


def serve(settings: ServeSettings) -> None:
    """search.py serve, until it is interrupted. Raises InputError."""
    index = Index.of(settings)
    try:
        listening = socket.create_server((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        where = f"--host {settings.host} --port {settings.port}"
        raise InputError(f"{where}: cannot listen there ({reason(error)}); take another") from None
    atexit.register(gc.freeze)  # else Python looks through all that PyTorch has made before it ends: seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with listening, tempfile.TemporaryDirectory(prefix="x-dim-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = Page(index).build()
        app = gr.mount_gradio_app(
            FastAPI(openapi_url=None), blocks, "/", css=CSS, max_file_size=UPLOAD, footer_links=[],
            run_history=False, show_error=False, ssr_mode=False, mcp_server=False, enable_monitoring=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip
        blocks.has_launched = True  # else Gradio itself checks no paths of files
        guarded = guard(app, folder, settings.host in LOOPBACK)
        where = f"http://{settings.host}:{listening.getsockname()[1]}"
        print(f"a page to search {len(index):,} pictures: {where} (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(guarded, log_level="critical", timeout_graceful_shutdown=1)).run([listening])
