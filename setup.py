"""Build of the one compiled module; everything else stands in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

# DEDUP_DEBUG=1 turns Cython's run-time checks on, for the tests of the core itself.
debug = os.environ.get("DEDUP_DEBUG") == "1"

setup(
    ext_modules=cythonize(  # type: ignore[no-untyped-call]
        [
            Extension(
                "dedup._core",
                ["dedup/_core.pyx"],
                depends=["dedup/ptrace.h"],
                extra_compile_args=["-O1", "-g"] if debug else ["-O3", "-fno-strict-aliasing"],
                define_macros=[("_GNU_SOURCE", "1")],
            )
        ],
        compiler_directives={
            "language_level": "3",
            "boundscheck": debug,
            "wraparound": False,
            "initializedcheck": debug,
            "cdivision": not debug,
            "embedsignature": True,
            "freethreading_compatible": True,
        },
    )
)
