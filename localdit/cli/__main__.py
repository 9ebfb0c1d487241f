"""`python -m localdit.cli`, for launchers that want a module."""

import sys

from localdit.cli import main

sys.exit(main())
