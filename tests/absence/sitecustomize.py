"""A machine without a network and without any optional package, for this process.

Put this folder on PYTHONPATH and Python imports it at start; the test session installs it too.
"""

import os
import socket
import sys

EXTRAS = (
    "wandb", "ray", "mlx", "mlx_lm", "lm_eval", "mamba_ssm", "causal_conv1d", "flash_attn",
    "fast_hadamard_transform", "fla", "schedulefree", "hqq", "optimum",
)  # fmt: skip


def _refuse(self, address, *rest):
    if self.family == getattr(socket, "AF_UNIX", None):
        return _connect(self, address, *rest)
    raise OSError(f"the network is blocked in tests (tried {address!r})")


_connect = socket.socket.connect


def install():
    """Block outgoing connections and hide the extras."""
    socket.socket.connect = _refuse
    for name in EXTRAS:
        sys.modules.setdefault(name, None)


if os.environ.get("FIVEFOLD_TESTS_ABSENCE") == "1":
    install()
