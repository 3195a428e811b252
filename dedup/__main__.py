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
    words = sys.argv[1:] if argv is None else argv
    from dedup.errors import OutOfMemory, is_refusal

    try:
        from dedup.cli.guard import run

        return run(words)
    except (ImportError, MemoryError) as e:
        if not is_refusal(e):
            raise
        # Not even an error can be told as others are.
        message, hint = "no memory to start", "allow more: `ulimit -v unlimited`"
        text = f"dedup: {message}; {hint}"
        if "--json" in words:
            error = f'"code": "{OutOfMemory.code}", "message": "{message}", "hint": "{hint}"'
            text = f'{{"schema_version": 1, "kind": "error", "error": {{{error}}}}}'
        os.write(1 if "--json" in words else 2, f"{text}\n".encode())
        return OutOfMemory.exit_status


if __name__ == "__main__":
    sys.exit(main())
