"""What became of a training: a gallery of queries and what was found for them, and curves of several runs.

The gallery is one HTML file that needs nothing else: pictures are in it, each once, as small JPEGs.
"""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lib.checkpoints.record import RECORD, read_record
from lib.cli import InputError, refusing, with_bar
from lib.config import CurvesSettings, GallerySettings, SplitSettings
from lib.data.dataset import CAPTIONS_PER_IMAGE, Split, read_ids
from lib.data.images import NotAPicture, find_pictures, open_picture
from lib.evaluation import rankings, report
from lib.evaluation.evaluate import Job, opened, rows_of_scores
from lib.evaluation.metrics import RECALL_AT, chance_metrics
from lib.figures import import_matplotlib, new_figure, save_figure
from lib.files import check_writable, replacing

SHOWN = 5  # answers to a query
SIDE = 160  # pixels of a picture's longer side
STYLES = ("-", "--", ":", "-.")  # of curves, so that they differ in grey too
TICK = "\N{CHECK MARK}"
PAGE = Path(__file__).with_name("gallery.html")  # with places for title, about, cards, pictures


class Found(NamedTuple):
    """A query and the best answers to it, behind them the first right one if that is not among them."""

    way: str  # "i2t" or "t2i"
    query: int
    rank: int  # of the first right item, from 1
    answers: list[tuple[int, int, float, bool]]  # rank from 1, image or caption, score, whether it is right


def find_answers(job: Job) -> tuple[str, list[Found]]:
    """The name of what is evaluated; all its queries, those with the worst rank first. Ranks are those of eval.py."""
    *_, (row, scores, _) = rows_of_scores(job)
    found = []
    own_pairs = rankings.pair_protocols(job.split.image_of_caption, job.parts)
    for way, query, top, right, positions in rankings.judge(scores, own_pairs):
        places = positions["all"]
        answers = [(rank, item, score, item in right) for rank, (item, score) in enumerate(top[:SHOWN], start=1)]
        first, rank = int(right[places.argmin()]), int(places.min()) + 1
        if rank > SHOWN:
            answers.append((rank, first, float(scores[(query, first) if way == "i2t" else (first, query)]), True))
        found.append(Found(way, query, rank, answers))
    return row, sorted(found, key=lambda one: -one.rank)


def read_thumbnails(split: Split, images: Sequence[int], image_path: str) -> tuple[dict[int, str], str]:
    """JPEGs in base64 of images, by number; what to do where there are none, InputError where image_path has none."""
    ids = read_ids(split)
    if ids is None:
        return {}, f"no pictures: {split.folder} has no {split.name}_ids.txt that names them"
    try:
        paths = find_pictures(split.folder, [ids[image] for image in images], image_path)
    except InputError as error:
        if image_path:
            raise
        return {}, f"no pictures: {error}"
    thumbnails = {}
    for image, path in with_bar([*zip(images, paths, strict=True)], "pictures"):
        try:
            picture = open_picture(path, (SIDE, SIDE))
        except NotAPicture:  # its id stands in its place
            continue
        picture.thumbnail((SIDE, SIDE))
        picture.save(file := io.BytesIO(), "JPEG", quality=80)
        thumbnails[image] = base64.b64encode(file.getvalue()).decode()
    return thumbnails, ""


def show_gallery(settings: GallerySettings) -> None:
    """show.py retrieval: write the page."""
    check_writable(settings.out)
    evaluated = {one.name: getattr(settings, one.name) for one in fields(SplitSettings) if hasattr(settings, one.name)}
    with opened([settings.checkpoint], SplitSettings(**evaluated)) as job:
        row, found = find_answers(job)
    split, shown = job.split, []
    about = [f"{split.folder.name} {split.name}: {len(split.features):,} images, {len(split.captions):,} captions"]
    for way in ("t2i", "i2t"):
        of_way = [one for one in found if one.way == way]
        ranks, kept = np.array([one.rank for one in of_way]), of_way[: settings.queries]
        recalls = ", ".join(f"R@{k} {np.mean(ranks <= k):.1%}" for k in RECALL_AT)
        about.append(f"{report.TITLES[way]}: {recalls} of {len(ranks):,} queries")
        if len(kept) < len(ranks):
            rest = f"{len(ranks) - len(kept):,} of rank {ranks[len(kept)]:,} or better are left out (--queries)"
            about[-1] += f"; the {len(kept):,} worst are here, {rest}"
        shown += kept
    images = {one.query if one.way == "i2t" else item for one in shown for _, item, _, _ in one.answers}
    pictures, note = read_thumbnails(split, sorted(images), settings.image_path)
    names = read_ids(split) or [f"image {number}" for number in range(len(split.features))]
    cards = [_card(one, split.captions, names, pictures) for one in sorted(shown, key=lambda one: -one.rank)]
    lines = "\n".join(f"<p>{escape(line)}</p>" for line in [*about, note] if line)
    parts = {"title": escape(row), "about": lines, "cards": "\n".join(cards), "pictures": json.dumps(pictures)}
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(parts)
    with replacing(settings.out) as file:
        file.write(page.encode())
    print(settings.out)


def _card(found: Found, captions: Sequence[str], names: Sequence[str], pictures: dict[int, str]) -> str:
    """A query and its answers as HTML."""

    def picture(image: int) -> str:
        name = escape(names[image])
        drawn = f'<img data-picture="{image}" alt="{name}">' if image in pictures else '<i class="none">no picture</i>'
        return f"{drawn}<span>{name}</span>"

    def caption(number: int) -> str:
        return f"<q>{escape(captions[number].strip())}</q>"

    asked, answered = (caption, picture) if found.way == "t2i" else (picture, caption)
    answers = []
    for rank, item, score, is_right in found.answers:
        kind, tick = ("right", f"<b>{TICK} right</b>") if is_right else ("wrong", "")
        kind += " behind" * (rank > SHOWN)
        about = f"<p>{tick} {rank}. <small>{score:.4f}</small></p>"
        answers.append(f'<li class="{kind}">{about} {answered(item)}</li>')
    return (
        f'<article id="{found.way}-{found.query}" class="{found.way}" data-rank="{found.rank}">'
        f"<div><h2>rank {found.rank:,}</h2><p>{report.TITLES[found.way]}</p>{asked(found.query)}</div>"
        f"<ol>{''.join(answers)}</ol></article>"
    )


class Curves(NamedTuple):
    """What a run's files say of its training. Positions are in epochs, which may be broken off."""

    loss: np.ndarray  # (points, 2): position, mean loss since the point before
    sparsity: np.ndarray  # (points, 2): position, share of the gate's mask that is below a half
    rsum: np.ndarray  # (epochs, 2): position, rSum on dev
    chance: float | None  # rSum on dev of random scores, where its images have five captions each


def read_curves(folder: Path) -> Curves:
    """The curves in run.json and TensorBoard's files, empty where there are none. Raises InputError without a run."""
    if (record := read_record(folder)) is None:
        raise InputError(f"{folder}: not the folder of a run: no {RECORD} in it")
    with refusing(f"{folder / RECORD}: damaged"):
        settings, dev = record["settings"], record["data"]["dev"]
        steps = record["data"]["train"]["captions"] // settings["batch_size"]
        rsum = [(one["step"] / steps, one["dev"]["rsum"]) for one in record["history"]]
        image_of_caption = np.repeat(np.arange(dev["images"]), CAPTIONS_PER_IMAGE)
        chance = chance_metrics(image_of_caption)["rsum"] if len(image_of_caption) == dev["captions"] else None
    loss, sparsity = _read_scalars([folder, Path(settings["logger_name"])], "train/loss", "gate/sparsity")
    return Curves(loss / (steps, 1), sparsity / (steps, 1), np.reshape(rsum, (-1, 2)), chance)


def _read_scalars(folders: Iterable[Path], *names: str) -> list[np.ndarray]:
    """Step and value (points, 2) of each name in TensorBoard's files in the first of some folders that has any."""
    for folder in folders:
        if any(folder.glob("events.*")):
            events = EventAccumulator(str(folder), {"scalars": 0})  # 0: all of them
            events.Reload()
            there = events.Tags()["scalars"]
            points = [events.Scalars(name) if name in there else [] for name in names]
            return [np.array([(one.step, one.value) for one in some]).reshape(-1, 2) for some in points]
    return [np.empty((0, 2)) for _ in names]


def draw_curves(curves: dict[str, Curves]) -> Any:
    """Loss, rSum on dev and sparsity of runs, by their names, one below the other; what no run has is left out."""
    panels = {"loss": "Loss in training", "rsum": "rSum on dev", "sparsity": "Share of the gate's mask that is closed"}
    panels = {name: title for name, title in panels.items() if any(len(getattr(one, name)) for one in curves.values())}
    if not panels:
        raise InputError(f"{', '.join(curves)}: nothing to draw yet: no epoch is done, no TensorBoard files are there")
    figure = new_figure(8, 1.2 + 2.4 * len(panels))
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (name, title) in zip(rows, panels.items(), strict=True):
        for number, (run, one) in enumerate(curves.items()):
            marker = "o" if name == "rsum" else ""
            style = {"color": f"C{number}", "linestyle": STYLES[number % 4], "linewidth": 1.5 + number // 4}
            axes.plot(*getattr(one, name).T, label=run, marker=marker, **style)
        axes.set_title(title)
        axes.ticklabel_format(axis="y", useOffset=False)
        if name == "loss":
            axes.set_yscale("log", subs=(2, 5))
            for axis_labels in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                axis_labels("{x:g}")
        if name == "rsum" and (chances := sorted({one.chance for one in curves.values() if one.chance})):
            for chance in chances:
                axes.axhline(chance, color="0.5", linewidth=1)
            axes.set_title(f"{title} (grey: chance, {' and '.join(f'{chance:.1f}' for chance in chances)})")
    axes.set_xlabel("epochs")
    legend = figure.legend(axes.lines[: len(curves)], range(len(curves)), loc="outside lower center", ncols=3)
    for entry, run in zip(legend.get_texts(), curves, strict=True):  # legend() leaves out names that begin with _
        entry.set(text=run, parse_math=False)
    return figure


def show_curves(settings: CurvesSettings) -> None:
    """show.py training."""
    import_matplotlib(settings.out)
    names = [Path(run).absolute().name for run in settings.run]
    labels = names if len(set(names)) == len(names) else settings.run
    curves = {label: read_curves(Path(run)) for label, run in zip(labels, settings.run, strict=True)}
    save_figure(draw_curves(curves), settings.out)
