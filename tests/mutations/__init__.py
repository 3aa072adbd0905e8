"""The bugs that `mutate.py` plants: a changed sign, bound or weight for every kernel and contract.

Every one of them must fail a test. A change that no result depends on (a block size, an order of
independent steps) does not belong here.
"""

from mutations.contracts import CONTRACTS
from mutations.cuda import CUDA_KERNELS
from mutations.equilibrium_cell import EQUILIBRIUM_CELL
from mutations.equilibrium_conv_cell import EQUILIBRIUM_CONV_CELL
from mutations.equilibrium_mix import EQUILIBRIUM_MIX
from mutations.equilibrium_solve import EQUILIBRIUM_SOLVE
from mutations.expert_ffn import EXPERT_FFN
from mutations.kernels import KERNELS
from mutations.ladder_attention import LADDER_ATTENTION
from mutations.mutation import Mutation as Mutation
from mutations.products import PRODUCTS
from mutations.triton_ffn import TRITON_FFN
from mutations.triton_memory import TRITON_MEMORY
from mutations.tuning import TUNING

MUTATIONS = (
    *KERNELS,
    *PRODUCTS,
    *EXPERT_FFN,
    *LADDER_ATTENTION,
    *EQUILIBRIUM_CELL,
    *EQUILIBRIUM_CONV_CELL,
    *EQUILIBRIUM_MIX,
    *EQUILIBRIUM_SOLVE,
    *CUDA_KERNELS,
    *CONTRACTS,
    *TRITON_FFN,
    *TRITON_MEMORY,
    *TUNING,
)
