"""Search pictures by sentences or by pictures.

search.py index makes an index of a folder or a split, or brings it up to date; search.py query asks it, and so does the
page in the browser of search.py serve.
"""

import sys
from collections.abc import Sequence

from lib.cli import InputError, check_packages, program
from lib.config import IndexSettings, QuerySettings, ServeSettings, parse

ABOUT = {
    "index": "Make an index of pictures, or bring it up to date: what is new, has changed or is gone.",
    "query": "Ask an index: the pictures that fit a sentence best, or what is most like a picture.",
    "serve": "A page in the browser that asks an index, and shows what the model looked at.",
}
SETTINGS: dict[str, type] = {"index": IndexSettings, "query": QuerySettings, "serve": ServeSettings}


@program
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in ABOUT:
        lines = [f"search.py {name:<7}{text}" for name, text in ABOUT.items()]
        if argv and argv[0] in ("-h", "--help"):
            print("\n".join([*lines, "search.py index --help, query --help, serve --help: their flags"]))
            return
        raise InputError("expected search.py index ..., query ... or serve ... (see search.py --help)")
    settings = parse(SETTINGS[argv[0]], ABOUT[argv[0]], argv[1:], command=f"search.py {argv[0]}")
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
