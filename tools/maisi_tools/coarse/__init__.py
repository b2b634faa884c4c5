"""The coarse CT that stage 2 draws first: few voxels for the whole field of view, and what is drawn from it.

Where a body ends, and how its parts lie to each other, a U-Net on a fine latent learns last and slowest: each of its
cells is a few millimetres, and at most timesteps their neighbours say enough. So the whole is drawn by a small network
on a grid of one size, whatever the field of view (its voxels are larger or smaller), and the U-Net sees the result
beside the noisy latent (cascaded diffusion, Ho et al. 2022, arXiv 2106.15282).
"""
