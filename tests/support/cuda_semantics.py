"""CUDA's choices on the meta device, under the names that tests know them by."""

from __future__ import annotations

from memplan.probes.attention import RANDOM_STATES as SDPA_RANDOM_STATES
from memplan.probes.attention import choose_kernel as sdpa_kernel
from memplan.probes.autocast import CudaAutocast
from memplan.probes.kernels import SCRATCH_BY_OPERATOR
from memplan.probes.semantics import cuda_semantics

__all__ = ["SCRATCH_BY_OPERATOR", "SDPA_RANDOM_STATES", "CudaAutocast", "cuda_semantics", "sdpa_kernel"]
