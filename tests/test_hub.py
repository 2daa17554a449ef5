"""What --bert means, and that nothing but our own line is written while a BERT is fetched."""

import logging

import pytest
from huggingface_hub.utils import logging as hub_logging
from transformers import BertConfig, BertModel, BertTokenizer
from transformers.utils import logging as transformers_logging

from lib.bert import BERT_BASE, read_config, start_bert
from lib.data.tokenizer import load_tokenizer
from lib.hub import is_folder, quiet
from tests.damage import refusal


def test_a_folder_is_told_from_a_name(tmp_path):
    assert is_folder(str(tmp_path))
    for name in (BERT_BASE, "google/" + BERT_BASE, "", "a\0b", "x" * 5000, str(tmp_path / "nothing")):
        assert not is_folder(name)


def test_a_file_is_no_folder_nor_a_name(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    for read in (is_folder, read_config, start_bert, lambda bert: load_tokenizer(bert, 64, 134)):
        assert refusal(read, str(path)).startswith(f"--bert {path}: is a file; give the folder")


def levels():
    """What is written of the libraries' messages, and whether progress is shown."""
    names = ("huggingface_hub", "transformers")
    return [
        logging.getLogger(name).getEffectiveLevel() for name in names
    ], transformers_logging.is_progress_bar_enabled()


@pytest.fixture
def usual_levels():
    """What a session without our programs would be told: warnings and progress."""
    verbosity = hub_logging.get_verbosity(), transformers_logging.get_verbosity()
    progress = transformers_logging.is_progress_bar_enabled()
    hub_logging.set_verbosity_warning()
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    yield levels()
    hub_logging.set_verbosity(verbosity[0])
    transformers_logging.set_verbosity(verbosity[1])
    if not progress:
        transformers_logging.disable_progress_bar()


SILENT = ([logging.ERROR, logging.ERROR], False)


def test_quiet_silences_the_libraries_and_then_leaves_them_as_they_were(usual_levels):
    with quiet():
        assert levels() == SILENT
    assert levels() == usual_levels
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert levels() == usual_levels


@pytest.mark.parametrize(
    ("read", "library", "name"),
    [
        (read_config, BertConfig, "get_config_dict"),
        (start_bert, BertModel, "from_pretrained"),
        (lambda bert: load_tokenizer(bert, 64, 134), BertTokenizer, "from_pretrained"),
    ],
)
def test_whatever_is_fetched_is_fetched_quietly(usual_levels, monkeypatch, read, library, name):
    found = []

    def fetch(*args, **kwargs):
        found.append(levels())
        raise OSError("no network")

    monkeypatch.setattr(library, name, fetch)
    message = refusal(read, BERT_BASE if library is BertModel else "someone/bert")
    assert "no network" in message
    assert found == [SILENT]
