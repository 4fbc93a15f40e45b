"""`python -m tests.fuzz`; apart from fuzz.deep, whose functions the processes of a run import by name."""

import sys

from tests.fuzz.deep import main

sys.exit(main())
