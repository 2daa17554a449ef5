"""What reading a BERT has in common, whether from a folder or by name from the Hugging Face hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.cli import InputError

TEXT_FILES = (".json", ".txt", ".jinja")  # all but weights
TEXT_BYTES = 16 * 2**20  # the largest vocabularies of any BERT (500,000 entries) take 10 MB as tokenizer.json


def is_folder(bert: str) -> bool:
    """Whether --bert means a folder rather than a name on the hub.

    Raises InputError where it is a file, or a folder whose configuration or vocabulary is too large to be one: they are
    read as a whole.
    """
    if os.path.isfile(bert):
        raise InputError(f"--bert {bert}: is a file; give the folder that holds config.json and vocab.txt")
    for path in sorted(Path(bert).glob("*")) if os.path.isdir(bert) else ():
        if path.suffix in TEXT_FILES and os.path.isfile(path) and path.stat().st_size > TEXT_BYTES:
            raise InputError(
                f"--bert {bert}: {path.name} is larger than {TEXT_BYTES // 2**20} MB; it is none of BERT's"
            )
    return os.path.isdir(bert)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and the hub from writing to the terminal meanwhile; an exception says how it ended.

    They would tell of six attempts without a network, of each file fetched, and of weights left out on purpose.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    before = [(module, module.get_verbosity()) for module in (hub_logging, logging)]
    progress = logging.is_progress_bar_enabled()
    for module, _ in before:
        module.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        for module, verbosity in before:
            module.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
