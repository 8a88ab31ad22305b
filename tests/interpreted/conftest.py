"""What runs in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`, or `make test`.

Triton looks at the variable when it is imported, so that one process cannot have both.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]
