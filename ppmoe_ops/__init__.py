"""Custom kernels for PyTorch: expert slicing, ladder attention and equilibrium solves.

Every operator is `torch.ops.ppmoe_ops.<name>` and, with its documentation, `ppmoe_ops.<name>`.
"""

import torch as _torch

_MINIMUM_TORCH = (2, 11)
if tuple(int(part) for part in _torch.__version__.split(".")[:2]) < _MINIMUM_TORCH:
    raise ImportError(
        f"ppmoe_ops: found torch {_torch.__version__}; needed 2.11 or later. Ways out: "
        "install a newer torch; use a virtual environment that has one; or pin an older "
        "ppmoe_ops that supports yours."
    )

from ppmoe_ops import ops as _ops  # noqa: E402
from ppmoe_ops._backends import install as _install  # noqa: E402
from ppmoe_ops._sharding import enable_dtensor  # noqa: E402
from ppmoe_ops._version import __version__  # noqa: E402
from ppmoe_ops.ops import *  # noqa: E402, F403
from ppmoe_ops.ops.equilibrium.equilibrium import equilibrium  # noqa: E402
from ppmoe_ops.ops.equilibrium.equilibrium_info import (  # noqa: E402
    EquilibriumInfo,
    EquilibriumWarning,
)
from ppmoe_ops.ops.equilibrium.options import SolverOptions  # noqa: E402
from ppmoe_ops.ops.expert_slice import moe_ffn  # noqa: E402

_install()

__all__ = [
    "EquilibriumInfo",
    "EquilibriumWarning",
    "SolverOptions",
    "__version__",
    "enable_dtensor",
    "equilibrium",
    "moe_ffn",
    *_ops.__all__,
]
