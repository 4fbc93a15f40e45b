"""`python -m tests.fuzz`; apart from fuzz.deep, whose functions the processes of a run import by name."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, here and in the processes of the run

from tests.fuzz.deep import main

sys.exit(main())
