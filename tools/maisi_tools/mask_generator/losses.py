"""What training the mask autoencoder needs beyond that of the CT's: batches and loss of a classifier of voxels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn

from maisi_tools.errors import InputError
from maisi_tools.masks.bits import label_bits
from maisi_tools.masks.vocabulary import BODY, VOCABULARY, display_name
from maisi_tools.training.autoencoder import posterior_noise
from maisi_tools.training.losses import kl_divergence


def class_of_label(classes: Sequence[int]) -> Tensor:
    """Table (201,), int64: label -> its place in `classes`, -1 for labels that are not in it.

    Args:
        classes: the label that each output channel of the mask autoencoder stands for.

    Raises:
        InputError: the first is not 0 (background), one is no label, or one comes twice.
    """
    labels = [int(label) for label in classes]
    if not labels or labels[0] != 0 or len(set(labels)) < len(labels) or set(labels[1:]) - VOCABULARY.keys():
        raise InputError(
            f"classes is {labels}; allowed are different ids of the vocabulary after a leading 0: [0, 120, 200]"
        )
    table = torch.full((BODY + 1,), -1)
    table[labels] = torch.arange(len(labels))
    return table


class MaskBatch:
    """``prepare_batch`` of the mask autoencoder's trainer.

    Returns the bit planes of the labels (B, 8, D, H, W) as input, each voxel's class (B, 1, D, H, W), int64, as target,
    and the posterior's noise, which depends on the seed and the sample's number alone.

    Args:
        seed: of the noise.
        classes: see :func:`class_of_label`.
        factor: of the autoencoder.
    """

    def __init__(self, seed: int, classes: Sequence[int], factor: int) -> None:
        self.seed = seed
        self.factor = factor
        self.table = class_of_label(classes)

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor, tuple, dict[str, Tensor]]:
        labels = torch.as_tensor(batch["image"]).as_subclass(Tensor).to(device, non_blocking=non_blocking).long()
        target = self.table.to(device)[labels]
        if (target < 0).any():
            raise InputError(
                f"a mask has the labels {labels[target < 0].unique().tolist()}, which are not in classes; merge them "
                "into others with keep_labels and merge_labels"
            )
        keywords = {}
        if "draw" in batch:
            keywords["noise"] = posterior_noise(batch["draw"], labels.shape[2:], self.seed, device, self.factor)
        return label_bits(labels), target, (), keywords


class MaskAutoencoderLoss(nn.Module):
    """Weighted cross entropy plus Dice plus KL divergence.

    Called by MONAI's ``SupervisedTrainer`` with the training-mode output of
    :class:`maisi_tools.networks.Autoencoder`, ``(logits (B, C, D, H, W), mean, sigma)``, and classes (B, 1, D, H, W).

    Args:
        kl_weight: of the KL divergence, summed over a latent and averaged over the batch.
        class_weights: of each class in the cross entropy; more for what is thin or small. The losses see logits plus
            the weights' logarithms, so that the network's own are those of unweighted classes (logit adjustment, Menon
            et al. 2021, arXiv 2007.07314): decoded organs are not larger for it.
        classes: see :func:`class_of_label`.

    Raises:
        InputError: wrong classes, or not one weight for each.

    Attributes:
        adjustment: what is added to the logits.
        terms: "cross_entropy", "dice" (1 - the mean over all classes but the background) and "kl" (before its weight)
            of the last call, and "scale_factor" as in :class:`~maisi_tools.training.losses.AutoencoderLoss`.
    """

    adjustment: Tensor
    class_weights: Tensor

    def __init__(self, kl_weight: float, class_weights: Sequence[float], classes: Sequence[int]) -> None:
        super().__init__()
        class_of_label(classes)  # refuses what are none
        if len(class_weights) != len(classes):
            listed = ", ".join(f"{display_name(label)} ({label})" if label else "background" for label in classes)
            raise InputError(
                f"class_weights has {len(class_weights)} numbers; allowed are {len(classes)}, one for each of the "
                f"classes, in their order: {listed}"
            )
        self.kl_weight = float(kl_weight)
        self.dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True)
        weight = torch.tensor([float(value) for value in class_weights])
        self.register_buffer("class_weights", weight, persistent=False)
        self.register_buffer("adjustment", weight.log().reshape(1, -1, 1, 1, 1), persistent=False)
        self.terms: dict[str, Tensor] = {}

    def forward(self, prediction: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        logits, mean, sigma = (part.float() for part in prediction)
        logits = logits + self.adjustment.to(logits.device)
        terms = {
            "cross_entropy": self.cross_entropy(logits, target[:, 0]),
            "dice": self.dice(logits, target),
            "kl": kl_divergence(mean, sigma),
        }
        self.terms = {name: term.detach() for name, term in terms.items()}
        self.terms["scale_factor"] = 1 / mean.detach().std()
        return terms["cross_entropy"] + terms["dice"] + self.kl_weight * terms["kl"]

    def cross_entropy(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Of logits (B, C, D, H, W) and classes (B, D, H, W), weighted image by image: ranks' mean is the batch's."""
        weight, axes = self.class_weights.to(logits.device), (1, 2, 3)
        error = nn.functional.cross_entropy(logits, classes, weight, reduction="none")
        return error.sum(axes).div(weight[classes].sum(axes)).mean()
