"""Attention, step 7: what Hopper has of its own: TMA, wgmma, warps that specialise. The kernel that ships.

Idea. So far every warp did everything in turn: asked for tiles, waited, multiplied, exponentiated. Hopper (compute
capability 9.0) has units that work on their own once they have been asked, so the parts can run beside one another:

    TMA      one thread asks for a whole tile, and an engine copies it into shared memory: no addresses to compute, no
             registers to pass through; a barrier in shared memory (`mbarrier`) tells when the bytes are there
    wgmma    four warps ask for a product of [64, n] tiles that are read straight from shared memory, and go on at once
    roles    one warp does nothing but ask for tiles (the producer, with 24 registers a thread); two groups of four
             warps compute (the consumers, 240): registers go to those who need them

    producer       load K_0 V_0   load K_1 V_1   load K_2 V_2   ...          always some tiles ahead
    consumer 0     S_0   softmax_0 | S_1       softmax_1 | S_2   ...         queries  0 ..  63
                                   | O += P_0 V_0        | O += P_1 V_1
    consumer 1           S_0   softmax_0 | S_1       softmax_1 | ...         queries 64 .. 127

While one consumer is at its exponentials, the other's products have the matrix unit; and within a consumer the product
P_j V_j runs beside the softmax of tile j + 1 (FlashAttention-3, arXiv:2407.08608).

What it costs. The operations of step 6. There is to win the time in which its matrix unit stood still, nearly half.
Predicted: 1.5 times as fast, from half of the ceiling to three quarters.

The code is kernels/flash_attention/gluon_forward.py, in Triton's Gluon dialect, and hopper.py. On other cards
`kernels.flash_attention` is the portable kernel, kernels/flash_attention/triton_forward.py: step 6 with windows, soft
caps, packed documents and any head_dim.
"""

from kernels import flash_attention

__all__ = ["flash_attention"]
