"""Files in the forms in which people have them: each row of the table in docs/data.md becomes a data set to the bit."""

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from lib.prepare.io import open_features
from tests.conftest import ROOT
from tests.prepare.samples import make_images, prepare, tsv_line, write_image_files, write_lines

SECTION = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("## Forms of files")[1].split("\n## ")[0]
ROWS = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in SECTION.splitlines() if line.startswith("| ")][1:]

NUMBERS = (7, 42, 391895, 1000092795)
NAMES = [f"photo_{number}.jpg" for number in NUMBERS]
CAPTIONS = {number: [f"a dog, {k}; of {number}" for k in range(2)] for number in NUMBERS}
PAIRS = [(f"photo_{number}.jpg", k, CAPTIONS[number][k]) for k in range(2) for number in NUMBERS]


def features_of_names(ending=".npy", pattern="photo_{}"):
    """A folder of files, and what is in them by number."""
    images = make_images([pattern.format(number) for number in NUMBERS], (3, 7, 4))
    write_image_files(Path("features"), images, ending)
    return dict(zip(NUMBERS, (features for features, _ in images.values()), strict=True))


def write_table(path, header, rows, delimiter):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def token_file():
    write_lines(Path("captions.token"), (f"{name}#{k}\t{caption}" for name, k, caption in PAIRS))
    return features_of_names()


def image_caption():
    write_table("captions.txt", ("image", "caption"), ((name, caption) for name, _, caption in PAIRS), ",")
    return features_of_names()


def other_names():
    write_table("captions.csv", ("photo", "image", "text"), ((name, 1, caption) for name, _, caption in PAIRS), ";")
    return features_of_names()


def flickr30k_results():
    """Captions have single quotation marks in them."""
    rows = (f'{name}| {k}| "{caption}' for name, k, caption in PAIRS)
    write_lines(Path("results.csv"), ["image_name| comment_number| comment", *rows])
    return features_of_names()


def coco_captions():
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg", "license": 1} for number in NUMBERS]
    annotations = [{"image_id": n, "id": k, "caption": one} for n, of in CAPTIONS.items() for k, one in enumerate(of)]
    Path("captions_val2014.json").write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return features_of_names(".npz", "COCO_val2014_{:012d}")


def json_list():
    Path("captions.json").write_text(
        json.dumps([{"filename": n, "sentences": CAPTIONS[k]} for n, k in zip(NAMES, NUMBERS, strict=True)])
    )
    return features_of_names()


def json_object():
    Path("captions.json").write_text(json.dumps(dict(zip(NAMES, CAPTIONS.values(), strict=True))))
    return features_of_names()


def written_lists():
    rows = ((str(captions), name) for name, captions in zip(NAMES, CAPTIONS.values(), strict=True))
    write_table("annotations.csv", ("raw", "filename"), rows, ",")
    return features_of_names()


def json_lines():
    write_lines(Path("metadata.jsonl"), (json.dumps({"file_name": f"train/{n}", "text": c}) for n, _, c in PAIRS))
    return features_of_names()


def hugging_face():
    """Pictures beside the captions, as in Hugging Face's data sets."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    pictures = [{"bytes": b"\xff\xd8", "path": name} for name in NAMES]
    rows = {"image": pictures, "caption": list(CAPTIONS.values()), "split": ["validation", "test", "train", "train"]}
    parquet.write_table(table.from_pydict(rows), "train-00000-of-00001.parquet")
    return features_of_names()


def captions_csv():
    write_table("captions.csv", ("image_id", "caption"), ((name, caption) for name, _, caption in PAIRS), ",")


def named_arrays():
    captions_csv()
    return features_of_names(".npz")


def feat_and_count():
    """Features with a first axis of one, and others that stand as (numbers, regions)."""
    captions_csv()
    images = make_images(NUMBERS, (3, 7, 4))
    Path("features").mkdir()
    for place, (number, (features, _)) in enumerate(images.items()):
        feat = features[None] if place % 2 else features.T
        np.savez(f"features/photo_{number}", feat=feat, num_boxes=len(features))
    return {int(number): features for number, (features, _) in images.items()}


def subfolders():
    captions_csv()
    images = make_images(NUMBERS, (3, 7, 4))
    for number, (features, _) in images.items():
        folder = Path("features", number[-1])
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"photo_{number}.npy", features)
    return {int(number): features for number, (features, _) in images.items()}


def one_vector():
    captions_csv()
    images = make_images([f"photo_{number}" for number in NUMBERS], (1,))
    Path("features").mkdir()
    np.save("features/all_ims.npy", np.concatenate([features for features, _ in images.values()]))
    write_lines(Path("features/all_ids.txt"), images)
    return dict(zip(NUMBERS, (features for features, _ in images.values()), strict=True))


def bottom_up_tsv(between=()):
    """The store that comes of it becomes a data set by the same captions."""
    captions_csv()
    images = make_images([f"photo_{number}" for number in NUMBERS], (3, 7, 4))
    lines = [tsv_line(name, *image) for name, image in images.items()]
    if between:
        lines = [b"\t".join([*(cells := line.split(b"\t"))[:3], *between, *cells[3:]]) for line in lines]
    Path("features.tsv").write_bytes(b"".join(lines))
    return dict(zip(NUMBERS, (features for features, _ in images.values()), strict=True))


def lxmert_tsv():
    return bottom_up_tsv(between=(b"AAAA", b"AAAA", b"AAAA", b"AAAA"))


def hdf5():
    """Padded to the longest."""
    h5py = pytest.importorskip("h5py")
    captions_csv()
    images = make_images(NUMBERS, (3, 7, 4))
    with h5py.File("features.h5", "w") as file:
        file["image_ids"] = [f"photo_{number}" for number in NUMBERS]
        file["num_boxes"] = [len(features) for features, _ in images.values()]
        for name, place in (("features", 0), ("boxes", 1)):
            file[name] = np.stack([np.pad(image[place], ((0, 7 - len(image[0])), (0, 0))) for image in images.values()])
    return {int(number): features for number, (features, _) in images.items()}


def hdf5_groups():
    """Of two images arrays by name, of two the features alone."""
    h5py = pytest.importorskip("h5py")
    captions_csv()
    images = make_images(NUMBERS, (3, 7, 4))
    with h5py.File("features.h5", "w") as file:
        for place, (number, (features, boxes)) in enumerate(images.items()):
            named = {"/features": features, "/bbox": boxes} if place % 2 else {"": features}
            file.update({f"train/photo_{number}{name}": array for name, array in named.items()})
    return {int(number): features for number, (features, _) in images.items()}


def damaged_tsv():
    features = bottom_up_tsv()
    with open("features.tsv", "ab") as file:
        file.write(b"9\t640\t480\t2\tAAAA")
    return features


def id_mapping():
    """Captions by file name, features by the ids that a mapping gives them."""
    captions_csv()
    Path("id_mapping.json").write_text(json.dumps(dict(enumerate(NAMES))))
    images = make_images(range(4), (3, 7, 4))
    write_image_files(Path("features"), images)
    return dict(zip(NUMBERS, (features for features, _ in images.values()), strict=True))


FORMS = [
    token_file,
    image_caption,
    other_names,
    written_lists,
    flickr30k_results,
    coco_captions,
    json_list,
    json_object,
    json_lines,
    hugging_face,
    id_mapping,
]
FORMS += [
    named_arrays,
    feat_and_count,
    subfolders,
    one_vector,
    hdf5,
    hdf5_groups,
    bottom_up_tsv,
    lxmert_tsv,
    damaged_tsv,
]


def test_every_row_of_the_table_has_its_files():
    assert len(ROWS) == len(FORMS)


@pytest.mark.parametrize(
    ("row", "form"), list(zip(ROWS, FORMS, strict=False)), ids=lambda one: getattr(one, "__name__", "")
)
def test_files_in_the_forms_of_the_table_become_a_data_set_to_the_bit(tmp_path, monkeypatch, capsys, row, form):
    monkeypatch.chdir(tmp_path)
    features, (_, command, printed) = form(), (cell.strip("`") for cell in row)
    code, out, error = prepare(capsys, *shlex.split(command), "--data_name", "new")
    assert (code, error) == (0, "")
    assert printed.replace("\\|", "|") in out
    if command.startswith("tsv"):
        Path("data/new").rename("store")
        assert prepare(capsys, *shlex.split("own captions.csv --features store --data_name new"))[0] == 0
    check(Path("data/new"), features)


def check(folder, features):
    """The data set holds each image's features and captions, whatever the splits that they were drawn to."""
    found = []
    for path in sorted(folder.glob("*_ims.npy")):
        split = open_features(folder, path.name.removesuffix("_ims.npy"))
        ids = (folder / f"{split.name}_ids.txt").read_text().splitlines()
        for place, image_id in enumerate(ids):
            number = int(re.search("[0-9]+", image_id)[0])
            captions = [split.captions[k].replace('"', "") for k in np.flatnonzero(split.image_of_caption == place)]
            assert np.array_equal(split.features.read(np.array([place])), features[number])
            assert captions == CAPTIONS[number]
            found.append(number)
    assert sorted(found) == sorted(NUMBERS)
