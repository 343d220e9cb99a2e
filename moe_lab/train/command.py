"""How a command ends: errors are one line on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from moe_lab.config import ConfigError
from moe_lab.train.checkpoint import RunError
from moe_lab.train.device import is_out_of_memory


def exit_code(body: Callable[..., int | None], *arguments: Any) -> int:
    """Call a command's body. Its own code, or 0; 2: wrong input, or a run that cannot start or go on; 130: Ctrl-C."""
    try:
        return body(*arguments) or 0
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory before the first step: lower model.d_model or model.n_layers", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 2
