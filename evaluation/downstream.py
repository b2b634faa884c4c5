"""What synthetic cases are worth: a segmentation network trained on N real cases, and on N real and M synthetic ones.

The downstream experiment of arXiv 2409.11169, where Dice rises by 4 to 6.5 %. Every training, an *arm*, goes on until
its validation cases stop improving, by one rule for all; its best weights are measured on kept-out cases.

    python evaluation/downstream.py --datalist datalist.json --kept_out kept_out.json --synthetic synthetic.json \\
        --real 10,20 --synthetic_counts 40,100 --seeds 3 --output_dir runs/downstream

An arm that is finished is kept; the same command goes on where it was interrupted. `table.md` has the result.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser, run
from scipy.stats import bootstrap

from maisi_tools.bundles.settings import check_keys, check_values
from maisi_tools.datasets.datalist import belongs, read_datalist
from maisi_tools.datasets.layouts import CT_SUFFIX
from maisi_tools.errors import InputError, report_input_errors
from maisi_tools.files import (
    check_own_json,
    expanded,
    fingerprint_file,
    held,
    json_mapping,
    write_csv,
    write_json,
)
from maisi_tools.training import checkpoint
from maisi_tools.volumes.inputs import check_output_dir, check_stems, stem_of

logger = logging.getLogger(__name__)

SEGMENTATION = Path(__file__).resolve().parent / "segmentation"

ARM = "arm.json"
"""Settings of an arm, written when it starts, and its figures, added when it is finished."""

ORDERS = ("mixed", "then_real")
"""How synthetic cases are used: beside real ones, each of which is repeated M / N times (rounded), so that half of the
steps see either kind; or first, and the real ones after them."""

RESAMPLES = 9999
"""Of the kept-out patients, for a difference's interval."""

CASES = ("training", "first", "validation", "kept_out")
"""Lists of cases among an arm's settings."""

FIXED = {"bundle_root", "meta_file", "datalist", "ckpt_dir", "ckpt_path", "output_dir", "seed", "resume", "init_ckpt"}
"""Keys of the configs that an arm sets itself."""

CONFIGS = ("train.json", "converge.json", "inference.json", "evaluate.json", "metadata.json")


@dataclass(frozen=True)
class Arm:
    """One training: how many real and synthetic cases, in which order, and the seed that draws them and the network.

    Of two arms with one seed, the smaller one's real cases are among the larger one's, and so are the synthetic ones.
    An arm without synthetic cases has the order "real", one without real cases "synthetic": the first half of those
    that are "then_real", which starts from its weights.
    """

    real: int
    synthetic: int
    order: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.order}_{self.real}_{self.synthetic}_seed{self.seed}"

    @property
    def first(self) -> Arm | None:
        """The arm whose weights it starts from."""
        return Arm(0, self.synthetic, "synthetic", self.seed) if self.order == "then_real" else None

    def draw(self, real: Sequence[Mapping[str, Any]], synthetic: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The cases that it trains on, real ones repeated where they are fewer than the synthetic ones beside them."""
        random = np.random.default_rng(self.seed)
        chosen = [dict(real[i]) for i in random.permutation(len(real))[: self.real]]
        made = [dict(synthetic[i]) for i in random.permutation(len(synthetic))[: self.synthetic]]
        if self.order == "then_real":
            return chosen
        return chosen * max(1, round(len(made) / max(len(chosen), 1))) + made


class Experiment:
    """The arms of one output folder.

    Args:
        datalist: real cases with ``image`` and ``label``: "training" is drawn from, "validation" ends the trainings
            and chooses their weights.
        kept_out: its "validation" section is what every arm is measured on, once; several cases of one ``patient``
            count as one, their mean.
        synthetic: its "training" section has synthetic CTs with their labels, numbered as the real ones are.
        output_dir: gets a folder for each arm (:attr:`Arm.name`).
        segmentation: a bundle with :data:`CONFIGS`, as ``evaluation/segmentation`` is.
        overrides: of its configs.

    Raises:
        InputError: a case without label or file, one that is kept out and trained or validated with, one that is
            validated and trained with, a synthetic one of either, no such bundle, or overrides that it cannot have.
    """

    def __init__(
        self,
        datalist: str | Path,
        kept_out: str | Path,
        synthetic: str | Path,
        output_dir: str | Path,
        segmentation: str | Path = SEGMENTATION,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.root = Path(segmentation)
        for name in CONFIGS:
            if not (self.root / "configs" / name).is_file():
                raise InputError(f"{self.root / 'configs' / name} does not exist; give a segmentation bundle's folder")
        self.names = {"datalist": str(datalist), "synthetic": str(synthetic)}
        self.real, self.synthetic = _labelled(datalist, "training"), _labelled(synthetic, "training")
        self.validation, self.kept_out = _labelled(datalist, "validation"), _labelled(kept_out, "validation")
        check_stems(case["image"] for case in self.kept_out)  # by which they are measured
        known = [stem_of(case["image"]) for case in (*self.real, *self.validation, *self.kept_out)]
        _check_apart(datalist, "training", kept_out, "kept out")
        _check_apart(datalist, "validation", kept_out, "kept out")
        _check_apart(datalist, "training", datalist, "validated with")
        _check_apart(synthetic, "training", kept_out, "kept out", known)
        _check_apart(synthetic, "training", datalist, "validated with", known)
        self.patients = {
            stem_of(case["image"]): str(case["patient"])
            for case in read_datalist(kept_out, "validation")
            if case.get("patient")
        }
        self.overrides = _checked_overrides(self.root / "configs", overrides or {})
        self.folder = check_output_dir(output_dir)
        check_own_json(
            self.folder / "downstream.json",
            lambda found: found.keys() == {"arms", "table"},
            "evaluation/downstream.py",
            "output_dir",
            ["downstream.csv", "table.md"],
        )
        self.fingerprints: dict[str | Path, str] = {}

    def run(
        self,
        real_counts: Sequence[int],
        synthetic_counts: Sequence[int],
        orders: Sequence[str] = ORDERS,
        seeds: int = 3,
    ) -> list[dict[str, Any]]:
        """Train and measure every arm that is not finished yet, and compare them.

        Args:
            real_counts: N.
            synthetic_counts: M, each above 0; N real cases alone, to compare with, are added.
            orders: of :data:`ORDERS`.
            seeds: how many trainings of each kind, with the seeds 0, 1, ...

        Returns:
            The rows of ``downstream.csv``, see :func:`compare_arms`.

        Raises:
            InputError: too few cases, numbers or orders that cannot be, arms there of other settings, or another run
                in the folder.
        """
        self._check(real_counts, synthetic_counts, orders, seeds)
        arms = [
            arm
            for seed in range(seeds)
            for n in real_counts
            for arm in (
                Arm(n, 0, "real", seed),
                *(Arm(n, m, order, seed) for m in synthetic_counts for order in orders),
            )
        ]
        found: dict[Arm, dict[str, Any]] = {}
        rows: list[dict[str, Any]] = []
        taken = f"another run trains the arms in {self.folder}; wait for its end, or give another output folder"
        with held(self.folder, taken):
            for arm in arms:  # all doors before the first training
                self._finished(arm)
            for number, arm in enumerate(arms, start=1):
                logger.info("arm %d of %d: %s", number, len(arms), arm.name)
                found[arm] = self._finished(arm) or self._make(arm)
                rows = self._write(found)
        return rows

    def _write(self, found: Mapping[Arm, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Write what is known so far: ``downstream.json``, ``downstream.csv`` and ``table.md``."""
        rows = compare_arms({arm: record["figures"] for arm, record in found.items()}, self.patients)
        arms = {arm.name: dict(record) for arm, record in found.items()}
        write_json(self.folder / "downstream.json", {"arms": arms, "table": rows})
        if rows:
            write_csv(self.folder / "downstream.csv", rows)
        steps = {arm: record["steps"] for arm, record in found.items()}
        (self.folder / "table.md").write_text("\n".join(table(rows, steps)) + "\n")
        return rows

    def _make(self, arm: Arm) -> dict[str, Any]:
        """Train one arm, and the one it starts from, measure it, and leave its record."""
        if arm.first and not self._finished(arm.first):
            self._make(arm.first)
        folder, configs, settings = self.folder / arm.name, self.root / "configs", self._settings(arm)
        folder.mkdir(exist_ok=True)
        write_json(folder / ARM, {"settings": settings})
        for name, section in (("datalist", self.validation), ("kept_out", self.kept_out)):
            write_json(folder / f"{name}.json", {"training": settings["training"], "validation": section})
        common = {"bundle_root": str(self.root), "meta_file": str(configs / "metadata.json")}
        run(
            config_file=[str(configs / "train.json"), str(configs / "converge.json")],
            datalist=str(folder / "datalist.json"),
            ckpt_dir=str(folder),
            seed=arm.seed,
            resume=True,
            init_ckpt=str(self.folder / arm.first.name / "model_best.pt") if arm.first else None,
            **common,
            **self.overrides,
        )
        if arm.real:
            run(
                config_file=[str(configs / "inference.json"), str(configs / "evaluate.json")],
                datalist=str(folder / "kept_out.json"),
                ckpt_path=str(folder / "model_best.pt"),
                output_dir=str(folder / "kept_out"),
                **common,
                **self._of_inference(),
            )
        last = folder / checkpoint.NAME
        steps = int(torch.load(last, weights_only=True)["trainer"]["iteration"])
        if steps >= self._most_steps():
            logger.warning("%s was still improving after %d steps, the most that are allowed", arm.name, steps)
        record = {"settings": settings, "steps": steps, "figures": _dice(folder / "kept_out" / "metrics.csv")}
        write_json(folder / ARM, record)
        last.unlink()
        gc.collect()  # engines and their handlers refer to each other, and to the cases in memory
        return record

    def _most_steps(self) -> int:
        found = json.loads((self.root / "configs" / "converge.json").read_text()) | self.overrides
        return int(found["max_epochs"]) * int(found["epoch_length"])

    def _of_inference(self) -> dict[str, Any]:
        """The overrides that inference has a key for: what a network was trained with, it is measured with."""
        names = [str(self.root / "configs" / name) for name in ("inference.json", "evaluate.json")]
        known = ConfigParser.load_config_files(names)
        return {key: value for key, value in self.overrides.items() if key.split("#")[0] in known}

    def _settings(self, arm: Arm) -> dict[str, Any]:
        given = {
            "training": arm.draw(self.real, self.synthetic),
            "first": arm.first.draw(self.real, self.synthetic) if arm.first else None,
            "validation": self.validation,
            "kept_out": self.kept_out,
            "configs": [self._fingerprint(self.root / "configs" / name) for name in CONFIGS],
            "scripts": [self._fingerprint(path) for path in sorted((self.root / "scripts").glob("*.py"))],
            "overrides": self.overrides,
        }
        for name in CASES:
            files = [case[key] for case in given[name] or () for key in ("image", "label")]
            given[f"content of {name}"] = [self._fingerprint(file) for file in files]
        return json.loads(json.dumps(given, default=str))

    def _fingerprint(self, path: str | Path) -> str:
        """Of a file, read once: an arm is another one when what is in its files is another."""
        if path not in self.fingerprints:
            self.fingerprints[path] = fingerprint_file(path)
        return self.fingerprints[path]

    def _finished(self, arm: Arm) -> dict[str, Any] | None:
        """The record of an arm that is finished, or None.

        Raises:
            InputError: it was made, or begun, with other settings.
        """
        path = self.folder / arm.name / ARM
        if not path.is_file():
            return None
        record = json.loads(path.read_text())
        then, now = (_wherever(settings) for settings in (record["settings"], self._settings(arm)))
        if other := [name for name, value in now.items() if then.get(name, value) != value]:  # an earlier one has less
            raise InputError(
                f"{path.parent} was made with another {', '.join(other)}; give the same data and options again, or "
                "another output folder"
            )
        return record if "figures" in record else None

    def _check(self, real: Sequence[int], synthetic: Sequence[int], orders: Sequence[str], seeds: int) -> None:
        for name, values in (("real", real), ("synthetic_counts", synthetic), ("seeds", [seeds])):
            if not values or not all(isinstance(value, int) and value > 0 for value in values):
                raise InputError(f"{name} is {values!r}; allowed are whole numbers from 1 up")
        if not orders or set(orders) - set(ORDERS):
            raise InputError(f"orders is {', '.join(orders)!r}; allowed are {' and '.join(ORDERS)}")
        for name, cases, most in (
            ("datalist", self.real, max(real)),
            ("synthetic", self.synthetic, max(synthetic)),
        ):
            if len(cases) < most:
                raise InputError(
                    f"{self.names[name]} has {len(cases)} cases under 'training' and {most} were asked for; ask for "
                    "fewer"
                )


def compare_arms(
    figures: Mapping[Arm, Mapping[str, Mapping[str, float]]], patients: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Real alone against real and synthetic, paired by seed and patient.

    Args:
        figures: arm -> case -> figure -> value, the Dice of each kept-out case.
        patients: case -> patient, where a patient may have several; each other case is a patient's.

    Returns:
        For each N, M, order and figure of the seeds that have both arms: ``real``, ``synthetic``, ``order``,
        ``figure``, ``seeds``; ``dice_real`` and ``dice_with_synthetic``, means over patients and seeds; their
        ``difference``; ``low`` and ``high``, its 95 % interval by bootstrap over the patients (each one's difference
        being the mean over seeds and cases; empty for a single one; of less than 20, too narrow); ``lowest`` and
        ``highest`` of the seeds' differences.
    """
    rows = []
    kinds = sorted({(arm.real, arm.synthetic, arm.order) for arm in figures if arm.real and arm.synthetic})
    for n, m, order in kinds:
        pairs = [
            (figures[Arm(n, 0, "real", arm.seed)], figures[arm])
            for arm in sorted(figures, key=lambda arm: arm.seed)
            if (arm.real, arm.synthetic, arm.order) == (n, m, order) and Arm(n, 0, "real", arm.seed) in figures
        ]
        names = dict.fromkeys(name for alone, _ in pairs for case in alone.values() for name in case)
        for name in names:
            cases = [case for case, found in pairs[0][0].items() if name in found]
            both = np.array([[[arm[case][name] for case in cases] for arm in pair] for pair in pairs])  # (S, 2, cases)
            # Cases of one patient are alike: as if each were another's, they would make the interval too narrow.
            owners = np.array([(patients or {}).get(case, case) for case in cases])
            both = np.stack([both[..., owners == owner].mean(axis=-1) for owner in dict.fromkeys(owners)], axis=-1)
            alone, mixed = both.mean(axis=(0, 2))
            differences = both[:, 1] - both[:, 0]
            by_seed, by_patient = differences.mean(axis=1), differences.mean(axis=0)
            low, high = _interval(by_patient)
            rows.append(
                {
                    "real": n,
                    "synthetic": m,
                    "order": order,
                    "figure": name,
                    "seeds": len(pairs),
                    "dice_real": round(alone, 4),
                    "dice_with_synthetic": round(mixed, 4),
                    "difference": round(mixed - alone, 4),
                    "low": low,
                    "high": high,
                    "lowest": round(by_seed.min(), 4),
                    "highest": round(by_seed.max(), 4),
                }
            )
    return json.loads(json.dumps(rows, default=float))


def _interval(differences: np.ndarray) -> tuple[Any, Any]:
    if len(differences) < 2:
        return "", ""
    if np.ptp(differences) == 0:
        return round(differences[0], 4), round(differences[0], 4)
    found = bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, method="percentile", random_state=np.random.default_rng(0)
    ).confidence_interval
    return round(found.low, 4), round(found.high, 4)


def table(rows: Sequence[Mapping[str, Any]], steps: Mapping[Arm, int]) -> list[str]:
    """The lines of a Markdown table of :func:`compare_arms`'s rows, and of how many steps the arms took."""
    kinds = dict.fromkeys((row["real"], row["synthetic"], row["order"]) for row in rows)
    lines = []
    for n in dict.fromkeys(n for n, _, _ in kinds):
        columns = [kind for kind in kinds if kind[0] == n]
        heads = [f"N = {n}", "real alone", *(f"M = {m}, {order.replace('_', ' ')}" for _, m, order in columns)]
        lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for figure in dict.fromkeys(row["figure"] for row in rows if row["real"] == n):
            found = {(row["real"], row["synthetic"], row["order"]): row for row in rows if row["figure"] == figure}
            cells = [_cell(found[kind]) if kind in found else "" for kind in columns]
            alone = next(row["dice_real"] for row in found.values() if row["real"] == n)
            name = figure.removeprefix("dice_").replace("_", " ")
            lines.append("| " + " | ".join([name, f"{alone:.3f}", *cells]) + " |")
    of_kind: dict[tuple[int, int, str], list[int]] = {}
    for arm, count in steps.items():
        of_kind.setdefault((arm.real, arm.synthetic, arm.order), []).append(count)
    lines += ["", "Steps until validation stopped improving (median over seeds; then real: after those of synthetic):"]
    lines += [
        f"- N = {n}, M = {m}, {order.replace('_', ' ')}: {statistics.median(counts):,.0f}"
        for (n, m, order), counts in sorted(of_kind.items())
    ]
    return lines


def _cell(row: Mapping[str, Any]) -> str:
    interval = f" ({row['low']:+.3f} to {row['high']:+.3f})" if row["low"] != "" else ""
    return f"{row['difference']:+.3f}{interval}"


def _dice(path: Path) -> dict[str, dict[str, float]]:
    """Case -> figure -> value of a ``metrics.csv``; nothing where nothing was measured."""
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {row.pop("case"): {name: float(value) for name, value in row.items() if value.strip()} for row in rows}


def _wherever(settings: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's settings with the names of its cases' files alone: they may have been moved."""
    named = {
        name: [[Path(case[key]).name for key in ("image", "label")] for case in settings[name] or ()]
        for name in CASES
        if name in settings
    }
    return {**settings, **named}


def _labelled(datalist: str | Path, section: str) -> list[dict[str, Any]]:
    cases = read_datalist(datalist, section)
    if missing := [case["image"] for case in cases if not case.get("label")]:
        raise InputError(f"{datalist} has cases without label under {section!r}, such as {missing[0]}; leave them out")
    if absent := [case[key] for case in cases for key in ("image", "label") if not Path(case[key]).is_file()]:
        raise InputError(f"{absent[0]}, named in {datalist}, does not exist; correct the path")
    return [{"image": str(case["image"]), "label": str(case["label"])} for case in cases]


def _checked_overrides(configs: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that an arm's training has, and does not set itself.

    Raises:
        InputError: others, or values that they cannot have.
    """
    if fixed := FIXED & {key.split("#")[0] for key in overrides}:
        raise InputError(f"settings has {', '.join(sorted(fixed))}, which every arm sets itself; leave it out")
    parser = ConfigParser(ConfigParser.load_config_files([configs / "train.json", configs / "converge.json"]))
    parser.update(overrides)
    files = [ConfigParser.load_config_file(configs / name) for name in CONFIGS]
    check_keys(parser.get(), files)
    check_values(parser.get(), files)
    return dict(overrides)


def _check_apart(
    datalist: str | Path, section: str, held: str | Path, reason: str, known: Sequence[str] | None = None
) -> None:
    """Refuse a case of a list's "validation" whose files, or whose patient, are also among those of another section.

    Patients are compared where both lists name them, as `maisi prepare` does.

    Args:
        datalist, section: where it must not be.
        held: the list.
        reason: why it has to stay out.
        known: stems of all real cases. `datalist` is of synthetic ones then, whose files are others: that their labels
            are a held case's tells where they came from, and so do their names, which begin with that of their case.
    """
    cases = read_datalist(datalist, section)
    # One file may be written in two ways: relative, absolute, by a link.
    files = {Path(case[key]).resolve() for case in cases for key in ("image", "label") if case.get(key)}
    patients = {str(case["patient"]) for case in cases if case.get("patient")}
    made_of: dict[str | None, str] = {}
    for file in (case[key] for case in cases for key in ("image", "label") if known):
        made_of.setdefault(_origin(stem_of(file), known or ()), file)
    for case in read_datalist(held, "validation"):
        for file in (case["image"], case["label"]):
            if Path(file).resolve() in files:
                raise InputError(
                    f"{file} is {reason} by {held}, but {datalist} has it under {section!r}; leave it out of one of "
                    "them"
                )
        if case.get("patient") and str(case["patient"]) in patients:
            raise InputError(
                f"patient {case['patient']} of {case['image']} is {reason} by {held}, but {datalist} has that "
                f"patient under {section!r}; leave the patient out of one of them, or name two patients differently"
            )
        if (made := made_of.get(stem_of(case["image"]))) is not None:
            raise InputError(
                f"{case['image']} is {reason} by {held}, but by its name {made} of {datalist} is made of it; leave "
                "that out, or rename it if it is not"
            )


def _origin(stem: str, known: Sequence[str]) -> str | None:
    """The real case that a synthetic one is made of, as twins and edits of NAME_ct are called NAME_ct_ct."""
    return max((name for name in known if belongs(stem, name.removesuffix(CT_SUFFIX))), key=len, default=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment, see the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--datalist", type=expanded, required=True, help="real cases to train on and to validate with")
    parser.add_argument("--kept_out", type=expanded, required=True, help="real cases to measure on, under 'validation'")
    parser.add_argument("--synthetic", type=expanded, required=True, help="synthetic cases, under 'training'")
    parser.add_argument("--output_dir", type=expanded, required=True)
    parser.add_argument("--real", default="10,20", help="N, such as 10,20")
    parser.add_argument("--synthetic_counts", default="40,100", help="M, such as 40,100")
    parser.add_argument("--orders", default=",".join(ORDERS), help=f"of {', '.join(ORDERS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--segmentation", default=SEGMENTATION, help="folder of the segmentation bundle")
    parser.add_argument("--settings", default="{}", help="JSON: keys of the bundle's configs, such as patience")
    given = parser.parse_args(arguments)
    experiment = Experiment(
        given.datalist,
        given.kept_out,
        given.synthetic,
        given.output_dir,
        given.segmentation,
        json_mapping(given.settings, "settings"),
    )
    experiment.run(_counts(given.real), _counts(given.synthetic_counts), given.orders.split(","), given.seeds)
    print((given.output_dir / "table.md").read_text())


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{text!r} is no list of whole numbers; give for instance 10,20") from None


if __name__ == "__main__":
    report_input_errors()
    main()
