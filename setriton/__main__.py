"""`python -m setriton`, and so `torchrun -m setriton`."""

from setriton.cli import main

raise SystemExit(main())
