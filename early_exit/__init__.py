"""Early exits for decoder language models: leave when the answer is known, keep the state right."""

from workbench.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Adapter": "early_exit.adapters.base",
        "CRITERIA": "early_exit.criteria",
        "Costs": "early_exit.adapters.base",
        "Decoded": "early_exit.engine",
        "EarlyExitModel": "early_exit.model",
        "Engine": "early_exit.engine",
        "Exits": "early_exit.heads",
        "Tally": "early_exit.accounting",
        "adapt": "early_exit.adapters.base",
        "dynamax_speedup": "early_exit.accounting",
        "load_exits": "early_exit.model",
        "sampler": "early_exit.model",
    },
)
