"""Whether the packages this project needs are there and fit each other.

python -m lib.environment requirements.txt [more.txt]     exit code 0 if all are there in a version that will do
"""

import importlib
import sys
from importlib import metadata
from pathlib import Path

from lib.cli import InputError

HOW_TO_INSTALL = "activate the environment of the set-up (. .venv/bin/activate) or run: pip install -r requirements.txt"


def missing_packages(requirements: list[Path]) -> list[str]:
    """The lines of requirements files that the running Python does not meet."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging"]
    lines = [line.split("#")[0].strip() for path in requirements for line in path.read_text().splitlines()]
    missing = []
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("-")):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(str(requirement))
    return missing


def check_packages() -> None:
    """Raises InputError where PyTorch or transformers is missing, or torchvision was built for another torch."""
    for name in ("torch", "transformers"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"{name} cannot be imported ({error}): {HOW_TO_INSTALL}") from None
    try:
        importlib.import_module("torchvision")  # transformers imports it wherever it is installed
    except ModuleNotFoundError:
        return
    except (ImportError, RuntimeError, OSError) as error:
        raise InputError(
            f"torchvision {metadata.version('torchvision')} does not fit torch {metadata.version('torch')} ({error}): "
            "reinstall both from one place: pip install --force-reinstall torch torchvision"
        ) from None


def _main() -> int:
    missing = missing_packages([Path(name) for name in sys.argv[1:]])
    if missing or sys.version_info < (3, 11):
        print(f"error: needs Python 3.11 or newer and {', '.join(missing) or 'its packages'}", file=sys.stderr)
        return 1
    try:
        check_packages()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
