"""Training a segmentation network on cases of which each has only some of the structures labelled."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.transforms import MapTransform
from torch import Tensor, nn

from maisi_tools.errors import InputError
from maisi_tools.volumes.reading import check_same_grid

MERGED = -1e4
"""Logit of a class that is merged into the background: no probability, and finite in every precision but float16's."""


class CheckLabelsd(MapTransform):
    """Refuses labels that lie on another grid than their CT, or that are none of the classes.

    Args:
        keys: of the CT and of its labels, both (1, X, Y, Z), RAS, with the affine and path of their files.
        num_classes: C, the background included.
    """

    def __init__(self, keys: Sequence[str], num_classes: int) -> None:
        super().__init__(keys)
        self.num_classes = num_classes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The item as it is.

        Raises:
            InputError: see above; it names the file.
        """
        image, label = (data[key] for key in self.keys)
        path = label.meta["filename_or_obj"]
        check_same_grid(path, label, image)
        values = label.as_tensor()
        if (other := torch.unique(values[values >= self.num_classes])).numel():
            raise InputError(
                f"{path} has the labels {[int(value) for value in other[:5]]}; allowed are 0 to "
                f"{self.num_classes - 1}, the background and the structures in their order: number them so, or leave "
                "out what is no structure"
            )
        return dict(data)


class LabelledClassesd(MapTransform):
    """Adds which classes a case has labels of: ``data["labelled"]``, (C,) bool, the background always among them.

    A structure counts as labelled where a voxel of the case has its label; so this comes before a patch is cut.

    Args:
        keys: of the labels (1, X, Y, Z), 0 for what is none of the structures.
        num_classes: C, the background included.
    """

    def __init__(self, keys: str, num_classes: int) -> None:
        super().__init__(keys)
        self.num_classes = num_classes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        found = torch.unique(torch.as_tensor(data[self.keys[0]])).long()
        labelled = torch.zeros(self.num_classes, dtype=torch.bool)
        labelled[found] = True
        labelled[0] = True
        return {**data, "labelled": labelled}


def partial_batch(
    batch: Mapping[str, Any], device: torch.device | str | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What a MONAI trainer asks of a batch: the image, and as the loss's target the labels with their classes."""
    image, label, labelled = (
        torch.as_tensor(batch[key]).to(device, non_blocking=non_blocking) for key in ("image", "label", "labelled")
    )
    return image, (label, labelled)


class MarginalDiceCELoss(nn.Module):
    """Dice and cross entropy of what is labelled: the marginal loss of Shi et al. 2021 (arXiv 2007.03868, section 3.1).

    In a case without labels of a structure its voxels are labelled as background, whatever they are. So there the
    structure's probability is added to the background's, and the network is free to find it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)

    def forward(self, prediction: Tensor, target: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar.

        Args:
            prediction: logits (B, C, D, H, W).
            target: labels (B, 1, D, H, W), and the labelled classes (B, C), see :func:`partial_batch`.
        """
        label, labelled = target
        merged = ~labelled.reshape(*labelled.shape, *[1] * (prediction.ndim - 2))
        background = merged.clone()
        background[:, 0] = True
        together = prediction.masked_fill(~background, -torch.inf).logsumexp(dim=1, keepdim=True)
        logits = torch.cat([together, prediction[:, 1:].masked_fill(merged[:, 1:], MERGED)], dim=1)
        return self.loss(logits, label)
