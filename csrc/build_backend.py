"""setuptools' build backend, with nvcc among the build requirements where it is insisted on and
there is none. pip installs them for the build alone: the user's environment stays as it is."""

from nvcc import build_requirements
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


# setuptools' own hooks run setup.py, which insists on nvcc, and return its setup_requires: none.
def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    return build_requirements()


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = get_requires_for_build_wheel
