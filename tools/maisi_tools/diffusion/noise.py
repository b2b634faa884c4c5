"""The input of stage 2: noise drawn from seeds, the seeds of further draws, and the bookkeeping around it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from maisi_tools.diffusion.conditions import Conditions
from maisi_tools.errors import InputError
from maisi_tools.files import RUN_RECORD, read_json
from maisi_tools.settings import MOST_SEED, check_number
from maisi_tools.volumes.grid import latent_affine
from maisi_tools.volumes.inputs import stem_of

LATENT = "_latent"
"""What the name of a sample's latent ends in."""

STRIDE = 1_000_003
"""Between the seeds of a sample's draws."""


def list_samples(input: str | Path | Sequence[Mapping] | None, num_samples: int, seed: int) -> list[dict[str, Any]]:
    """The samples to draw: ``[{"name": ..., "seed": ...}, ...]``.

    Args:
        input: None draws ``num_samples`` with the seeds ``seed``, ``seed + 1``, ...; else a list of such dicts, or a
            JSON file with one (``name`` may be left out).

    Raises:
        InputError: the list cannot be read or is empty, has an entry with another key or without a seed, or samples
            whose files would be written over each other, or over the run's record.
    """
    if input is None:
        if int(num_samples) < 1:
            raise InputError(f"num_samples is {num_samples}; give 1 or more")
        specs: Any = [{"seed": int(seed) + i} for i in range(int(num_samples))]
    elif isinstance(input, (str, Path)):
        try:
            specs = read_json(input)
        except (OSError, ValueError) as error:
            raise InputError(f"input {input} is not a readable JSON list of samples ({error})") from error
    else:
        specs = input
    if not isinstance(specs, (list, tuple)) or not specs:
        raise InputError(f'input is {specs!r}; allowed is a list like [{{"seed": 0, "name": "first"}}], or none')
    samples = []
    for spec in specs:
        if not isinstance(spec, Mapping) or type(spec.get("seed")) is not int:
            raise InputError(f'sample {spec!r} has no integer seed; give a list like [{{"seed": 0, "name": "first"}}]')
        if unknown := sorted(map(str, set(spec) - {"seed", "name"})):
            raise InputError(
                f"sample {dict(spec)!r} has {', '.join(unknown)}; allowed are seed and name: give what all samples "
                "share as settings of the run, and correct a misspelt name"
            )
        if input is not None:  # else they follow one that was checked
            check_number(f"seed of sample {dict(spec)!r}", spec["seed"], 0, MOST_SEED, whole=True)
        name = spec.get("name")
        samples.append({"name": f"sample_seed{spec['seed']}" if name is None else str(name), "seed": spec["seed"]})
    stems = [stem_of(sample["name"]) for sample in samples]  # what the files are called
    if not all(stems):
        raise InputError(f"sample {samples[stems.index('')]!r} has no name for its files; give a name such as first")
    taken = {RUN_RECORD.removesuffix(".json"), *(f"{stem}{LATENT}" for stem in stems)}
    if used := sorted(taken.intersection(stems)):
        raise InputError(
            f"samples are called {', '.join(used)}; allowed are names that are neither {RUN_RECORD}'s, which says what "
            f"the run was, nor another sample's with {LATENT}, which its latent has: give other names"
        )
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InputError(f"samples whose files have the same name would overwrite each other: {', '.join(twice)}")
    return samples


def check_redraws(redraws: int) -> int:
    """The number itself.

    Raises:
        InputError: it is no whole number from 0 on.
    """
    if not isinstance(redraws, int) or isinstance(redraws, bool) or redraws < 0:
        raise InputError(f"redraws is {redraws!r}; allowed are whole numbers from 0 on")
    return redraws


def redraw_seeds(seed: int, redraws: int) -> list[int]:
    """The seed of a sample's first draw and of those that may follow: far apart, so as not to be other samples'."""
    return [seed + again * STRIDE for again in range(redraws + 1)]


class DrawNoised(MapTransform):
    """Adds the initial noise of a sample, a ``MetaTensor`` (4, d, h, w) on the latent grid, from ``data["seed"]``.

    The seed is in its meta, too: whatever else is drawn for the sample comes of it.
    The image's centre lies at the origin of the patient coordinates; its axes are RAS. What a latent's sidecar holds
    (:data:`maisi_tools.volumes.latents.SIDECAR`) is added to the data as well.

    Args:
        keys: key of the noise.
        conditions: whose size the image has.
        scale_factor: of the weights, for the sidecar.
        factor: of the autoencoder.
    """

    def __init__(self, keys: str, conditions: Conditions, scale_factor: float, factor: int) -> None:
        super().__init__(keys)
        self.conditions = conditions
        self.factor = factor
        self.scale_factor = float(scale_factor)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        conditions = replace(self.conditions, seed=data["seed"])
        spacing = torch.tensor(conditions.spacing, dtype=torch.float64)
        size = torch.tensor(conditions.size, dtype=torch.float64)
        image = torch.diag(torch.cat([spacing, torch.ones(1, dtype=torch.float64)]))
        image[:3, 3] = -spacing * (size - 1) / 2
        affine = torch.as_tensor(latent_affine(image, self.factor))
        described: dict[Hashable, Any] = {
            "size": list(conditions.size),
            "spacing": list(conditions.spacing),
            "orientation": "RAS",
            "region": list(conditions.region),
            "modality": conditions.modality,
            "intensity": list(conditions.intensity),
            "factor": self.factor,
            "scale_factor": self.scale_factor,
        }
        meta = {"filename_or_obj": data["name"], "seed": data["seed"], "sidecar": described}
        return {**data, **described, self.keys[0]: MetaTensor(conditions.noise(self.factor), affine=affine, meta=meta)}


class SplitSampled(MapTransform):
    """Splits what :class:`~maisi_tools.diffusion.inferers.LatentSampler` returns with ``return_latent`` in two.

    ``data[key]`` becomes the CT and ``data["latent"]`` the latent, placed on the noise's grid. A CT alone passes
    through.

    Args:
        keys: key of the sampler's output.
        noise_key: key of the noise it was made from.
    """

    def __init__(self, keys: str, noise_key: str) -> None:
        super().__init__(keys)
        self.noise_key = noise_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output, noise = data[self.keys[0]], data[self.noise_key]
        if not isinstance(output, Mapping):
            return dict(data)
        meta = {"filename_or_obj": noise.meta["filename_or_obj"]}
        latent = MetaTensor(output["latent"], affine=noise.affine, meta=meta)
        return {**data, self.keys[0]: output["ct"], "latent": latent}
