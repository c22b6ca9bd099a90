"""The NumPy reference: the specification that everything else in the package is checked against.

It is written to be read, imports numpy and scipy only, and never anything that it judges (compiled kernels, PyTorch
modules).

=====================  =================================================================================================
module                 what it specifies
=====================  =================================================================================================
``quantize``           ternary weights, int8 activations, the 1-bit baseline, straight-through gradients
``packing``            four ways to store a ternary matrix: ``i2``, ``base3``, ``tl1``, ``tl2``
``matmul``             int32 product with a packed matrix, and the linear layer made of it
``losses``             the two distillation losses of [BitDistill], and one of hidden states
=====================  =================================================================================================

Vocabulary, the same in every module
------------------------------------
M, K, T
    Outputs (rows of a weight matrix), inputs (its columns), tokens.
``w``, ``x``
    Float weights of shape (M, K) and activations of shape (..., K).
``w_q``, ``x_q``
    Their int8 integers: weights in {-1, 0, 1}, activations in -127..127.
``w_scale``, ``x_scale``
    float32 scales that always *multiply*: ``w ~ w_scale * w_q``, ``x ~ x_scale * x_q``. No reciprocal is ever stored.
code
    ``w_q + 1``, in {0, 1, 2}; the word is used for nothing else.
tile, block
    Rows and columns that a packing scheme handles at once; shapes are padded up to them with weights 0.
"""

from __future__ import annotations
