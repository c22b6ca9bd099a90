# The inner loops of decoder_steps.h as one capsule. Built once for each instruction set, from this one source, as
# steps__<isa> (templates/meson.build); values do not depend on which of them runs.
from cpython.pycapsule cimport PyCapsule_New

cdef extern from *:
    """
    #define DECODER_STEPS_LOOPS
    """

cdef extern from "decoder_steps.h":
    ctypedef struct decoder_steps:
        pass
    const decoder_steps the_decoder_steps

STEPS = PyCapsule_New(<void*>&the_decoder_steps, b"bitnet_ref.steps/3", NULL)
