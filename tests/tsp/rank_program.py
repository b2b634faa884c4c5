"""What test_ranks.py starts once a rank: runs networks over the ranks and saves this rank's results.

usage: rank_program.py OUTPUT_DIR NETWORK:AXIS:SPLITS:OPTIONS ..., with the environment torchrun gives. OPTIONS are
"first" (only rank 0 has the input), "shards" (results are not gathered), "write" (shards are written into one file),
"die" (the last rank is killed in mid-run). Before that, what the ranks agree on as the least of three limits is saved.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from monai.networks.nets import SegResNet
from torch import distributed, nn

from maisi_tools.networks import Autoencoder, DiffusionUNet
from maisi_tools.tsp.ranks import Ranks, Shard
from maisi_tools.tsp.run import Call, Settings
from maisi_tools.volumes.writing import write_shard

VAE = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "num_channels": [8, 8, 16],
    "num_res_blocks": [1, 1, 1],
    "norm_num_groups": 4,
    "attention_levels": [False, False, False],
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    "num_splits": 1,
    "dim_split": 1,
    "norm_float16": False,
}
UNET = {
    "spatial_dims": 3,
    "in_channels": 4,
    "out_channels": 4,
    "num_channels": [8, 16],
    "attention_levels": [False, True],
    "num_head_channels": [0, 8],
    "num_res_blocks": 1,
    "norm_num_groups": 4,
}


def case(name: str) -> tuple[nn.Module, object, tuple]:
    """A network with random weights in evaluation mode, the function of it that is run, and its arguments."""
    torch.manual_seed(7)
    if name == "decoder":  # rows that no number of ranks divides
        network = Autoencoder(**VAE).eval()
        return network, network.decode, (torch.randn(1, 4, 5, 7, 9),)
    if name == "thin decoder":  # fewer rows than ranks, so that some own none and halos reach over two ranks
        network = Autoencoder(**VAE).eval()
        return network, network.decode, (torch.randn(1, 4, 3, 2, 3),)
    if name == "encoder":
        network = Autoencoder(**VAE).eval()
        return network, lambda x: network.encode(x)[0], (torch.rand(2, 1, 20, 24, 28),)
    if name == "unet":
        network = DiffusionUNet(**UNET).eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
        return network, network, (torch.randn(1, 4, 10, 12, 8), torch.tensor([500.0]))
    network = SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=2).eval()
    return network, network, (torch.randn(1, 1, 16, 8, 24),)


def run(name: str, axis: str, splits: str, options: str, path: Path) -> None:
    """Run one case on this rank and save its result."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    _, function, args = case(name)
    if "first" in options and rank:
        args = (None,) * len(args)

    def tick(done: int, total: int) -> None:
        if "die" in options and rank == ranks - 1 and done == total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = Settings(splits=int(splits) or None, axis=int(axis), devices="ranks", gather="shards" not in options)
    with torch.no_grad():
        result = Call(settings, function, args, {}).run(tick)
    if "write" in options:
        affine = [[2, 0, 0, -9], [0, 3, 0, 4], [0, 0, 1.5, 7], [0, 0, 0, 1]]
        voxels = result.tensor[0, 0].mul(100).numpy()
        write_shard(path.parent / "ct.nii", voxels, result.rows[0], result.axis - 2, result.shape[2:], affine)
    if isinstance(result, Shard):
        result = {"tensor": result.tensor, "rows": result.rows, "axis": result.axis, "shape": result.shape}
    torch.save(result, path)


def main(output_dir: str, *cases: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    ranks, own = Ranks(), distributed.get_rank()
    limits = [ranks.least(limit, torch.device("cpu")) for limit in (100 + own, None if own == 0 else 50 + own, None)]
    torch.save(limits, Path(output_dir, f"limits_{own}.pt"))
    for number, text in enumerate(cases):
        run(*text.split(":"), Path(output_dir, f"{number}_{distributed.get_rank()}.pt"))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
