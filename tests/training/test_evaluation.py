import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_runs import ROOT, small_dataset, small_trainer

from alexkern.data import Split, evaluation_batches
from alexkern.predictions import Predictions
from alexkern.training.errors import StoppedError, TrainingError
from alexkern.training.evaluation import centre_crop, ten_crops

CENTRE = [(2, 2, False)]
TEN = [
    (top, left, flip)
    for flip in (False, True)
    for top, left in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))
]


def predicted(trainer, dataset, views) -> np.ndarray:
    """Mean over the views of the probabilities, in float64, image by image."""
    model = trainer.model.double().eval()
    mean = dataset.mean[2:34, 2:34].astype(np.float64)
    found = []
    for image in dataset.val.images:
        crops = []
        for top, left, flip in views:
            crop = image[top : top + 32, left : left + 32].astype(np.float64)
            crops.append((crop[:, ::-1] if flip else crop) - mean)
        input = torch.from_numpy(np.stack(crops) / 64).permute(0, 3, 1, 2)
        with torch.inference_mode():
            found.append(model(input).softmax(1).mean(0).numpy())
    model.float()
    return np.stack(found)


def test_views_are_those_of_the_paper():
    assert centre_crop(4) == CENTRE
    assert sorted(ten_crops(4)) == sorted(TEN)
    assert sorted(ten_crops(32))[0] == (0, 0, False)
    assert {(top, left) for top, left, _ in ten_crops(32)} == {
        *((0, 0), (0, 32), (32, 0), (32, 32), (16, 16))
    }


@pytest.mark.parametrize("ten_crop", [False, True])
def test_probabilities_are_means_over_the_views(ten_crop):
    dataset = small_dataset()
    trainer = small_trainer(dataset, batch_size=4)
    evaluation, probabilities = trainer.evaluate(ten_crop=ten_crop, keep=True)
    expected = predicted(trainer, dataset, TEN if ten_crop else CENTRE)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    labels = dataset.val.labels
    loss = -np.log(expected[np.arange(10), labels]).mean()
    assert evaluation.loss == pytest.approx(loss, rel=1e-5)
    assert evaluation.top1_error == (expected.argmax(1) != labels).mean()
    assert evaluation.top5_error == 0  # of three classes


def test_the_predictions_have_the_evaluations_errors(tmp_path):
    trainer = small_trainer(batch_size=4)
    evaluation, probabilities = trainer.evaluate(ten_crop=True, keep=True)
    trainer.predictions(probabilities, 10).save(tmp_path / "predictions.npz")
    found = Predictions.load(tmp_path / "predictions.npz")
    assert found.class_names == ("class 0", "class 1", "class 2")
    assert found.views == 10
    assert found.error(1) == evaluation.top1_error
    assert found.loss() == pytest.approx(evaluation.loss, rel=1e-6)


def test_a_sample_that_is_left_out_is_noticed(monkeypatch):
    def shortened(split, *numbers):
        return evaluation_batches(Split(split.images, split.labels[1:]), *numbers)

    monkeypatch.setattr("alexkern.training.evaluation.evaluation_batches", shortened)
    with pytest.raises(TrainingError, match="9 samples were predicted, and the split has 10"):
        small_trainer().evaluate()


def test_it_stops_when_asked():
    with pytest.raises(StoppedError):
        small_trainer().evaluate(stopping=lambda: True)


# Each process prints its rank, the evaluation and the first process's probabilities.
PROGRAM = """
import json, sys
import torch
from small_runs import small_dataset, small_trainer
from alexkern.parallel import make_mesh
from alexkern.training.processes import joined
with joined(torch.device("cpu")) as process:
    mesh = make_mesh(1, False, process.device)
    trainer = small_trainer(small_dataset(held_out=int(sys.argv[2])), mesh=mesh, batch_size=3)
    evaluation, kept = trainer.evaluate(keep=True)
    kept = None if kept is None else kept.tolist()
    with open(f"{sys.argv[1]}/{process.rank}.json", "w") as file:
        json.dump([evaluation.loss, evaluation.top1_error, kept], file)
"""


@pytest.mark.parametrize(
    ("processes", "images"),
    [(2, 10), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((4, 10), (3, 2)))],
)
def test_any_number_of_processes_counts_each_sample_once(tmp_path, processes, images):
    """Shares of 5 and 5, of 2, 3, 2 and 3, or of 0, 1 and 1, in batches of 3."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    finished = subprocess.run(
        [sys.executable, *command, str(tmp_path / "program.py"), str(tmp_path), str(images)],
        env={"PYTHONPATH": f"{ROOT}:{ROOT}/tests/training", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    dataset = small_dataset(held_out=images)
    alone, kept = small_trainer(dataset, batch_size=3).evaluate(keep=True)
    assert kept is not None
    for rank in range(processes):
        loss, error, probabilities = json.loads((tmp_path / f"{rank}.json").read_text())
        assert loss == pytest.approx(alone.loss, rel=1e-6)
        assert error == alone.top1_error
        if rank == 0:
            np.testing.assert_allclose(probabilities, kept, rtol=1e-5)
        else:
            assert probabilities is None
