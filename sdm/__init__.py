"""When may a prediction be trusted? Similarity-distance-magnitude (SDM) estimators."""

from workbench.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Region": "sdm.calibrate",
        "SDMClassifier": "sdm.estimator",
        "SDMModel": "sdm.model",
        "SDMResult": "sdm.model",
        "Support": "sdm.matching",
        "match": "sdm.matching",
        "region_search": "sdm.calibrate",
        "sdm_loss": "sdm.activation",
    },
)
