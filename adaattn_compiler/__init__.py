"""AdaAttn: an attention compiler as a torch.compile backend.

    model = torch.compile(model, backend="adaattn")

`explain(model, *inputs)` tells what it does to a model.
"""

from adaattn_compiler.backend import adaattn
from adaattn_compiler.explain import Explanation, SiteRecord, explain
from adaattn_compiler.options import Options

__version__ = "0.1.0"

__all__ = ["Explanation", "Options", "SiteRecord", "__version__", "adaattn", "explain"]
