"""Which part of a transformer's residual stream is carried forward linearly, and which is computed anew?

Activation Transport Operators (arXiv 2508.17540) on nnsight. Names are loaded on first use: `import nnato` imports neither torch
nor nnsight.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnato.accumulation import Accumulated, accumulate, load_moments
    from nnato.cca import CanonicalCorrelations, canonical_correlations
    from nnato.corpus import Corpus
    from nnato.dictionaries import Dictionary, load_dictionary
    from nnato.effects import AblationResult
    from nnato.efficiency import Efficiency, transport_efficiency
    from nnato.errors import NnatoError
    from nnato.features import FeatureResult, evaluate_features
    from nnato.fitting import Fit, fit
    from nnato.models import load_model
    from nnato.moments import Moments
    from nnato.operators import TransportOperator
    from nnato.perplexity import ablate
    from nnato.remote import NdifServer
    from nnato.scaling import Scaling, scaling_study
    from nnato.selection import Method
    from nnato.sites import ResidualSite
    from nnato.trace import ATOTrace
    from nnato.transport_moments import TransportMoments

__version__ = "0.1.0"

_HOMES = {
    "ATOTrace": "trace",
    "AblationResult": "effects",
    "Accumulated": "accumulation",
    "CanonicalCorrelations": "cca",
    "Corpus": "corpus",
    "Dictionary": "dictionaries",
    "Efficiency": "efficiency",
    "FeatureResult": "features",
    "Fit": "fitting",
    "Method": "selection",
    "Moments": "moments",
    "NdifServer": "remote",
    "NnatoError": "errors",
    "ResidualSite": "sites",
    "Scaling": "scaling",
    "TransportMoments": "transport_moments",
    "TransportOperator": "operators",
    "ablate": "perplexity",
    "accumulate": "accumulation",
    "canonical_correlations": "cca",
    "evaluate_features": "features",
    "fit": "fitting",
    "load_dictionary": "dictionaries",
    "load_model": "models",
    "load_moments": "accumulation",
    "scaling_study": "scaling",
    "transport_efficiency": "efficiency",
}

__all__ = [
    "ATOTrace",
    "AblationResult",
    "Accumulated",
    "CanonicalCorrelations",
    "Corpus",
    "Dictionary",
    "Efficiency",
    "FeatureResult",
    "Fit",
    "Method",
    "Moments",
    "NdifServer",
    "NnatoError",
    "ResidualSite",
    "Scaling",
    "TransportMoments",
    "TransportOperator",
    "__version__",
    "ablate",
    "accumulate",
    "canonical_correlations",
    "evaluate_features",
    "fit",
    "load_dictionary",
    "load_model",
    "load_moments",
    "scaling_study",
    "transport_efficiency",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nnato' has no attribute {name!r}")
    value = getattr(import_module(f"nnato.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
