"""Training in PyTorch (extra ``[distill]``): the BitNet linear layer, the small model of the package, its pre-training.

Nothing here is imported by the rest of the package, and nothing here is needed to run a model.
"""

from __future__ import annotations
