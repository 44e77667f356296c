"""One interface to the blocks of a decoder, whatever its family."""

from workbench.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ADAPTERS": "early_exit.adapters.base",
        "Adapter": "early_exit.adapters.base",
        "adapt": "early_exit.adapters.base",
        "AttentionAdapter": "early_exit.adapters.attention",
        "MambaAdapter": "early_exit.adapters.mamba",
    },
)
