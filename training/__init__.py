"""Turn a dataset into an adapter, a merged FP16 folder and a Q8_0 GGUF; needs torch only inside the functions that train."""

import os

# An OpenMP thread that waits spins first: on a machine that is busy with anything else the default spin makes training up
# to ten times slower, no spin at all (OMP_WAIT_POLICY=passive) a third slower when it is idle. Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
