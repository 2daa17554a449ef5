"""Search pictures by sentences or by pictures.

search.py index makes an index of a folder or a split, or brings it up to date; search.py query asks it, and so does the
page in the browser of search.py serve.
"""

import sys
from collections.abc import Sequence

from lib.cli import check_packages, program
from lib.config import IndexSettings, QuerySettings, ServeSettings, parse_command

COMMANDS = {
    "index": (IndexSettings, "Make an index of pictures, or bring it up to date: what is new, has changed or is gone."),
    "query": (QuerySettings, "Ask an index: the pictures that fit a sentence best, or what is most like a picture."),
    "serve": (ServeSettings, "A page in the browser that asks an index, and shows what the model looked at."),
}


@program
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_command(COMMANDS, argv)
    check_packages()
    from lib.search.fill import index  # importing PyTorch takes seconds: not before the flags are right
    from lib.search.index import answer

    if isinstance(settings, IndexSettings):
        index(settings)
    elif isinstance(settings, ServeSettings):
        from lib.search.page import serve  # needs Gradio

        serve(settings)
    else:
        print(answer(settings))


if __name__ == "__main__":
    sys.exit(main())
