"""Compression of any matrix without activations: LPLR, LPLR-SVD, direct SVD, plain rounding.
[arXiv 2310.11028]"""

from workbench.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "METHODS": "lplr_q.data_agnostic.budget",
        "CompressedMatrix": "lplr_q.data_agnostic.compressed",
        "UniformCodes": "lplr_q.data_agnostic.naive",
        "apply_sketch": "lplr_q.data_agnostic.sketch",
        "compress_dsvd": "lplr_q.data_agnostic.dsvd",
        "compress_iterative": "lplr_q.data_agnostic.iterative",
        "compress_lplr": "lplr_q.data_agnostic.lplr",
        "compress_lplr_q": "lplr_q.data_agnostic.iterative",
        "compress_lsvd": "lplr_q.data_agnostic.lsvd",
        "compress_naive": "lplr_q.data_agnostic.naive",
        "compress_to_budget": "lplr_q.data_agnostic.budget",
        "quantise_uniform": "lplr_q.data_agnostic.naive",
        "rank_for_ratio": "lplr_q.data_agnostic.budget",
        "search_bits": "lplr_q.data_agnostic.budget",
    },
)
