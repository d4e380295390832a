"""Invariant: the repo root is the package `balanced_offload`, whatever the folder is called, and tests never ship.

Everything else is declared in pyproject.toml; only the package list needs code, so that a new sub-package cannot be
forgotten.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGE = "balanced_offload"
SCRIPTS = {"run", "setup"}


class BuildWithoutScripts(build_py):
    """The root's scripts lie beside `__init__.py`, but are no part of the package."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [found for found in modules if package != PACKAGE or found[1] not in SCRIPTS]


setup(
    packages=[PACKAGE] + [f"{PACKAGE}.{name}" for name in find_packages(include=["nodes*", "offload*"])],
    package_dir={PACKAGE: "."},
    cmdclass={"build_py": BuildWithoutScripts},
)
