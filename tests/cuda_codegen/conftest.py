"""What needs a CUDA build of torch, but no GPU: `make test-cuda-codegen`.

With a GPU the same is tested by running it (tests/gpu). Triton's driver is replaced here, so that
these tests want a process of their own.
"""

import torch

collect_ignore_glob = [] if torch.version.cuda and not torch.cuda.is_available() else ["*"]
