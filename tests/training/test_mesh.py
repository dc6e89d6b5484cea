"""A run in several processes is the run in one."""

import copy
import math
from pathlib import Path

import pytest
import torch
from ranks import in_processes
from small_runs import assert_same, newest, results, small_dataset, small_trainer

from alexkern import ops
from alexkern.data import iterate
from alexkern.parallel import Axis, Mesh, make_mesh
from alexkern.training.errors import UsageError
from alexkern.training.loop import Outlet, Silence, Trainer

MESHES = {
    "2 columns": (2, 2, False),
    "2 replicas": (2, 1, False),
    "hybrid": (2, 2, True),
    "2x2": (4, 2, False),
    "2x2 hybrid": (4, 2, True),
}


def trainer_in(columns: int, hybrid: bool, **given) -> Trainer:
    """In double precision, in which orders of summation hardly show."""
    augment = ops.augment  # which makes float32
    ops.augment = lambda *arguments, dtype, **given: augment(*arguments, **given).to(dtype)
    mesh = make_mesh(columns, hybrid, torch.device("cpu"))
    trainer = small_trainer(small_dataset(), mesh=mesh, print_freq=1, **given)
    trainer.model.double()
    return trainer


def run(columns: int, hybrid: bool, state: dict | None, steps: int, folder: str, given: dict):
    """In one of the processes: train on from a state; what would be saved before and after."""
    torch.use_deterministic_algorithms(True)
    trainer = trainer_in(columns, hybrid, **given)
    if state:
        trainer.load_state_dict(state)
    before = copy.deepcopy(trainer.state_dict())
    first = trainer._mesh.data.index == trainer._mesh.columns.index == 0
    outlet = Outlet(Path(folder), trainer.step) if first else Silence()
    trainer.train(steps, outlet)
    return before, trainer.state_dict()


def curve(folder: Path, column: str) -> list[float]:
    return [float(row[column]) for row in results(folder) if row[column]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Twenty steps in one process, as a function of the options; made once each."""
    made = {}

    def train(**given):
        key = tuple(sorted(given.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("alone")
            one = in_processes(1, run, 1, False, None, 20, str(folder), {"epochs": 4, **given})
            made[key] = folder, one[0][1]
        return made[key]

    return train


@pytest.mark.parametrize("name", MESHES)
def test_the_curve_is_that_of_one_process(tmp_path, alone, name):
    """Over 20 steps with dropout, colour noise, the last batches of an evaluation unequal."""
    given = {"batch_size": 7, "colour_noise": "stdev", "conv1_epochs": 3}
    folder, expected = alone(**given)
    processes, columns, hybrid = MESHES[name]
    states = in_processes(
        *(processes, run, columns, hybrid, None, 20, str(tmp_path), {"epochs": 4, **given})
    )
    for column in ("train_loss", "train_top1_error", "val_loss", "val_top1_error"):
        assert curve(tmp_path, column) == pytest.approx(curve(folder, column), rel=1e-6), column
    assert len(curve(tmp_path, "train_loss")) == 20
    (_, first), *others = states
    assert first["model"].keys() == expected["model"].keys()
    for whole, exact in (
        (first["model"], expected["model"]),
        (first["optimizer"]["velocity"], expected["optimizer"]["velocity"]),
    ):
        for parameter, tensor in exact.items():
            torch.testing.assert_close(whole[parameter], tensor, rtol=1e-9, atol=1e-12)
    assert all(first["meter"] == state["meter"] for _, state in others)
    assert not any(state["model"] for _, state in others)


def test_checkpoints_do_not_depend_on_processes(tmp_path, alone):
    """Saved by two columns, loaded by one process and by 2x2: the same bits, and the same run."""
    given = {"epochs": 4}
    saved = in_processes(2, run, 2, False, None, 7, str(tmp_path), given)[0][1]
    on_disk = newest(tmp_path)
    assert_same(on_disk, saved)
    _, expected = alone()
    for processes, columns, hybrid in ((1, 1, False), (4, 2, False), (2, 2, True)):
        folder = tmp_path / f"{processes} {columns}"
        folder.mkdir()
        states = in_processes(*(processes, run, columns, hybrid, on_disk, 20, str(folder), given))
        before, after = states[0]
        assert_same(before, on_disk)
        for name, tensor in expected["model"].items():
            torch.testing.assert_close(after["model"][name], tensor, rtol=1e-9, atol=1e-12)


def test_a_column_takes_its_part_of_weights(tmp_path):
    whole = small_trainer(seed=1).model.state_dict()
    torch.save(whole, tmp_path / "weights.pt")
    trainer = small_trainer(mesh=Mesh(columns=Axis(1, 2)))
    trainer.load_weights(str(tmp_path / "weights.pt"), new_head=False)
    found = trainer.model.state_dict()
    expected = trainer.model.part_of(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def one_step(columns: int, hybrid: bool, batch_size: int) -> str:
    """What the user is told, if anything."""
    mesh = make_mesh(columns, hybrid, torch.device("cpu"))
    trainer = small_trainer(small_dataset(held_out=1), mesh=mesh, batch_size=batch_size)
    try:
        trainer.train(1, Silence())
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("columns", "hybrid"), [(2, False), (1, False), (2, True)])
def test_only_who_shares_a_batch_needs_an_image_of_it(columns, hybrid):
    told = "" if columns == 2 and not hybrid else "2 processes cannot share a batch of 1"
    assert in_processes(2, one_step, columns, hybrid, 1) == [told, told]
    assert in_processes(2, one_step, columns, hybrid, 2) == ["", ""]


def broken_step(columns: int, amp: str, value: float):
    """One step in which only the last process has a gradient that is not finite."""
    mesh = make_mesh(columns, False, torch.device("cpu"))
    trainer = small_trainer(small_dataset(), mesh=mesh, amp=amp)
    # with the scale that it begins with other gradients would be infinite, too
    trainer._scaler.load_state_dict({**trainer._scaler.state_dict(), "scale": 2.0**10})
    step = trainer._make_step(0)
    step.set_rates([0.01, 0.01])
    batch = next(iterate(trainer._training_batches(0)))
    step(batch, [1, 2])
    before = copy.deepcopy(trainer.model.state_dict())
    if (mesh.data.index + 1, mesh.columns.index + 1) == (mesh.data.count, mesh.columns.count):
        trainer.model.fc7.bias.register_hook(lambda gradient: gradient + value)
    outcome = step(batch, [1, 2])
    after = trainer.model.state_dict()
    same = all(torch.equal(before[name], after[name]) for name in before)
    return same, outcome.finite.tolist(), trainer._scaler.state_dict().get("scale")


@pytest.mark.parametrize(
    ("columns", "amp", "value"), [(2, "off", math.nan), (2, "fp16", math.inf), (1, "off", math.inf)]
)
def test_no_process_moves_where_one_has_a_broken_gradient(columns, amp, value):
    found = in_processes(2, broken_step, columns, amp, value)
    assert found[0] == found[1]
    unchanged, finite, scale = found[0]
    assert unchanged
    if amp == "off":
        assert finite == [True, False]
    else:
        assert scale == 2.0**9


def in_columns(kernels: str, folder: str) -> None:
    """Three steps and an evaluation, in float32."""
    mesh = make_mesh(2, False, torch.device("cpu"))
    trainer = small_trainer(small_dataset(), mesh=mesh, kernels=kernels, print_freq=1)
    trainer.train(3, Silence() if mesh.columns.index else Outlet(Path(folder)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is no interpreter")
def test_this_projects_kernels_in_columns(tmp_path):
    """In the interpreter: the losses of plain PyTorch, normalisation across columns included."""
    found = {}
    for kernels in ("triton", "torch"):
        folder = tmp_path / kernels
        folder.mkdir()
        in_processes(2, in_columns, kernels, str(folder))
        found[kernels] = curve(folder, "train_loss") + curve(folder, "val_loss")
    assert found["triton"] == pytest.approx(found["torch"], rel=1e-3)
