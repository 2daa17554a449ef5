"""A BERT's configuration: what it says is what is built, and nothing absurd is tried."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.bert import FIXED, MOST_PARAMETERS, NUMBERS, build_bert, make_config, plain, read_config, start_bert
from tests.conftest import TINY_BERT
from tests.damage import changes, cuts, grow, memory_below, refusal, spoil, unless_refused, write_bytes

TINY = json.loads((TINY_BERT / "config.json").read_text())
DAMAGED = "its config.json or weights are damaged, or not BERT's"
LARGE = {
    "vocab_size": 30522,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
MULTILINGUAL = {"vocab_size": 501153, "hidden_size": 768}


@pytest.fixture
def bert(tmp_path):
    """A folder of a BERT that a test may damage."""
    return shutil.copytree(TINY_BERT, tmp_path / "bert")


def configure(bert, content):
    (bert / "config.json").write_text(json.dumps(content))
    return bert


# What is read


@pytest.mark.parametrize("content", [TINY, LARGE, MULTILINGUAL, {}])
def test_what_is_written_is_what_is_read(bert, content):
    config = read_config(str(configure(bert, content)))
    for name in content.keys() & NUMBERS.keys():
        assert getattr(config, name) == content[name]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_may_be_in_any_encoding_of_unicode(bert, encoding):
    (bert / "config.json").write_bytes(json.dumps(TINY).encode(encoding))
    assert read_config(str(bert)).hidden_size == TINY["hidden_size"]


def test_a_configuration_survives_a_checkpoint(bert):
    config = read_config(str(bert))
    assert plain(make_config(plain(config))) == plain(config)
    assert plain(build_bert(plain(config)).config)["hidden_size"] == TINY["hidden_size"]


@pytest.mark.parametrize(
    "surplus",
    [
        {"num_labels": 10**9},
        {"id2label": {"0": "x"}, "num_labels": 10**9},
        {"attn_implementation": "someone/kernels"},
        {"dtype": "load"},
        {"per_layer_config": {"0": {"hidden_size": 10**9}}},
        {"return_dict": False, "output_attentions": True},
        {"configuration_files": ["config.9.json"]},
        {"auto_map": {"AutoConfig": "evil.Evil"}},
    ],
    ids=str,
)
def test_nothing_but_the_encoders_settings_is_taken(bert, surplus):
    with memory_below(2**20):
        config = read_config(str(configure(bert, TINY | surplus)))
    assert plain(config) == plain(read_config(str(TINY_BERT)))


# What is refused


BAD_NUMBERS = [-1, 10**9, 10**30, "2", None, True, [2], {"2": 2}, float("nan"), float("inf")]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_none_or_absurd_are_named(bert, name, value):
    configure(bert, TINY | {name: value})
    with memory_below(2**20):
        message = refusal(read_config, str(bert))
        assert message.startswith(f"--bert {bert}: {DAMAGED} ({name} is ")
        assert refusal(start_bert, str(bert)) == message
        assert f"({name} is " in refusal(build_bert, TINY | {name: value})


@pytest.mark.parametrize("name", [name for name, (least, _) in NUMBERS.items() if isinstance(least, int)])
@pytest.mark.parametrize("value", [0, 2.5])
def test_sizes_are_whole_and_not_nothing(bert, name, value):
    assert f"({name} is {value}" in refusal(read_config, str(configure(bert, TINY | {name: value})))


def test_sizes_that_only_together_are_absurd_are_refused(bert):
    largest = {name: most for name, (_, most) in NUMBERS.items()}
    with memory_below(2**20):
        assert f"more than {MOST_PARAMETERS:,}" in refusal(read_config, str(configure(bert, largest)))


def test_the_limit_counts_the_parameters_that_are_built(monkeypatch):
    built = sum(weight.numel() for weight in build_bert(TINY).parameters())
    monkeypatch.setattr("lib.bert.MOST_PARAMETERS", built)
    build_bert(TINY)
    monkeypatch.setattr("lib.bert.MOST_PARAMETERS", int(0.95 * built))  # biases and norms are not counted
    assert "more than" in refusal(build_bert, TINY)


@pytest.mark.parametrize(("name", "value"), [*zip(FIXED, ["roberta", "relative_key", True], strict=True)])
def test_a_model_that_is_another_is_refused(bert, name, value):
    assert f"({name} is {value!r}" in refusal(read_config, str(configure(bert, TINY | {name: value})))


@pytest.mark.parametrize(
    "changed", [{"num_attention_heads": 3}, {"hidden_act": "nothing"}, {"hidden_act": [1]}], ids=str
)
def test_settings_that_do_not_go_together_are_refused(bert, changed):
    message = refusal(start_bert, str(configure(bert, TINY | changed)))
    assert "config.json" in message


@pytest.mark.parametrize("content", ["", "[]", "null", "3", '"bert"', "{", "[" * 10**5, '{"a":' * 10**5, "1" * 10**5])
def test_a_configuration_that_is_no_table_is_refused(bert, content):
    (bert / "config.json").write_text(content)
    assert refusal(read_config, str(bert)).startswith(f"--bert {bert}: {DAMAGED}")


def test_gigabytes_are_refused_before_they_are_read(bert):
    grow(bert / "config.json", 2**33)
    with memory_below(2**20):
        for read in (read_config, start_bert):
            assert refusal(read, str(bert)).startswith(f"--bert {bert}: config.json is larger than 16 MB")


# Whatever the bytes are


VALUES = st.one_of(
    st.sampled_from([1, 2, 3, 4, 8, 16, 64]),
    st.sampled_from([0.0, 0.1, 1.0, *BAD_NUMBERS]),
    st.recursive(st.one_of(st.none(), st.text()), lambda inner: st.lists(inner, max_size=2), max_leaves=3),
)
NAMES = [*NUMBERS, *FIXED, "hidden_act", "num_labels", "pad_token_id", "dtype", "attn_implementation", "architectures"]


@settings(deadline=None, max_examples=600)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
def test_any_settings_are_those_of_the_model_or_refused(changed):
    content = TINY | changed
    model = unless_refused(lambda: build_bert(content), "BERT's config.json describes no model that can be built (")
    assert model is not None or changed.keys() & {*NUMBERS, *FIXED, "hidden_act"}
    if model is not None:
        shape = content["vocab_size"], content["hidden_size"]
        assert tuple(model.embeddings.word_embeddings.weight.shape) == shape
        assert len(model.encoder.layer) == content["num_hidden_layers"]


COMPACT = json.dumps({name: TINY[name] for name in (*NUMBERS, *FIXED, "hidden_act") if name in TINY}).encode()


@settings(deadline=None, max_examples=1000)
@given(kept=cuts(len(COMPACT)), changed=changes(len(COMPACT)), encoding=st.sampled_from(["utf-8", "utf-16", "utf-7"]))
def test_any_bytes_are_the_configuration_they_say_or_refused(tmp_path_factory, kept, changed, encoding):
    folder = tmp_path_factory.getbasetemp() / "any_config"
    folder.mkdir(exist_ok=True)
    content = spoil(COMPACT.decode().encode(encoding), kept, changed)
    write_bytes(folder / "config.json", content)
    config = unless_refused(lambda: read_config(str(folder)), f"--bert {folder}: {DAMAGED} (")
    if content == COMPACT:
        assert config is not None
    if config is not None:
        said = json.loads(content)
        for name, (least, most) in NUMBERS.items():
            assert name not in said or getattr(config, name) == said[name]
            assert least <= getattr(config, name) <= most
