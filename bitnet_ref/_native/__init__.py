"""Compiled modules. Nothing here imports anything of bitnet_ref.

    templates/*.pyx.j2 --render--> kernels/<name>.so    one variant each: inner loops only, own instruction-set flags,
                                                        one function pointer in a capsule called KERNEL
    templates/meson.build  ------> _table.py            the names of the variants in this build
    pyx/matmul.pyx         ------> matmul.so            calls any variant: padding, tables, threads
    pyx/cpu.pyx            ------> cpu.so               which instruction sets may run here
    pyx/threads.pyx, limits.pyx                         OpenMP's offer; read bandwidth and int8 multiply-add rate

A variant is imported only after cpu.supported_isas() has named its instruction set: with per-module flags even a
module's initialisation may use the wide registers. bitnet_ref/kernels.py is the only importer.
"""

try:
    from . import _table
except ImportError as error:
    raise ImportError(
        "bitnet_ref is not built here: this is a source folder, its compiled kernels are missing. "
        "Run `make setup` (or `pip install .`) in the checkout and start its Python, or start from another folder."
    ) from error

del _table
