"""Which folder is which package; everything else about the project is in pyproject.toml.

`passes/` and `kernels/` live at the root of the repository and are the subpackages
`adaattn_compiler.passes` and `adaattn_compiler.kernels` once installed. A static list in
pyproject.toml would have to name every package below them too, and one that was forgotten would be
missing from the wheel only, where no test of the working tree looks.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "adaattn_compiler": "adaattn_compiler",
    "adaattn_compiler.passes": "passes",
    "adaattn_compiler.kernels": "kernels",
}


def with_subpackages(package: str, folder: str) -> list[str]:
    return [package, *(f"{package}.{name}" for name in find_packages(folder))]


setup(
    package_dir=FOLDERS,
    packages=[
        name for package, folder in FOLDERS.items() for name in with_subpackages(package, folder)
    ],
)
