"""`python -m setriton`, and so `torchrun -m setriton`."""

import os

from setriton.cli import main

if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:
        from setriton.train.distributed import leave

        leave(status)
    raise SystemExit(status)
