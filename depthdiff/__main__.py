"""`python -m depthdiff`, the same as the command `depthdiff`."""

import sys

from depthdiff.cli import main

sys.exit(main())
