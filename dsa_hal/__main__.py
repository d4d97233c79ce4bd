"""`python -m dsa_hal`: the same program as `dsa-hal`."""

from dsa_hal.cli import main

raise SystemExit(main())
