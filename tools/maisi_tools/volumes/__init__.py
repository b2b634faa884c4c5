"""The door: finding, reading, checking and writing volumes, and the voxel grids between them."""

from __future__ import annotations

from maisi_tools.volumes.checks import check_output_size, check_spacing, warn_field_of_view
from maisi_tools.volumes.grid import PadInferer, crop_to, image_affine, latent_affine, pad_to_multiple, regrid_mask
from maisi_tools.volumes.inputs import check_output_dir, find_inputs, stem_of
from maisi_tools.volumes.reading import ReadVolumed, check_volumes, read_sidecar, read_volume
from maisi_tools.volumes.writing import WriteVolumed, write_sidecar, write_volume

__all__ = [
    "PadInferer",
    "ReadVolumed",
    "WriteVolumed",
    "check_output_dir",
    "check_output_size",
    "check_spacing",
    "check_volumes",
    "crop_to",
    "find_inputs",
    "image_affine",
    "latent_affine",
    "pad_to_multiple",
    "read_sidecar",
    "read_volume",
    "regrid_mask",
    "stem_of",
    "warn_field_of_view",
    "write_sidecar",
    "write_volume",
]
