"""Interrupted and resumed equals uninterrupted, bit for bit; and nothing that breaks a run breaks its checkpoint."""

from __future__ import annotations

import functools
import os
import signal

import pytest
import torch
from ignite.engine import Events
from monai.data import CacheDataset
from monai.engines import SupervisedTrainer
from monai.transforms import Compose, RandGaussianNoised

from maisi_tools.errors import InputError, TrainingError
from maisi_tools.training.budget import Budget, by_budget
from maisi_tools.training.checkpoint import (
    NAME,
    Checkpointer,
    constants_of,
    data_of,
    find_checkpoint,
    fingerprint_items,
)
from maisi_tools.training.loaders import TrainingLoader
from maisi_tools.training.monitor import NanGuard, StepLog
from maisi_tools.training.steps import ClipGradients, Ema, LrPerStep


class Killer:
    """Something to be saved that kills the process while it is being written, once it is armed."""

    armed = False

    def state_dict(self):
        return {"value": self if self.armed else 0}

    def load_state_dict(self, state): ...

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)
        return int, ()


class Run:
    """A small convolutional network with dropout, trained on noisy images: 2 epochs of 4 batches, a step every 2."""

    def __init__(self, folder, resume=False, minutes=0.0, items=None, parts=None, epochs=2, rate=0.01, settings=None):
        torch.manual_seed(7)
        layers = (torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Dropout(0.2), torch.nn.Conv3d(4, 1, 1))
        self.network = torch.nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=rate, total_steps=5)
        self.ema = Ema(self.network, 0.1)
        images = [torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        items = items or [{"image": image, "label": image, "file": f"case_{i}"} for i, image in enumerate(images)]
        transform = Compose([RandGaussianNoised("image", prob=0.7)])
        self.loader = TrainingLoader(CacheDataset(items, transform, progress=False), seed=3)
        self.parts = {"model": self.network, "ema": self.ema, "optimizer": self.optimizer}
        self.parts |= {"lr_scheduler": self.schedule, "data": self.loader, **(parts or {})}
        self.checkpointer = Checkpointer(
            folder, self.parts, minutes, find_checkpoint(folder, resume), {"scale_factor": 1.5}, settings
        )
        handlers = [self.loader, NanGuard(), ClipGradients(self.optimizer, 1.0), StepLog(self.optimizer), self.ema]
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=epochs,
            epoch_length=4,
            train_data_loader=self.loader,
            network=self.network,
            optimizer=self.optimizer,
            loss_function=torch.nn.L1Loss(),
            train_handlers=[*handlers, LrPerStep(self.schedule), self.checkpointer],
            accumulation_steps=2,
            decollate=False,
        )

    def interrupt(self, iteration):
        @self.trainer.on(Events.ITERATION_COMPLETED)
        def stop(engine):
            if engine.state.iteration == iteration:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            self.trainer.run()


def read(folder):
    return torch.load(folder / NAME, weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    Run(folder, minutes=60).trainer.run()
    return read(folder)


@pytest.mark.parametrize(("iteration", "last"), [(3, 2), (4, 4), (5, 4), (7, 6)])
def test_resumed_equals_uninterrupted(uninterrupted, assert_same, tmp_path, iteration, last):
    """In the middle of an epoch, at its end, and between two optimizer steps."""
    Run(tmp_path).interrupt(iteration)
    assert read(tmp_path)["trainer"]["iteration"] == last
    torch.rand(5)  # another process would have other random numbers
    resumed = Run(tmp_path, resume=True)
    resumed.trainer.run()
    assert resumed.trainer.state.iteration == 8 and resumed.trainer.state.epoch == 2
    assert_same(read(tmp_path), uninterrupted)
    assert uninterrupted["scale_factor"] == 1.5 and uninterrupted["optimizer"]["state"]


def test_changed_settings_and_data_are_refused_by_name_and_a_checkpoint_without_them_passes(tmp_path):
    files = [{"image": str(tmp_path / f"{name}.nii.gz"), "region": ["head"]} for name in "ab"]
    (tmp_path / "a.nii.gz").write_text("1")
    data, less = fingerprint_items(files), fingerprint_items(files[:1])
    (tmp_path / "there").mkdir()
    moved = [
        {**item, "image": str(tmp_path / "there" / f"{name}.nii.gz")} for item, name in zip(files, "ab", strict=True)
    ]
    (tmp_path / "there" / "a.nii.gz").write_text("2")
    assert fingerprint_items(moved) == data != less
    assert fingerprint_items([{**moved[0], "region": ["chest"]}, moved[1]]) != data
    several = [{**item, "more": [item["image"]]} for item in files]
    there = [{**item, "more": [item["image"]]} for item in moved]
    assert fingerprint_items(there) == fingerprint_items(several) != data
    (tmp_path / "there" / "a.nii.gz").write_text("other")
    assert fingerprint_items(moved) != data
    settings = {"learning_rate": 0.01, "sizes": (1, 2), "weights": {3: 1.0}, "data": data}
    Run(tmp_path, settings=settings).interrupt(3)
    Run(tmp_path, resume=True, settings={**settings, "new": 1}).interrupt(4)
    for changed, words in [
        ({"learning_rate": 1e-9}, r"learning_rate 0\.01 \(now 1e-09\)"),
        ({"data": less}, r"data 2 items \w+ \(now 1 items \w+\)"),
    ]:
        with pytest.raises(InputError, match=f"was written with {words}; to resume give the same values"):
            Run(tmp_path, resume=True, settings={**settings, **changed}).trainer.run()
    state = read(tmp_path)
    del state["settings"]
    torch.save(state, tmp_path / NAME)
    Run(tmp_path, resume=True, settings={**settings, "learning_rate": 1e-9}).trainer.run()


@pytest.mark.parametrize("kind", ["latent", "mask", "image"])
def test_changed_contents_of_the_same_names_and_sizes_are_refused(tmp_path, kind):
    """A file, a folder of one's files, and what is trained on of a latent's JSON; an older checkpoint passes."""
    file, beside = tmp_path / "there" / "a_x.nii.gz", tmp_path / "there" / "a_x.json"
    file.parent.mkdir()
    slices = tmp_path / "there" / "series" / "1.dcm"
    slices.parent.mkdir()
    for path, text in ((file, "content"), (beside, '{"region": ["head"]}'), (slices, "slice 1")):
        path.write_text(text)
    items = [{kind: str(file), "name": "a"}, {kind: str(slices.parent), "region": ["head"]}]
    before = data_of("data", items)
    assert before == {"data": fingerprint_items(items), "data_contents": before["data_contents"]}
    Run(tmp_path, settings=before).interrupt(3)
    moved = [{**item, kind: item[kind].replace("there", "moved")} for item in items]
    file.parent.rename(tmp_path / "moved")
    assert data_of("data", moved) == before  # wherever the files lie
    (tmp_path / "moved").rename(file.parent)
    for path, text in ((file, "CONTENT"), (slices, "slice 2"), (beside, '{"region": ["legs"]}')):
        earlier = path.read_text()
        path.write_text(text)
        now = data_of("data", items)
        assert now["data"] == before["data"]
        if path == beside and kind != "latent":
            assert now == before
        else:
            with pytest.raises(InputError, match=r"was written with data_contents 2 items \w+ \(now 2 items \w+\);"):
                Run(tmp_path, resume=True, settings=now).trainer.run()
        path.write_text(earlier)
    state = read(tmp_path)
    del state["settings"]["data_contents"]
    torch.save(state, tmp_path / NAME)
    file.write_text("CONTENT")
    Run(tmp_path, resume=True, settings=data_of("data", items)).trainer.run()


def test_a_finished_run_is_resumed_at_its_end(uninterrupted, assert_same, tmp_path):
    Run(tmp_path).trainer.run()
    resumed = Run(tmp_path, resume=str(tmp_path / NAME))
    resumed.trainer.run()
    assert resumed.trainer.state.iteration == 8
    assert_same(resumed.network.state_dict(), uninterrupted["model"])


def test_a_process_killed_while_it_writes_leaves_the_last_checkpoint(uninterrupted, assert_same, tmp_path):
    Run(tmp_path, parts={"killer": Killer()}).interrupt(5)
    child = os.fork()
    if child == 0:
        try:  # without a step: autograd refuses to work in a fork of a process that used its threads
            killer = Killer()
            run = Run(tmp_path, resume=True, parts={"killer": killer})

            @run.trainer.on(Events.STARTED)
            def die(engine):
                killer.armed, run.checkpointer.written = True, -1
                run.checkpointer.save(engine)

            run.trainer.run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the checkpoint and the half of the next
    assert read(tmp_path)["trainer"]["iteration"] == 4
    Run(tmp_path, resume=True, parts={"killer": Killer()}).trainer.run()
    state = read(tmp_path)
    state.pop("killer")
    assert_same(state, uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("key", ["image", "label"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_file(tmp_path, key):
    items = [
        {"image": torch.zeros(1, 2, 2, 2), "label": torch.zeros(1, 2, 2, 2), "file": f"case_{i}"} for i in range(3)
    ]
    items[1] = {**items[1], key: torch.full((1, 2, 2, 2), float("nan"))}
    run = Run(tmp_path, items=items)
    first = next(k for k, draw in zip(range(1, 9), run.loader.stream, strict=False) if draw.item == 1)
    with pytest.raises(TrainingError) as error:
        run.trainer.run()
    message = str(error.value)
    assert f"iteration {first} of epoch 1 the loss is not finite: loss is nan" in message
    assert "case_1" in message and "case_0" not in message and "case_2" not in message
    assert key in message.split("not finite: ")[-1]
    assert all(torch.isfinite(value).all() for value in run.network.state_dict().values())


def test_weights_that_are_not_finite_are_not_written(uninterrupted, tmp_path):
    run = Run(tmp_path)

    @run.trainer.on(Events.ITERATION_STARTED)
    def spoil(engine):
        if engine.state.iteration == 7:
            run.ema.ema_model[0].weight[0] = float("inf")

    with pytest.raises(TrainingError, match=r"not finite after iteration 8, the first is ema.0.weight; .* left as it"):
        run.trainer.run()
    assert read(tmp_path)["trainer"]["iteration"] == 6


def test_checkpoints_are_written_when_due_and_at_the_end_of_an_epoch(tmp_path):
    run, written = Run(tmp_path, minutes=60), []
    run.trainer.add_event_handler(Events.ITERATION_STARTED, lambda: written.append(run.checkpointer.written))
    run.trainer.run()
    assert written == [-1] * 4 + [4] * 4 and run.checkpointer.written == 8


def test_another_run_is_refused(tmp_path):
    Run(tmp_path).trainer.run()
    with pytest.raises(InputError, match=r"would be overwritten; go on from it with --resume True, or give another"):
        Run(tmp_path)
    with pytest.raises(InputError, match=r"max_epochs 2 \(now 3\); to resume give the same values"):
        Run(tmp_path, resume=True, epochs=3).trainer.run()
    with pytest.raises(InputError, match="it has to hold .*killer"):
        Run(tmp_path, resume=True, parts={"killer": Killer()}).trainer.run()
    other = torch.nn.Linear(2, 3)
    with pytest.raises(InputError, match="model in checkpoint .* does not fit this run"):
        Run(tmp_path, resume=True, parts={"model": other}).trainer.run()
    with pytest.raises(InputError, match="optimizer in checkpoint .* does not fit this run"):
        Run(tmp_path, resume=True, parts={"optimizer": torch.optim.Adam([other.weight])}).trainer.run()
    (tmp_path / NAME).write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        Run(tmp_path, resume=True).trainer.run()


def test_what_to_resume_from(tmp_path):
    assert find_checkpoint(tmp_path, False) is None and find_checkpoint(tmp_path, True) is None
    with pytest.raises(InputError, match="is no file"):
        find_checkpoint(tmp_path, str(tmp_path / "other.pt"))
    (tmp_path / "other.pt").touch()
    assert find_checkpoint(tmp_path / "new", str(tmp_path / "other.pt")) == tmp_path / "other.pt"
    (tmp_path / NAME).touch()
    with pytest.raises(InputError, match=rf"{NAME} is the checkpoint of an earlier run and would be overwritten"):
        find_checkpoint(tmp_path, str(tmp_path / "other.pt"))
    (tmp_path / "linked").symlink_to(tmp_path)
    for same in (tmp_path / NAME, tmp_path / "linked" / NAME):
        assert find_checkpoint(tmp_path, str(same)) == same


@pytest.mark.parametrize("name", ["model.pt", "model_best.pt", "unet.pt"])
def test_weights_of_a_run_whose_checkpoint_is_gone_are_left_alone(tmp_path, name):
    """They may be the user's only ones; and a new unet.pt beside an old model.pt would pass for one run's."""
    (tmp_path / "other.pt").touch()
    ckpt_dir = tmp_path / "run"
    ckpt_dir.mkdir()
    (ckpt_dir / name).touch()
    for resume in (False, True, str(tmp_path / "other.pt")):
        with pytest.raises(InputError, match=rf"run has {name} without the {NAME} .*; allowed is a folder without"):
            find_checkpoint(ckpt_dir, resume)
    (ckpt_dir / NAME).touch()
    assert find_checkpoint(ckpt_dir, True) == ckpt_dir / NAME
    (ckpt_dir / NAME).unlink()
    (ckpt_dir / name).rename(ckpt_dir / "kept.pt")
    assert find_checkpoint(ckpt_dir, True) is None


def test_figures_of_a_step(tmp_path):
    run, logs = Run(tmp_path, epochs=1), []
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: logs.append(engine.state.output["log"]))
    run.trainer.run()
    assert len(logs) == 4
    for figures in logs[1:]:
        assert set(figures) == {"loss", "learning_rate", "gradient_norm", "voxels_per_second", "data_share"}
        assert 0 < figures["data_share"] < 1 and figures["voxels_per_second"] > 0
    rates = [figures["learning_rate"] for figures in logs]
    assert rates[0] == rates[1] != rates[2] == rates[3]


def test_of_a_component_its_class_and_its_own_values_count():
    class Loss(torch.nn.Module):
        def __init__(self, power):
            super().__init__()
            self.power, self.terms, self.table = power, {}, torch.zeros(3)
            self.func, self.parts, self.sizes = max, [max, torch.zeros(1)], ((1, 2), "x")

    assert constants_of("rate", 0.1) == {"rate": 0.1} and constants_of("weights", {"a": 1}) == {"weights": {"a": 1}}
    assert constants_of("loss", Loss(2.0)) == {"loss": "Loss", "loss#power": 2.0, "loss#sizes": ((1, 2), "x")}
    parts = functools.partial(max, key=3)
    assert constants_of("schedule", parts) == {"schedule": "max", "schedule#key": 3}
    assert constants_of("schedule", max) == {"schedule": "max"}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.5)
    assert constants_of("optimizer", optimizer)["optimizer#weight_decay"] == 0.5
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=7, power=2.0)
    assert constants_of("rate", schedule) == {"rate": "PolynomialLR", "rate#power": 2.0}  # more epochs may follow
    schedule = by_budget(optimizer, Budget(1.0), "late_fall")
    assert constants_of("rate", schedule) == {"rate": "LambdaLR", "rate#shape": "late_fall"}
