"""The classes of public data sets and of TotalSegmentator, numbered as in their files."""

from __future__ import annotations

# Numbered from 1 in the order of the class maps "total" and "total_v1" of wasserth/TotalSegmentator,
# totalsegmentator/map_to_binary.py: sides alternate in no fixed order.
TOTALSEGMENTATOR = tuple(
    (
        "spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right adrenal_gland_left "
        "lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right "
        "esophagus trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate kidney_cyst_left "
        "kidney_cyst_right sacrum vertebrae_S1 vertebrae_L5 vertebrae_L4 vertebrae_L3 vertebrae_L2 vertebrae_L1 "
        "vertebrae_T12 vertebrae_T11 vertebrae_T10 vertebrae_T9 vertebrae_T8 vertebrae_T7 vertebrae_T6 vertebrae_T5 "
        "vertebrae_T4 vertebrae_T3 vertebrae_T2 vertebrae_T1 vertebrae_C7 vertebrae_C6 vertebrae_C5 vertebrae_C4 "
        "vertebrae_C3 vertebrae_C2 vertebrae_C1 heart aorta pulmonary_vein brachiocephalic_trunk "
        "subclavian_artery_right subclavian_artery_left common_carotid_artery_right common_carotid_artery_left "
        "brachiocephalic_vein_left brachiocephalic_vein_right atrial_appendage_left superior_vena_cava "
        "inferior_vena_cava portal_vein_and_splenic_vein iliac_artery_left iliac_artery_right iliac_vena_left "
        "iliac_vena_right humerus_left humerus_right scapula_left scapula_right clavicula_left clavicula_right "
        "femur_left femur_right hip_left hip_right spinal_cord gluteus_maximus_left gluteus_maximus_right "
        "gluteus_medius_left gluteus_medius_right gluteus_minimus_left gluteus_minimus_right autochthon_left "
        "autochthon_right iliopsoas_left iliopsoas_right brain skull rib_left_1 rib_left_2 rib_left_3 rib_left_4 "
        "rib_left_5 rib_left_6 rib_left_7 rib_left_8 rib_left_9 rib_left_10 rib_left_11 rib_left_12 rib_right_1 "
        "rib_right_2 rib_right_3 rib_right_4 rib_right_5 rib_right_6 rib_right_7 rib_right_8 rib_right_9 rib_right_10 "
        "rib_right_11 rib_right_12 sternum costal_cartilages"
    ).split()
)
TOTALSEGMENTATOR_V1 = tuple(
    (
        "spleen kidney_right kidney_left gallbladder liver stomach aorta inferior_vena_cava "
        "portal_vein_and_splenic_vein pancreas adrenal_gland_right adrenal_gland_left lung_upper_lobe_left "
        "lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right vertebrae_L5 "
        "vertebrae_L4 vertebrae_L3 vertebrae_L2 vertebrae_L1 vertebrae_T12 vertebrae_T11 vertebrae_T10 vertebrae_T9 "
        "vertebrae_T8 vertebrae_T7 vertebrae_T6 vertebrae_T5 vertebrae_T4 vertebrae_T3 vertebrae_T2 vertebrae_T1 "
        "vertebrae_C7 vertebrae_C6 vertebrae_C5 vertebrae_C4 vertebrae_C3 vertebrae_C2 vertebrae_C1 esophagus trachea "
        "heart_myocardium heart_atrium_left heart_ventricle_left heart_atrium_right heart_ventricle_right "
        "pulmonary_artery brain iliac_artery_left iliac_artery_right iliac_vena_left iliac_vena_right small_bowel "
        "duodenum colon rib_left_1 rib_left_2 rib_left_3 rib_left_4 rib_left_5 rib_left_6 rib_left_7 rib_left_8 "
        "rib_left_9 rib_left_10 rib_left_11 rib_left_12 rib_right_1 rib_right_2 rib_right_3 rib_right_4 rib_right_5 "
        "rib_right_6 rib_right_7 rib_right_8 rib_right_9 rib_right_10 rib_right_11 rib_right_12 humerus_left "
        "humerus_right scapula_left scapula_right clavicula_left clavicula_right femur_left femur_right hip_left "
        "hip_right sacrum face gluteus_maximus_left gluteus_maximus_right gluteus_medius_left gluteus_medius_right "
        "gluteus_minimus_left gluteus_minimus_right autochthon_left autochthon_right iliopsoas_left iliopsoas_right "
        "urinary_bladder"
    ).split()
)
# Class of version 1 -> its name in the vocabulary, where it has another one.
_HEART_V1 = ("heart_myocardium", "heart_atrium_left", "heart_ventricle_left", "heart_atrium_right")
_NAMES_V1 = dict.fromkeys((*_HEART_V1, "heart_ventricle_right"), "heart")
_WITHOUT_COUNTERPART_V1 = ("pulmonary_artery", "face")

DATA_SETS: dict[str, tuple[tuple[int, str, str | None], ...]] = {
    "totalsegmentator": tuple((number, name, name) for number, name in enumerate(TOTALSEGMENTATOR, start=1)),
    "totalsegmentator_v1": tuple(
        (number, name, None if name in _WITHOUT_COUNTERPART_V1 else _NAMES_V1.get(name, name))
        for number, name in enumerate(TOTALSEGMENTATOR_V1, start=1)
    ),
    # Babier et al. 2021 (doi 10.1002/mp.14845), numbered as in its releases as NIfTI masks. The vocabulary has no
    # brainstem, larynx and parotid glands; they take placeholder ids (PLACEHOLDER_NAMES). These are part of what the
    # small weights were trained with, and the phantoms of maisi_tools.masks.phantom use the same. Mandible counts as
    # skull in the released vocabulary.
    "openkbp": (
        (1, "brainstem", "brainstem"),
        (2, "spinal cord", "spinal cord"),
        (3, "esophagus", "esophagus"),
        (4, "larynx", "larynx"),
        (5, "mandible", "skull"),
        (6, "left parotid gland", "left parotid gland"),
        (7, "right parotid gland", "right parotid gland"),
    ),
    # The ten tasks of the Medical Segmentation Decathlon (arXiv 1902.09063); classes as in each task's dataset.json.
    # Prostate, brain tumour, heart and hippocampus are MR: what the vocabulary lacks there are parts of its organs.
    "msd_braintumour": (
        (1, "edema", None),
        (2, "non-enhancing tumor", None),
        (3, "enhancing tumour", None),
    ),
    "msd_heart": ((1, "left atrium", None),),
    "msd_liver": ((1, "liver", "liver"), (2, "cancer", "hepatic tumor")),
    "msd_hippocampus": ((1, "Anterior", None), (2, "Posterior", None)),
    "msd_prostate": ((1, "PZ", "prostate"), (2, "TZ", "prostate")),  # peripheral and transition zone
    "msd_lung": ((1, "cancer", "lung tumor"),),
    "msd_pancreas": ((1, "pancreas", "pancreas"), (2, "cancer", "pancreatic tumor")),
    "msd_hepaticvessel": ((1, "Vessel", "hepatic vessel"), (2, "Tumour", "hepatic tumor")),
    "msd_spleen": ((1, "spleen", "spleen"),),
    "msd_colon": ((1, "colon cancer primaries", "colon cancer primaries"),),
    # "Beyond the cranial vault", abdomen (doi 10.7303/syn3193805).
    "btcv": (
        (1, "spleen", "spleen"),
        (2, "right kidney", "right kidney"),
        (3, "left kidney", "left kidney"),
        (4, "gallbladder", "gallbladder"),
        (5, "esophagus", "esophagus"),
        (6, "liver", "liver"),
        (7, "stomach", "stomach"),
        (8, "aorta", "aorta"),
        (9, "inferior vena cava", "inferior vena cava"),
        (10, "portal vein and splenic vein", "portal vein and splenic vein"),
        (11, "pancreas", "pancreas"),
        (12, "right adrenal gland", "right adrenal gland"),
        (13, "left adrenal gland", "left adrenal gland"),
    ),
    # AMOS (arXiv 2206.08023), classes as in its dataset.json. Class 15 is whichever of the two the patient has.
    "amos": (
        (1, "spleen", "spleen"),
        (2, "right kidney", "right kidney"),
        (3, "left kidney", "left kidney"),
        (4, "gall bladder", "gallbladder"),
        (5, "esophagus", "esophagus"),
        (6, "liver", "liver"),
        (7, "stomach", "stomach"),
        (8, "aorta", "aorta"),
        (9, "postcava", "inferior vena cava"),
        (10, "pancreas", "pancreas"),
        (11, "right adrenal gland", "right adrenal gland"),
        (12, "left adrenal gland", "left adrenal gland"),
        (13, "duodenum", "duodenum"),
        (14, "bladder", "bladder"),
        (15, "prostate/uterus", "prostate"),
    ),
}
"""Data set -> (label in its files, its name for it, name in the vocabulary; None where that has no counterpart)."""
