"""What the compiled parts of the CPU engine take: the sizes of a model, and where all that it needs lies in memory.

Fields in capitals are addresses, as simd.py explains. Rows are padded with zeros to a multiple of 16: M and O are the
padded embedding dimension and outputs. Of the K columns of W_T, G_T and Z those from `at_out` - `at_b` on are of the
linear path, those before of neurons and their padding. N features, B samples.
"""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """One model, the batches it sees, and memory to work in: sizes, and addresses of float32 unless said otherwise.

    Shapes of the scratch are those of `train`; cpu_dense.py puts whole batches at X and E, and W_out at G_T.
    """

    task: int
    """0 decoder, 1 reprojector, 2 abs: its position in `fastmono.spec.TASKS`."""
    optimizer: int
    """0 lamb, 1 adamw, 2 sgd, as in `fastmono.spec.OPTIMIZERS`."""
    through_features: int
    """Whether z comes from G (1) or from x (0)."""
    decay: int
    """0 global, 1 per_neuron, 2 rate, as in `fastmono.spec.BIAS_DECAY_MODES`."""
    N: int
    M: int
    k: int
    r: int
    """Rank of the linear path."""
    K: int
    O: int  # noqa: E741
    B: int
    LK: int
    """Length of a row of W_T and G_T, and of the lists ACTIVE, H and DZ."""
    LE: int
    """Length of a row of E."""
    STARTS: int
    """int32 [steps, B + 1]: where each sample's present features begin in the next two."""
    INDICES: int
    """int32: the present features."""
    VALUES: int
    P_T: int
    """[N, M]"""
    P: int
    """[M, NP]"""
    NP: int
    """N, padded."""
    P2_T: int
    """[N, O]; the reprojector's only."""
    PARAMETERS: int
    """W_in [k + r, M], b [k, padded], W_out^T [k + r, O], as are both moments and GRADIENT."""
    FIRST: int
    SECOND: int
    GRADIENT: int
    at_b: int
    """Where b begins in them."""
    at_out: int
    """Where W_out^T begins."""
    size: int
    G_T: int
    """[N, LK]: its columns are those of NEURONS."""
    W_T: int
    """[M, LK]: W_in^T, in the same order."""
    X: int
    """[TILE, M]"""
    E: int
    """[TILE, LE]"""
    ACTIVE: int
    """int32 [TILE, LK]: the active neurons of each sample, behind them the linear path, and room."""
    H: int
    """[TILE, LK]: their activations."""
    DZ: int
    """[TILE, LK]: their dz."""
    NEXT: int
    """int32 [TILE]: the next of each sample's active neurons that is needed."""
    ROW: int
    """[128]"""
    NEURONS: int
    """int32 [K]: the neurons in the order in which they are worked on, padded with the last one, and the rows of the
    linear path."""
    BIAS: int
    """[K]: their biases in that order; those of padding are below all numbers."""
    STALE: int
    """[K]: whether they have CHANGED, in that order."""
    LB: int
    """Blocks of neurons, padded."""
    TOPS: int
    """[LB]: the highest bias of each block."""
    BOUNDS: int
    """[N, LB]: the largest number of each block's G^T for a feature; behind them, for abs, [N, LB] with the least."""
    SIGNED: int
    """int32 [N]: the features of a sample, N further for a negative one."""
    SAMPLES: int
    """int32 [TILE]: the samples of a tile, those with few features first."""
    MASKS: int
    """uint64 [TILE]: for each sample, a bit for each of 64 columns."""
    NEEDED: int
    """uint64 [LB], and room: for each block, a bit for each of SAMPLES whose bound is above 0."""
    GROUPS: int
    """int32 [blocks + 1]: where groups of blocks begin and end, whose active neurons are worked on together."""
    ENDS: int
    """int32 [blocks + 1, TILE]: where those of each block of neurons begin, and those of the last one end."""
    blocks: int
    WORDS: int
    """uint64 [K], and room for a block: for each of NEURONS, the samples that activate it."""
    COUNTING: int
    """int32: 0, 1, 2, ... up to M."""
    CHANGED: int
    """[K]: 1 for a neuron with a gradient in this step, 2 for one that moves without; when the step is done, not 0 for
    those whose rows of W_in have changed."""
    MOVING: int
    """[K]: 1 for a neuron whose first moment, of W_in or W_out^T, is not zero; for all, with SGD and AdamW."""
    BEHIND: int
    """int32 [k]: updates that the second moment of a neuron has not seen."""
    SQUARES: int
    """[2, K]: |W_in[j]|^2 and |W_out^T[j]|^2 of each neuron; for LAMB."""
    CHANGE: int
    """[16]: summed, the square of what an update changed W_in and W_out^T by; for `rate`."""
