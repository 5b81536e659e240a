"""`python -m merge_rl` is the same as `mergerl`, so that torchrun can start it."""

from __future__ import annotations

from merge_rl.cli.main import main

if __name__ == "__main__":
    main()
