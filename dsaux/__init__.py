"""dsaux: layer-parallel training of deep residual networks, without the locks of back-propagation.

An extension of DeepSpeed's pipeline engine. `import dsaux` is cheap: the names below bring PyTorch and DeepSpeed
with them when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AuxPipelineEngine": "dsaux.engine",
    "AuxPipelineModule": "dsaux.module",
    "ConfigError": "dsaux.config_rules",
    "initialize": "dsaux.bootstrap",
}
__all__ = ["AuxPipelineEngine", "AuxPipelineModule", "ConfigError", "__version__", "initialize"]

if TYPE_CHECKING:
    from dsaux.bootstrap import initialize
    from dsaux.config_rules import ConfigError
    from dsaux.engine import AuxPipelineEngine
    from dsaux.module import AuxPipelineModule


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dsaux' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
