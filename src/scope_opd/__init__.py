"""SCOPE: signal-calibrated on-policy distillation (arXiv 2604.10688).

Importing the package loads neither torch nor transformers; ask for what you need by its room, for example
``from scope_opd.objective.methods import build_method``.
"""

__version__ = "0.1.0"
