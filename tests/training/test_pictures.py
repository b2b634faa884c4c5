from __future__ import annotations

import torch

from maisi_tools.training.pictures import three_planes


def test_planes_lie_side_by_side_with_anterior_and_superior_up():
    volume = torch.zeros(1, 4, 6, 8)
    volume[0, 0, 5, 4] = 1  # rightmost, most anterior, in the middle axial plane
    volume[0, 3, 3, 7] = 2  # leftmost, most superior, in the middle coronal plane
    volume[0, 2, 0, 0] = 3  # most posterior and inferior, in the middle sagittal plane
    picture = three_planes(volume, -volume)
    assert picture.shape == (1, 16, 4 + 4 + 6)
    assert torch.equal(picture[0, 8:][:, 4:], -picture[0, :8][:, 4:])
    axial, coronal, sagittal = picture[0, :8].split([4, 4, 6], dim=1)
    assert axial[0, 0] == 1 and coronal[0, 3] == 2 and sagittal[7, 0] == 3
    assert not axial[6:].any()  # 6 voxels high, padded to 8
