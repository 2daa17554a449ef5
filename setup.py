"""What `pip install .` installs: lib/ as the package `xdim`, because everybody has a `lib`, and a command a program.

xdim, xdim.model, ...   lib/ with its imports renamed
xdim.programs           train.py and its neighbours, which are the commands xdim-train, ...
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import SetupError

PROGRAMS = sorted({path.stem for path in Path().glob("*.py")} - {"setup"})
RENAMED = (  # names of files in quotes stay, and numpy.lib
    (r"(?<![\w.])lib\b", "xdim"),
    (r"python -m xdim\.prepare\b", "xdim-prepare"),
    (rf'(?:python )?(?<![\w/])({"|".join(PROGRAMS)})\.py\b(?!")', r"xdim-\1"),
)


class Renaming(build_py):
    """Copies each module under the names of the installed form."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [one for one in super().find_package_modules(package, package_dir) if one[1] != "setup"]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        written, copied = super().build_module(module, module_file, package)
        text = Path(written).read_text(encoding="utf-8")
        for old, new in RENAMED:
            text = re.sub(old, new, text)
        Path(written).write_text(text, encoding="utf-8")
        return written, copied


class Refusing(editable_wheel):
    """Its files would be those of lib/, which import `lib`."""

    def run(self) -> None:
        raise SetupError("an editable install has no package xdim: pip install . or, in the checkout, import lib")


setup(
    packages=["xdim", *(f"xdim.{name}" for name in find_packages("lib")), "xdim.programs"],
    package_data={"xdim": ["model_card.md", "figures/gallery.html"]},
    package_dir={"xdim": "lib", "xdim.programs": "."},
    entry_points={
        "console_scripts": [
            *(f"xdim-{name} = xdim.programs.{name}:main" for name in PROGRAMS),
            "xdim-prepare = xdim.prepare.__main__:main",
        ]
    },
    cmdclass={"build_py": Renaming, "editable_wheel": Refusing},
)
