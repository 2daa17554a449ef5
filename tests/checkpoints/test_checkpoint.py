"""Reading checkpoints: damage and hostile content are refused before they cost memory, and nothing else is."""

import argparse
import io
import pickle
import re
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.checkpoints import archive
from lib.checkpoints.native import FORMAT, LAST, build_model, read_checkpoint, verify, write_checkpoint
from lib.checkpoints.published import listed
from lib.cli import InputError
from tests.conftest import GOLDEN, TINY_BERT

PUBLISHED = GOLDEN / "official_format_checkpoint.pth.tar"
CASES = 600  # of each way to damage a file


def sound_content() -> dict:
    """The smallest content that a checkpoint may have; its weights are those of no model."""
    progress = {"epoch": 1, "batch": 0, "step": 3, "best_rsum": 7.5, "best_epoch": 1}
    return {
        "model": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)},
        "architecture": {
            **{"img_dim": 4, "embed_size": 2, "no_imgnorm": False, "no_txtnorm": False, "mask_padding": True},
            **{"similarity": "xdim", "gate": "adaptive"},
        },
        **{"bert_config": {"vocab_size": 3}, "tokenizer": "{}", "settings": {"margin": 0.2, "data_name": "demo"}},
        "progress": {**progress, "history": [{"epoch": 1, "step": 3, "dev": {"rsum": 7.5}}]},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        **{"random_state": {"cpu": torch.arange(4, dtype=torch.uint8)}, "versions": {}, "data": {}},
    }


def same(one, other) -> bool:
    """Equal to the bit, types included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small checkpoint in this project's form, and two published ones, one in the form before PyTorch 1.6."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(folder / "own.pt", sound_content())
    similarity = {"module.weights.weight": torch.eye(2), "module.sim_eval.weight": torch.ones(1, 2)}
    options = argparse.Namespace(embed_size=2, img_dim=3, margin=0.2)
    content = {
        "epoch": 1,
        "model": [{"module.fc.bias": torch.ones(2)}, {}, similarity],
        "best_rsum": 1.5,
        "opt": options,
    }
    torch.save(content, folder / "published.pth.tar")
    torch.save(content, folder / "legacy.pth.tar", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def write(tmp_path):
    """Writes a checkpoint that differs from a sound one by what a function does to its content."""

    def write(change):
        content = sound_content()
        change(content)
        write_checkpoint(tmp_path / "altered.pt", content)
        return tmp_path / "altered.pt"

    return write


def read_bytes(folder, name, content):
    (folder / name).write_bytes(content)
    return read_checkpoint(folder / name)


def read_or_refuse(path) -> dict | None:
    """The content of a checkpoint, or None where it is refused with one line that names it."""
    try:
        return read_checkpoint(path)
    except InputError as refusal:
        said = str(refusal)
    assert said.startswith(str(path))
    assert len(said.splitlines()) == 1
    return None


def test_a_sound_checkpoint_is_read_as_it_was_written(write):
    path = write(lambda content: None)
    assert same(read_checkpoint(path), {"format": FORMAT, **sound_content(), "path": str(path)})


@pytest.mark.parametrize("name", ["own.pt", "published.pth.tar", "legacy.pth.tar"])
@settings(deadline=None, max_examples=CASES)
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_changes_nothing(files, tmp_path_factory, name, data):
    whole, path = files[name], tmp_path_factory.getbasetemp() / f"flipped_{name}"
    place = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[place // 8] ^= 1 << place % 8
    path.write_bytes(flipped)
    content = read_or_refuse(path)
    if content is not None and name != "legacy.pth.tar":  # which has no checksums
        assert same(content, read_bytes(path.parent, path.name, whole))


def test_every_flipped_bit_of_an_archives_directory_is_refused_or_changes_nothing(files, tmp_path):
    """No checksum covers it. PyTorch and Python read it with two different programs."""
    whole, path = files["published.pth.tar"], tmp_path / "flipped.pth.tar"
    expected, outcomes = read_bytes(tmp_path, path.name, whole), []
    for place in range(8 * whole.index(b"PK\1\2"), 8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        content = read_or_refuse(path)
        assert content is None or same(content, expected), place
        outcomes.append(content is None)
    assert any(outcomes)


@pytest.mark.parametrize("name", ["own.pt", "published.pth.tar", "legacy.pth.tar"])
@settings(deadline=None, max_examples=CASES)
@given(kept=st.floats(0, 1, exclude_max=True), tail=st.binary(max_size=30))
def test_a_file_that_is_cut_or_whose_end_is_another_is_refused(files, tmp_path_factory, name, kept, tail):
    damaged = files[name][: int(kept * len(files[name]))] + (b"" if name == "legacy.pth.tar" else tail)
    folder = tmp_path_factory.getbasetemp()
    if damaged != files[name]:
        with pytest.raises(InputError, match=f"cut_{name}: "):
            read_bytes(folder, f"cut_{name}", damaged)


VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5)),
    *(st.just([]), st.just({}), st.just(()), st.just([{"dev": 3}]), st.just({"a": {"b": [None]}})),
    st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2]),
    ),
)


@settings(deadline=None, max_examples=CASES)
@given(data=st.data())
def test_content_of_any_other_type_is_read_or_refused(tmp_path_factory, data):
    content, path = sound_content(), tmp_path_factory.getbasetemp() / "other_types.pt"
    part = data.draw(st.sampled_from(list(content)))
    inner = content[part] if isinstance(content[part], dict) and data.draw(st.booleans()) else content
    inner[data.draw(st.sampled_from(list(inner))) if inner is not content and inner else part] = data.draw(VALUES)
    write_checkpoint(path, content)
    found = read_or_refuse(path)
    if found is None:
        return
    assert all(type(weight) is torch.Tensor and not weight.is_complex() for weight in found["model"].values())
    assert all(type(found["progress"][name]) is int for name in ("epoch", "step"))
    with pytest.raises(InputError, match=r"other_types\.pt: "):
        build_model(found)  # it describes no whole model


WEIGHT = st.builds(lambda shape: torch.zeros(shape), st.lists(st.integers(0, 70), max_size=3))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_weight_of_another_shape_type_or_name_is_refused_by_its_name(trained_run, tmp_path_factory, data):
    content = torch.load(trained_run / LAST, weights_only=True)
    weights, path = content["model"], tmp_path_factory.getbasetemp() / "misfit.pt"
    name = data.draw(st.sampled_from(sorted(weights)))
    change = data.draw(st.sampled_from(["shape", "type", "missing", "renamed"]))
    old = weights.pop(name)
    if change == "shape":
        weights[name] = data.draw(WEIGHT.filter(lambda weight: weight.shape != old.shape))
    elif change == "type":
        weights[name] = old.long() if old.is_floating_point() else old.float()
    elif change == "renamed":
        weights[name + "s"] = old
    write_checkpoint(path, content)
    with pytest.raises(InputError, match=name):
        build_model(read_checkpoint(path))


def test_at_most_twenty_weights_are_listed():
    assert listed([f"w{i}" for i in range(33)]).endswith("w18, w19 and 13 more")


def set_in(*keys, value):
    """A function that sets content[keys[0]][keys[1]]... to a value."""

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in("architecture", "img_dim", value=True), "architecture: img_dim is no int"),
        (set_in("architecture", "embed_size", value=0), "architecture: embed_size is 0"),
        (set_in("architecture", "more", value=1), "architecture: expected img_dim, embed_size"),
        (set_in("progress", "epoch", value=-1), "progress: epoch is negative"),
        (set_in("progress", "best_rsum", value=float("nan")), "progress: best_rsum is no float"),
        (set_in("progress", "history", value=[{"epoch": 1}]), "progress: its history holds no scores on dev"),
        (set_in("settings", "margin", value="wide"), "settings: margin is no float"),
        (set_in("settings", "no_such", value=1), "settings: 'no_such' is unknown"),
        (set_in("model", "two\nlines", value=torch.zeros(1)), r"'two\nlines' is no name of a weight"),
        (set_in("model", "a", value=[1.0]), "a is no tensor of plain numbers"),
        (set_in("model", "a", value=torch.zeros(3).to_sparse()), "not a checkpoint (it asks for "),
        (set_in("model", "a", value=torch.zeros(3, device="meta")), "not a checkpoint (it asks for "),
        (set_in("model", "a", value=torch.zeros(1).expand(2**20)), "refers to the same parts again and again"),
        (set_in("format", value="x-dim checkpoint 1"), "'x-dim checkpoint 1', from another version of this code"),
        (set_in("random_state", value=None), "an incomplete checkpoint, it lacks random_state"),
    ],
)
def test_what_is_wrong_in_a_checkpoint_is_named(write, change, words):
    with pytest.raises(InputError) as error:
        read_checkpoint(write(change))
    assert words in str(error.value)


def whole_model(trained_run, tmp_path, change):
    content = torch.load(trained_run / LAST, weights_only=True)
    change(content)
    write_checkpoint(tmp_path / "absurd.pt", content)
    return tmp_path / "absurd.pt"


@pytest.mark.parametrize(
    "change",
    [
        set_in("bert_config", "num_hidden_layers", value=10**9),
        set_in("bert_config", "hidden_size", value=10**9),
        set_in("bert_config", "vocab_size", value=10**12),
        set_in("bert_config", "vocab_size", value=100),  # fewer than the tokenizer knows
        set_in("bert_config", "num_attention_heads", value=0),
        set_in("bert_config", "num_attention_heads", value=-2),
        set_in("bert_config", "hidden_act", value="__class__"),
        set_in("bert_config", "layer_norm_eps", value="small"),
        set_in("architecture", "embed_size", value=10**6),
        set_in("architecture", "img_dim", value=2**62),
        set_in("tokenizer", value="{}"),
        set_in("tokenizer", value="[" * 100_000),
    ],
)
def test_an_absurd_model_is_refused_before_it_takes_memory(trained_run, tmp_path, change):
    path = whole_model(trained_run, tmp_path, change)
    with pytest.raises(InputError, match=r"absurd\.pt: "):
        build_model(read_checkpoint(path))


@pytest.mark.parametrize("name", ["num_labels", "id2label", "quantization_config", "auto_map", "pad_token_id"])
def test_what_is_none_of_berts_layers_is_left_out_of_its_configuration(trained_run, tmp_path, name):
    path = whole_model(trained_run, tmp_path, set_in("bert_config", name, value=10**12))
    assert build_model(read_checkpoint(path))[0].text_encoder.bert.config.num_labels == 2


# Checksums, without loading


@pytest.mark.parametrize("name", ["own.pt", "published.pth.tar"])
def test_damage_of_a_weight_is_found_without_loading(files, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(files[name])
    verify(path)
    with zipfile.ZipFile(path) as archived:
        record = next(record for record in archived.infolist() if record.filename.endswith("/data/0"))
    damaged = bytearray(files[name])
    damaged[damaged.index(torch.arange(6.0).numpy().tobytes() if name == "own.pt" else b"\0\0\x80?")] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=f"{name}: damaged.*the checksum of its record {record.filename} is wrong"):
        verify(path)


def test_verifying_needs_no_pickle_to_be_followed(files, tmp_path, monkeypatch):
    (tmp_path / "own.pt").write_bytes(files["own.pt"])
    monkeypatch.delattr(archive, "follow")
    verify(tmp_path / "own.pt")


def rewritten(whole: bytes, change, **options) -> bytes:
    """A zip archive with records changed, with PyTorch's way to end one."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archived:
        records = {record.filename: archived.read(record) for record in archived.infolist()}
    change(records)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archived:
        for name, content in records.items():
            archived.writestr(name, content)
    data = file.getvalue()
    _, entries, size, start, _ = struct.unpack("<8sHxxLLH", data[-22:])
    end = struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, size, start)
    return data[:-22] + end + struct.pack("<4sLQL", b"PK\x06\x07", 0, len(data) - 22, 1) + data[-22:]


def test_an_archive_that_is_packed_again_is_read(files, tmp_path):
    again = rewritten(files["own.pt"], lambda records: None)
    assert same(read_bytes(tmp_path, "a.pt", again), read_bytes(tmp_path, "a.pt", files["own.pt"]))


def grow(records):
    records[next(name for name in records if name.endswith("/data/0"))] = bytes(10**8)


def shrink(records):
    records[next(name for name in records if name.endswith("/data/0"))] = bytes(8)


def test_a_record_marked_as_a_folder_is_refused(files, tmp_path):
    marked = bytearray(files["own.pt"])
    entry = marked.rindex(b"archive/data/0") - 46
    assert marked[entry : entry + 4] == b"PK\1\2"
    marked[entry + 38] |= 0x10
    with pytest.raises(InputError, match="a record that is marked as a folder"):
        read_bytes(tmp_path, "marked.pt", marked)


def change_case(records):
    records.update({name.upper(): content for name, content in records.items() if name.endswith("data.pkl")})


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (grow, {"compression": zipfile.ZIP_DEFLATED}, "a compressed archive"),
        (shrink, {}, "its storage 0 is not of the size that the pickle states"),
        (change_case, {}, "two records of one name"),
    ],
)
def test_an_archive_that_pytorch_does_not_write_is_refused(files, tmp_path, change, options, words):
    with pytest.raises(InputError, match=words):
        read_bytes(tmp_path, "odd.pt", rewritten(files["own.pt"], change, **options))


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_archive_with_something_around_it_is_refused(files, tmp_path, place):
    more = b"PK\x03\x04" + bytes(50)
    with pytest.raises(InputError, match="no archive of PyTorch"):
        read_bytes(tmp_path, "a.pt", more + files["own.pt"] if place == "before" else files["own.pt"] + more)


# Pickles that do not run code, and still would do harm


ORDERED_DICT = b"ccollections\nOrderedDict\n"
ODDITIES = {
    "a call that allocates": (b"cbuiltins\nbytearray\n\x8a\5\0\0\0\0\1\x85R.", "asks for builtins.bytearray"),
    "a copy of a dict": (ORDERED_DICT + b"}\x85R.", "in a way that torch.save does not write"),
    "a Namespace with arguments": (b"cargparse\nNamespace\n}\x85\x81.", "in a way that torch.save does not write"),
    "a nested key": (b"}))\x86)\x86Ns.", "neither text nor number"),
    "a list as key": (b"}]Ns.", "neither text nor number"),
    "half an item": (b"}(K\0u.", "neither text nor number"),
    "an item of a list": (b"]K\0Ns.", "a list in place of a dict"),
    "a value of a dict": (b"}K\0a.", "a dict in place of a list"),
    "attributes for a dict": (b"}}b.", "a dict in place of a _Object"),
    "attributes many times": (
        b"}(" + b"".join(b"K%cN" % i for i in range(200)) + b"uq\0" + ORDERED_DICT + b"q\1" + b"h\1)Rh\0b" * 99 + b".",
        "it multiplies its content",
    ),
    "an instruction of newer pickles": (pickle.dumps(bytearray(9), 5), "FRAME, which no checkpoint needs"),
    "an instruction of older pickles": (pickle.dumps(1.5, 0), "FLOAT, which no checkpoint needs"),
    "a set": (b"\x8f.", "EMPTY_SET, which no checkpoint needs"),
    "a great length": (b"X\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
    "no end": (b"}", "exhausted before seeing STOP"),
    "too many instructions": (b"N" * (archive.MAX_VALUES + 1), "does not end"),
    "nothing on the stack": (b"R.", "pop from empty list"),
    "no mark": (b"t.", "pop from empty list"),
    "nothing to add to": (b"(e.", "list index out of range"),
    "nothing remembered": (b"h\7.", "7"),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_a_pickle_that_torch_save_does_not_write_is_refused(oddity):
    pickled, words = ODDITIES[oddity]
    with pytest.raises((ValueError, LookupError), match=words):
        archive.follow(io.BytesIO(pickled))


@pytest.mark.parametrize("numbers", [2**40, 7, 5, -1])
def test_a_storage_of_another_size_than_its_record_is_refused(files, tmp_path, numbers):
    def restate(records):
        name = next(name for name in records if name.endswith("data.pkl"))
        stated = pickle.dumps(numbers, 2)[2:-1]
        records[name], times = re.subn(
            rb"(?s)(cpuq.)K\x06(tq.Q)", lambda found: found[1] + stated + found[2], records[name]
        )
        assert times == 1

    with pytest.raises(InputError, match=r"its storage 0 is not of the size|two sizes of storage 0"):
        read_bytes(tmp_path, "odd.pt", rewritten(files["own.pt"], restate))


def test_content_that_unfolds_without_end_is_refused(write):
    """Twenty-five lists, each of which holds the one before it twice."""
    nested = []
    for _ in range(25):
        nested = [nested, nested]
    with pytest.raises(InputError, match="refers to the same parts again and again"):
        read_checkpoint(write(set_in("versions", value={"a": nested})))


def test_an_older_file_whose_storages_are_not_there_is_refused(files, tmp_path):
    whole = files["legacy.pth.tar"]
    with pytest.raises(InputError, match="storages that do not add up"):
        read_bytes(tmp_path, "legacy.pth.tar", whole[:-1])
    with pytest.raises(InputError, match="storages that do not add up"):
        verify(tmp_path / "legacy.pth.tar")


def test_an_older_file_is_read(files, tmp_path):
    older = read_bytes(tmp_path, "a.pth.tar", files["legacy.pth.tar"])
    assert same(older, read_bytes(tmp_path, "a.pth.tar", files["published.pth.tar"]))


def test_a_real_published_file_is_read_in_its_older_form_too(tmp_path):
    content = archive.load(PUBLISHED)
    torch.save(content, tmp_path / "legacy.pth.tar", _use_new_zipfile_serialization=False)
    legacy, now = (
        build_model(read_checkpoint(path), str(TINY_BERT))[0] for path in (tmp_path / "legacy.pth.tar", PUBLISHED)
    )
    assert same(dict(legacy.state_dict()), dict(now.state_dict()))
