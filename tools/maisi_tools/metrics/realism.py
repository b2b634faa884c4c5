"""How like real CTs a set of generated ones is, and how varied: 2.5D FID, MMD and MS-SSIM.

Features of slices in three planes come from one network. Figures of two networks are not comparable, so its name stands
in the name of every figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import MetaTensor
from monai.metrics import MultiScaleSSIMMetric
from monai.metrics.mmd import compute_mmd
from monai.networks.nets import resnet18, resnet50
from monai.transforms import Compose, ResizeWithPadOrCrop, ScaleIntensityRange, Spacing
from torch import Tensor, nn
from tqdm import tqdm

from maisi_tools.errors import InputError
from maisi_tools.files import check_own_json, fingerprint_file, fingerprint_text, replacing, write_json
from maisi_tools.settings import check_number
from maisi_tools.volumes.inputs import check_output_dir
from maisi_tools.volumes.normalise import HU_RANGE
from maisi_tools.volumes.reading import read_ras
from maisi_tools.weights import load_weights

PLANES = ("sagittal", "coronal", "axial")
"""Slices across x, y and z of a volume in RAS."""

NETWORKS = {"resnet18": resnet18, "resnet50": resnet50}

BATCH = 32  # slices

RESULT = "realism.json"

SPACING_RANGE = (0.1, 100.0)
"""mm. MONAI takes 0 and less for "as it is", which would compare volumes on their own grids."""

SSIM_KERNEL = 7
"""Voxels; MONAI's default of 11 would ask for 176 voxels a side."""

SSIM_HELD = 8
"""Volumes that stay in memory for the next pairs."""

SSIM_LEAST = SSIM_KERNEL * 2**4
"""Voxels a side, after four halvings as large as the kernel: MONAI refuses less."""


class SliceNetwork(nn.Module):
    """Slices (N, 1, H, W) in [0, 1] -> features (N, F), the pooled output of a ResNet.

    Args:
        kind: one of :data:`NETWORKS`.
        weights: state dict of MONAI's 2D network of that kind with three input channels, as RadImageNet's ResNet-50 has
            once its names are MONAI's; None seeds it with 0. Features of a random network tell sets apart, too, though
            not what matters in them.

    Attributes:
        name: kind and what the weights are, such as ``resnet50-1f3a5b7c`` or ``resnet18-random0``.
    """

    def __init__(self, kind: str, weights: str | Path | None = None) -> None:
        super().__init__()
        if kind not in NETWORKS:
            raise InputError(f"feature network {kind!r} is unknown; allowed are {', '.join(NETWORKS)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = NETWORKS[kind](spatial_dims=2, n_input_channels=3, feed_forward=False, bias_downsample=False)
        if weights is not None:
            load_weights(self.network, weights)
        self.name = f"{kind}-{'random0' if weights is None else fingerprint_file(weights)[:8]}"
        self.eval().requires_grad_(False)

    def forward(self, slices: Tensor) -> Tensor:
        return self.network(slices.expand(-1, 3, -1, -1)).flatten(1)


@dataclass
class Moments:
    """Mean and covariance of features, accumulated; a set of any size takes the memory of one matrix."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    products: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def add(self, features: Tensor) -> None:
        """Count features (N, F) in."""
        values = features.double()
        if not self.count:
            self.total = torch.zeros(values.shape[1], dtype=torch.float64)
            self.products = torch.zeros(values.shape[1], values.shape[1], dtype=torch.float64)
        self.count += values.shape[0]
        self.total += values.sum(0)
        self.products += values.T @ values

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """(F,) and (F, F), unbiased.

        Raises:
            InputError: fewer than two slices.
        """
        if self.count < 2:
            raise InputError(f"a set has {self.count} slices with a body in one plane; FID needs at least two")
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean, covariance


def frechet_distance(reference: Moments, other: Moments) -> float:
    """FID (Heusel et al. 2017, arXiv 1706.08500) of two sets of features.

    Not MONAI's, which takes the trace from a root of the product of both covariances: of fewer slices than features
    that is singular, and scipy before 1.16, the last for Python 3.10, finds no root.
    """
    (mean, covariance), (other_mean, other_covariance) = reference.mean_and_covariance(), other.mean_and_covariance()
    # With A A^T and B B^T for the covariances, the trace of their product's root is the sum of A^T B's singular values.
    of_both = torch.linalg.svdvals(_factor(covariance).T @ _factor(other_covariance)).sum()
    spread = covariance.trace() + other_covariance.trace() - 2 * of_both
    return float((mean - other_mean).square().sum() + spread.clamp(min=0))


def _factor(covariance: Tensor) -> Tensor:
    """A with A A^T = covariance; eigenvalues that are rounding are 0."""
    values, vectors = torch.linalg.eigh(covariance)
    rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors * values.where(values > rounding, 0).sqrt()


def measure_realism(
    reference: Sequence[str | Path],
    generated: Sequence[str | Path],
    output_dir: str | Path,
    network: SliceNetwork,
    spacing: float,
    size: int,
    pairs: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Compare two sets of CTs; ``realism.json`` goes to `output_dir`, and features are kept in ``features`` there.

    In a process group the ranks share the files; every rank returns the same.

    Args:
        reference, generated: CT files in HU.
        output_dir: see above; a second run takes kept features where file, network and grid are the same.
        network: gives the features.
        spacing: mm; all volumes are resampled to it.
        size: voxels a side; all volumes are cropped or padded with air to it.
        pairs: of volumes that MS-SSIM is averaged over, in each set.
        seed: draws the pairs.

    Returns:
        ``figures`` and how they were made. Figures are named FIGURE@NETWORK: ``fid_PLANE`` and their mean ``fid``;
        ``mmd``, unbiased with a linear kernel (Gretton et al. 2012) on each volume's mean feature, over as many volumes
        as the smaller set has; and, of pixels and so without a network, ``ms_ssim_reference`` and
        ``ms_ssim_generated``, the mean MS-SSIM (Wang et al. 2003) of two volumes of one set: the higher, the less
        varied.

    Raises:
        InputError: a set of fewer than two volumes, a file that cannot be read, a `spacing` outside
            :data:`SPACING_RANGE`, a `size` below 1 or too small for MS-SSIM, `pairs` below 0, or a ``realism.json`` of
            something else.
    """
    check_number("spacing", spacing, *SPACING_RANGE)
    check_number("size", size, 1, math.inf, whole=True)
    folder = check_output_dir(output_dir)
    check_own_json(folder / RESULT, _is_realism, "`maisi realism`", "output_dir")
    for name, files in (("reference", reference), ("generated", generated)):
        if len(files) < 2:
            raise InputError(f"the {name} set has {len(files)} volumes; allowed are at least two")
    if pairs < 0:
        raise InputError(f"pairs is {pairs}; allowed are whole numbers from 0 up, 0 for no MS-SSIM")
    if pairs and size < SSIM_LEAST:
        raise InputError(f"size is {size}; MS-SSIM needs at least {SSIM_LEAST} voxels a side: give more, or pairs 0")
    network.to(device)
    prepare = Compose(
        [
            Spacing([spacing] * 3, mode="bilinear", padding_mode="border"),
            ScaleIntensityRange(*HU_RANGE, 0, 1, clip=True),
            ResizeWithPadOrCrop([size] * 3, mode="constant", value=0),
        ]
    )
    settings = f"{network.name} {spacing:g} {size}"
    cache = check_output_dir(folder / "features")
    sets = {}
    for name, files in (("reference", reference), ("generated", generated)):
        kept = [cache / f"{fingerprint_text(f'{fingerprint_file(file)} {settings}')}.npz" for file in files]
        mine = list(zip(files, kept, strict=True))[idist.get_rank() :: idist.get_world_size()]
        for file, path in tqdm(mine, desc=f"features, {name}", unit="volume", delay=2):
            if not path.is_file():
                _keep_features(file, path, prepare, network, device)
        idist.barrier()
        sets[name] = [_read_features(path) for path in kept]

    figures: dict[str, float] = {}
    for plane in PLANES:
        found = [Moments(), Moments()]
        for moments, volumes in zip(found, sets.values(), strict=True):
            for features in volumes:
                moments.add(features[plane])
        figures[f"fid_{plane}@{network.name}"] = round(frechet_distance(*found), 6)
    figures[f"fid@{network.name}"] = round(float(np.mean(list(figures.values()))), 6)
    means = [
        torch.stack([torch.cat(list(one.values())).mean(0) for one in volumes]).double() for volumes in sets.values()
    ]
    count = min(len(mean) for mean in means)
    figures[f"mmd@{network.name}"] = round(float(compute_mmd(means[0][:count], means[1][:count], None)), 8)
    if pairs:
        for name, files in (("reference", reference), ("generated", generated)):
            figures[f"ms_ssim_{name}"] = round(_diversity(files, prepare, pairs, seed), 6)
    result = {
        "figures": figures,
        "network": network.name,
        "spacing": spacing,
        "size": size,
        "pairs": pairs,
        "seed": seed,
        "volumes": {"reference": len(reference), "generated": len(generated)},
    }
    if idist.get_rank() == 0:
        write_json(folder / RESULT, result)
    return result


def _is_realism(found: Mapping[str, Any]) -> bool:
    return found.keys() >= {"figures", "network", "volumes"}


def slices_of(volume: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(plane, slices (N, 1, H, W)) of a volume (1, X, Y, Z) in [0, 1]; slices of nothing but air, 0, are left out."""
    for axis, plane in enumerate(PLANES, start=1):
        slices = volume.movedim(axis, 0)
        yield plane, slices[slices.flatten(1).amax(1) > 0]


def _keep_features(
    file: str | Path, path: Path, prepare: Compose, network: SliceNetwork, device: str | torch.device
) -> None:
    """Write plane -> features (slices, F) of a CT to the cache."""
    found = {
        plane: torch.cat([network(part.to(device)).cpu() for part in slices.split(BATCH)]).numpy()
        for plane, slices in slices_of(_prepared(file, prepare))
        if len(slices)
    }
    if len(found) < len(PLANES):
        raise InputError(f"{file} holds nothing but air in what is compared; leave it out, or give another size")
    with replacing(path) as part, open(part, "wb") as stream:
        np.savez(stream, **found)  # type: ignore[arg-type]


def _read_features(path: Path) -> Mapping[str, Tensor]:
    """Plane -> features (slices, F) from the cache."""
    with np.load(path) as content:
        return {plane: torch.from_numpy(content[plane]) for plane in PLANES}


def _prepared(file: str | Path, prepare: Compose) -> Tensor:
    volume = prepare(read_ras(file, "ct"))
    return volume.as_tensor() if isinstance(volume, MetaTensor) else volume


def _diversity(files: Sequence[str | Path], prepare: Compose, pairs: int, seed: int) -> float:
    """Mean MS-SSIM of pairs of different volumes, drawn anew where there are more than `pairs`."""
    every = [(i, j) for i in range(len(files)) for j in range(i)]
    random = np.random.default_rng(seed)
    chosen = [every[k] for k in random.permutation(len(every))[:pairs]]
    metric = MultiScaleSSIMMetric(spatial_dims=3, data_range=1.0, kernel_size=SSIM_KERNEL)
    volume = lru_cache(SSIM_HELD)(lambda k: _prepared(files[k], prepare)[None])
    for i, j in tqdm(sorted(chosen), desc="MS-SSIM", unit="pair", delay=2):
        metric(volume(i), volume(j))
    return torch.as_tensor(metric.aggregate()).item()
