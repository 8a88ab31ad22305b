"""AdaAttn: an attention compiler as a torch.compile backend, for unmodified models.

    import torch
    import adaattn_compiler

    fast = torch.compile(model, backend="adaattn")  # found by name: no import is needed
    with torch.no_grad():
        out = fast(tokens)
        print(adaattn_compiler.explain(model, tokens))  # what was found, and what became of it

`explain` tells what is done to a model, attention by attention, and why; with `target="H200"`, also
what would run on a GPU that need not be there. `adaattn-explain` does the same from a shell.

Everything is exact unless a policy says otherwise: `calibrate` (or `adaattn-calibrate`) measures a
model and writes one, options={"policy": "policy.json"} runs it, `stats` tells what its heads met.

`Options` lists what can be set, with `torch.compile(..., options={"measure": False})` or in the
environment: ADAATTN_ENABLED, ADAATTN_VALIDATE, ADAATTN_MEASURE, ADAATTN_KERNELS,
ADAATTN_CACHE_DIR, ADAATTN_DUMP_DIR, ADAATTN_ANALYSIS_SECONDS, ADAATTN_POLICY, ADAATTN_AUDIT_ROWS,
ADAATTN_MODE, ADAATTN_ONLINE_CALLS, ADAATTN_ONLINE_BUDGET, ADAATTN_HEURISTIC.

TORCH_LOGS="+adaattn_compiler" shows each decision, pass and failure.
"""

from adaattn_compiler.backend import adaattn
from adaattn_compiler.calibrate import calibrate
from adaattn_compiler.explain import Explanation, explain
from adaattn_compiler.kernels.predict import Prediction
from adaattn_compiler.options import Options
from adaattn_compiler.policy import Policy, PolicyError
from adaattn_compiler.records import SiteRecord
from adaattn_compiler.stats import Stats, stats
from adaattn_compiler.target import DeviceTarget

__version__ = "0.1.0"

__all__ = [
    "DeviceTarget",
    "Explanation",
    "Options",
    "Policy",
    "PolicyError",
    "Prediction",
    "SiteRecord",
    "Stats",
    "__version__",
    "adaattn",
    "calibrate",
    "explain",
    "stats",
]
