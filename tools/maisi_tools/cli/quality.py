"""Commands that show and measure what was made.

Imports stay inside the commands, so that `maisi --help` does not wait for torch and MONAI.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maisi_tools.cli.options import CONTROLNET, bundle_folder, check_seed, hu_window, listed, process_group
from maisi_tools.errors import InputError


def preview(volume: str, mask: str | None = None, output: str = "preview.png", window: Any = (-160, 240)) -> None:
    """Draw three planes of a CT volume, with a mask over it where one is given.

    Args:
        volume: NIfTI file in HU, in any orientation.
        mask: NIfTI file with labels on the same grid.
        output: the PNG file to write.
        window: HU shown as black and as white, for example -160,240.
    """
    from maisi_tools.report.preview import preview as draw

    print(draw(str(volume), None if mask is None else str(mask), str(output), hu_window(window)))


def report(run_dir: str, output: str | None = None, max_cases: int = 20) -> None:
    """Write one HTML page about a bundle's output folder: volumes to look through, organs, tables, parameters.

    It is one file that needs no network. A page made of patients' CTs shows patients.

    Args:
        run_dir: the output_dir of a run.
        output: the .html file, by default report.html in that folder.
        max_cases: how many CTs to show.
    """
    from maisi_tools.report.run_report import write_report

    path = write_report(str(run_dir), None if output is None else str(output), max_cases)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def compare(
    datalist: str,
    masks_dir: str,
    output_dir: str = "comparison",
    cases: int = 4,
    section: str = "validation",
    reconstructed: str | None = None,
    generated: str | None = None,
    seed: int = 0,
    window: Any = (-160, 240),
    bundles: str | None = None,
) -> None:
    """Make a page: real CT, its reconstruction, and a CT generated from the same mask, for kept-out patients.

    The page and the CTs show patients: keep them out of any repository (git ignores `comparison/`).

    Args:
        datalist: JSON file as `maisi prepare` writes it.
        masks_dir: the masks of its CTs, as `maisi complete_masks` writes them.
        output_dir: folder for comparison.html, and for the CTs that are computed.
        cases: how many of the section to show, from its beginning; 0 for all.
        section: of the datalist.
        reconstructed: folder with NAME_recon.nii.gz from maisi_vae; by default they are computed.
        generated: folder with NAME_mask_ct.nii.gz from maisi_controlnet; by default they are computed.
        seed: of the generated CTs.
        window: HU shown as black and as white, for example -160,240.
        bundles: folder with the bundles; by default the one of the checkout you are in.
    """
    check_seed(seed)
    if not isinstance(cases, int) or cases < 0:
        raise InputError(f"cases {cases!r} is not usable; give how many to show, 0 for all.")
    window = hu_window(window)

    from maisi_tools.datasets.datalist import read_datalist
    from maisi_tools.metrics.conditioning import pair_masks
    from maisi_tools.report.comparison import Comparison, write_comparison
    from maisi_tools.volumes.inputs import check_output_dir, stem_of

    listed = read_datalist(str(datalist), str(section))
    items = pair_masks(listed[: cases or None], str(masks_dir))
    output = check_output_dir(str(output_dir))
    folders = {"maisi_vae": reconstructed, CONTROLNET: generated}
    for given in (reconstructed, generated):
        if given is not None and not Path(str(given)).is_dir():
            raise InputError(f"folder {given} does not exist; give the one with the CTs, or none.")
    pages = []
    for item in items:
        ct, mask = Path(item["ct"]), Path(item["image"])
        made = {"maisi_vae": f"{stem_of(ct)}_recon.nii.gz", CONTROLNET: f"{stem_of(mask)}_ct.nii.gz"}
        places = {name: Path(str(folders[name] or output / name)) / file for name, file in made.items()}
        if absent := [path for name, path in places.items() if folders[name] is not None and not path.is_file()]:
            raise InputError(f"{absent[0]} does not exist; give a folder with the CTs of all cases, or none.")
        volumes = {"real": ct, "reconstruction": places["maisi_vae"], "generated": places[CONTROLNET]}
        pages.append(Comparison(stem_of(ct), volumes, mask))
    runs: tuple[tuple[str, str, dict[str, Any]], ...] = (("maisi_vae", "ct", {}), (CONTROLNET, "image", {"seed": seed}))
    for name, key, own in runs:
        if folders[name] is None:
            from maisi_tools.bundles.stage import Stage

            folders[name] = str(output / name)
            inputs = [item[key] for item in items]
            stage = Stage(bundle_folder(name, bundles), logs=True, input=inputs, output_dir=folders[name], **own)
            stage.run()
    title = "Real CT, its reconstruction, and a CT generated from the same mask"
    print(write_comparison(pages, output / "comparison.html", title, window))


def realism(
    reference: Any,
    generated: Any,
    output_dir: str = "realism",
    network: str = "resnet18",
    weights: str | None = None,
    spacing: float = 3.0,
    size: int = 128,
    pairs: int = 20,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Measure how like real CTs generated ones are, and how varied: FID in three planes, MMD, MS-SSIM.

    `torchrun -m maisi_tools.cli realism` shares the volumes among its ranks.

    Args:
        reference: the real CTs: a folder, a glob, or a datalist.
        generated: the same of the generated ones.
        output_dir: folder for realism.json, and for features, which a second run takes from there.
        network: that gives the features: resnet18 or resnet50.
        weights: of that network, such as RadImageNet's; by default it is random, with a fixed seed.
        spacing: mm that the volumes are resampled to.
        size: voxels a side that they are cropped or padded to.
        pairs: of volumes in each set that MS-SSIM is averaged over; 0 for none.
        seed: draws the pairs.
        device: cpu or cuda.
    """
    check_seed(seed)

    import ignite.distributed as idist

    from maisi_tools.metrics.realism import SliceNetwork, measure_realism
    from maisi_tools.settings import check_device
    from maisi_tools.volumes.inputs import find_cts

    check_device(device)
    # Of a run's outputs and of data sets, the CTs; masks and latents lie beside them.
    real, made = ([item["image"] for item in find_cts(files, unique=False)] for files in (reference, generated))
    features = SliceNetwork(str(network), None if weights is None else str(weights))
    with process_group():
        found = measure_realism(
            real, made, str(output_dir), features, float(spacing), int(size), int(pairs), seed, device
        )
        if idist.get_rank() > 0:
            return
    for name, value in found["figures"].items():
        print(f"{name:<40}{value:>14.6f}")


def stratify(
    metrics: str, cases: str, by: Any, output: str = "stratified.csv", edges: Any = None, case_column: str = "case"
) -> None:
    """Group the figures of an evaluation by columns of a case table, such as sex, age or scanner.

    Args:
        metrics: metrics.csv of a bundle's evaluation.
        cases: CSV file with a row a case.
        by: columns of it: sex,scanner.
        output: CSV file to write.
        edges: bounds of groups of a column with numbers: "{'age': [40,60]}".
        case_column: column of `cases` that holds the names.
    """
    from maisi_tools.metrics.stratify import COLUMNS
    from maisi_tools.metrics.stratify import stratify as group

    columns = listed(by)
    if edges is not None and not isinstance(edges, dict):
        raise InputError(f"edges is {edges!r}; allowed is column -> bounds: \"{{'age': [40,60]}}\"")
    rows = group(str(metrics), str(cases), columns, str(output), edges, str(case_column))
    widths = [max(len(str(row[name])) for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]) for name in COLUMNS]
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
        print("  ".join(f"{row[name]!s:<{width}}" for name, width in zip(COLUMNS, widths, strict=True)).rstrip())
    print(output)
