"""The command `dedup`."""

from __future__ import annotations

import os
import sys

# NumPy's BLAS would start threads that spin for a while, on the cores that we read with.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : list of str, optional
        The words after the program's name.

    Returns
    -------
    int
        The exit status.
    """
    from dedup.cli.guard import run

    return run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
