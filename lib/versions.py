"""What a run was made with: versions of this code and of the packages whose arithmetic it depends on."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from lib import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
ROOT = Path(__file__).resolve().parent.parent


def versions() -> dict[str, str]:
    """Names to versions; `git` is this code's commit, with a + where files differ from it, empty without git."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"x-dim": __version__, "git": git_commit(ROOT), "python": platform.python_version(), **packages}


def git_commit(root: Path) -> str:
    """The commit that a folder is a checkout of, with a + where tracked files differ from it; empty if it is none."""
    try:
        top, commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != root.resolve():  # only inside somebody else's checkout
            return ""
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
