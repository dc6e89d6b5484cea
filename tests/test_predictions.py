"""Errors and averages of predictions against numpy in float64, and what is no prediction."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alexkern import cli
from alexkern.predictions import Predictions, average
from alexkern.training.metrics import wrong_answers

NAMES = ("cat", "dog", "eel", "fox", "gnu", "hen")


def make(seed: int = 0, images: int = 40, **changes: Any) -> Predictions:
    """Random predictions; the labels do not depend on the seed."""
    logits = np.random.default_rng(seed).normal(0, 2, (images, len(NAMES)))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.random.default_rng(99).integers(0, len(NAMES), images)
    values = {
        "probabilities": probabilities.astype(np.float32),
        "labels": labels,
        "class_names": NAMES,
        "views": 10,
    }
    return Predictions(**{**values, **changes})


def of(*rows: list[float], label: int = 0) -> Predictions:
    labels = np.full(len(rows), label)
    return Predictions(np.array(rows, np.float32), labels, NAMES[: len(rows[0])], 1)


def same(first: Predictions, second: Predictions) -> bool:
    return (
        np.array_equal(first.probabilities, second.probabilities)
        and np.array_equal(first.labels, second.labels)
        and (first.class_names, first.views) == (second.class_names, second.views)
    )


# Errors


def test_errors_and_loss() -> None:
    found = make()
    exact = found.probabilities.astype(np.float64)
    right = exact[np.arange(40), found.labels]
    rank = (exact > right[:, None]).sum(1)
    for k in (1, 2, 5, 6):
        assert found.error(k) == np.mean(rank >= k)
    assert found.error(9) == 0
    assert found.loss() == pytest.approx(-np.log(right).mean(), rel=1e-12)
    logits = torch.from_numpy(found.probabilities).log()
    expected = F.cross_entropy(logits, torch.from_numpy(found.labels)).item()
    assert found.loss() == pytest.approx(expected, rel=1e-6)


def test_ties_are_ranked_as_in_training() -> None:
    counts = np.random.default_rng(0).integers(1, 4, (300, 6)).astype(np.float32)
    tied = make(images=300, probabilities=counts / counts.sum(1, keepdims=True))
    scores, labels = torch.from_numpy(tied.probabilities), torch.from_numpy(tied.labels)
    for k in (1, 2, 5):
        assert tied.error(k) == wrong_answers(scores, labels, k).item() / 300


@pytest.mark.filterwarnings("error")
def test_a_label_of_probability_0_has_an_infinite_loss() -> None:
    assert of([0, 1]).loss() == np.inf
    assert of([1, 0]).loss() == 0


def test_arrays_in_any_memory_order() -> None:
    found = make()
    for probabilities in (np.asfortranarray(found.probabilities), found.probabilities[::-1]):
        labels = found.labels if probabilities.flags.f_contiguous else found.labels[::-1]
        other = make(probabilities=probabilities, labels=labels)
        assert other.error(1) == found.error(1)
        assert other.loss() == pytest.approx(found.loss(), rel=1e-12)


# Averages


@pytest.mark.parametrize("weights", [None, [1, 1, 1], [3.0, 0.5, 1.5], [1e308, 1e308, 1e307]])
def test_an_average_is_numpys(weights: list[float] | None) -> None:
    three = [make(seed) for seed in range(3)]
    mean = average(three, weights)
    stack = np.stack([each.probabilities for each in three]).astype(np.float64)
    scaled = None if weights is None else np.array(weights) / 1e300
    expected = np.average(stack, axis=0, weights=scaled)
    np.testing.assert_allclose(mean.probabilities, expected, rtol=2**-24, atol=0)
    assert mean.probabilities.dtype == np.float32
    assert same(make(probabilities=mean.probabilities), mean)


def test_an_average_may_be_right_where_each_is_wrong() -> None:
    one, other = of([0.4, 0.6, 0.0]), of([0.4, 0.0, 0.6])
    assert (one.error(1), other.error(1), average([one, other]).error(1)) == (1, 1, 0)


def test_weights_decide() -> None:
    one, other = of([0.9, 0.1]), of([0.2, 0.8])
    assert average([one, other], [1, 3]).error(1) == 1
    assert average([one, other], [3, 1]).error(1) == 0


def test_the_average_of_one_is_itself() -> None:
    assert same(average([make()]), make())
    assert same(average([make()], [0.3]), make())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"views": 1}, "1 views, not 10"),
        ({"images": 39}, "39 images, not 40"),
        ({"class_names": ("cat", "dog", "eel", "fox", "hen", "gnu")}, "class 4 is 'hen', not 'gn"),
        ({"labels": np.roll(make().labels, 1)}, r"image \d+ is of class \d, not \d"),
    ],
)
def test_what_does_not_fit_is_not_averaged(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^other does not fit first: {problem}"):
        average([make(name="first"), make(1), make(2, **changes, name="other")])


def test_predictions_over_other_numbers_of_classes_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 classes, not 2"):
        average([of([1, 0]), of([1, 0, 0])])


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [], [1, 0], [1, -1], [1, np.nan], [np.inf, 1]])
def test_wrong_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weights (for 2 files|must be positive and finite)"):
        average([make(), make()], weights)


def test_nothing_to_average() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        average([])


# What is no prediction


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"probabilities": make().probabilities.astype(np.float64)}, "got float64"),
        ({"probabilities": make().probabilities[:, :5]}, r"float32 \[40, 6\], got float32 \[40, 5"),
        ({"probabilities": 2 * make().probabilities}, "row 0 .sum 2, .* holds no probabilities"),
        ({"probabilities": np.log(make().probabilities)}, "row 0"),
        ({"probabilities": np.full((40, 6), np.nan, np.float32)}, "row 0 .sum nan"),
        ({"labels": make().labels.astype(np.int32)}, r"int64 \[40\], got int32 \[40\]"),
        ({"labels": make().labels[:, None]}, r"got int64 \[40, 1\]"),
        ({"labels": np.array(3)}, r"got int64 \[\]"),
        ({"labels": np.where(np.arange(40) == 7, 6, 0)}, "label 6 of image 7 is none of 6"),
        ({"labels": np.where(np.arange(40) == 7, -1, 0)}, "label -1 of image 7"),
        ({"images": 0}, "0 images"),
        ({"views": 0}, "views must be positive, got 0"),
    ],
)
def test_values_that_are_no_predictions(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^mine: .*{problem}") as error:
        make(**changes, name="mine")
    assert "\n" not in str(error.value)


def test_only_the_wrong_row_is_named() -> None:
    rows = make().probabilities.copy()
    rows[12, :2] += (-2, 2)
    with pytest.raises(ValueError, match=r"row 12 \(sum 1, least -"):
        make(probabilities=rows)


def test_sums_may_be_as_far_from_1_as_rounding_takes_them() -> None:
    """float32 softmax over many classes, and the mean of ten of them."""
    logits = torch.randn(10, 4, 20_000, generator=torch.Generator().manual_seed(0)) * 5
    probabilities = logits.softmax(2).mean(0).numpy()
    names = tuple(map(str, range(20_000)))
    Predictions(probabilities, np.zeros(4, np.int64), names, 10)


# Files


def test_a_file_holds_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions"
    for class_names in (NAMES, ("größe", "a b", "", "日本", "$x$", "z")):
        make(class_names=class_names).save(path)
        read = Predictions.load(path)
        assert same(read, make(class_names=class_names))
        assert read.name == str(path)
    with np.load(path, allow_pickle=False) as file:
        assert {name: file[name].dtype.kind for name in file} == {
            "probabilities": "f",
            "labels": "i",
            "class_names": "U",
            "views": "i",
        }
    content = path.read_bytes()
    read.save(path)
    assert path.read_bytes() == content


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    """Cut anywhere, or with a byte changed: refused by name, or not touched by it."""
    path = tmp_path / "file.npz"
    make(images=2).save(path)
    content = path.read_bytes()
    damaged = [content[:length] for length in range(0, len(content), 7)]
    for place in range(0, len(content), 5):
        damaged.append(content[:place] + bytes([content[place] ^ 0x21]) + content[place + 1 :])
    refused = []
    for bad in damaged:
        path.write_bytes(bad)
        try:
            assert same(Predictions.load(path), make(images=2))
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > len(damaged) / 2
    assert all("file.npz" in problem and "\n" not in problem for problem in refused)


@pytest.mark.parametrize(
    "content", [None, "folder", b"", b"no archive", "array", "foreign", "code", "names", "views"]
)
def test_other_files_are_one_line(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "file.npz"
    arrays = {
        "probabilities": np.ones((1, 1), np.float32),
        "labels": np.zeros(1, np.int64),
        "class_names": np.array(["x"]),
        "views": np.array(1),
    }
    changes: dict[str, dict[str, Any]] = {
        "foreign": {"probabilities": None},
        "code": {"class_names": np.array([Path("/")], object)},
        "names": {"class_names": np.array([1])},
        "views": {"views": np.array([1, 10])},
    }
    if content == "folder":
        path.mkdir()
    elif content == "array":
        with open(path, "wb") as file:
            np.save(file, np.ones(3))
    elif content in changes:
        arrays |= changes[content]
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.npz") as error:
        Predictions.load(path)
    assert "\n" not in str(error.value)


# The command


def test_the_command_prints_the_errors_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"{name}.npz" for name in ("one", "another")]
    for path, rows in zip(paths, ([0.4, 0.6, 0.0], [0.25, 0.0, 0.75]), strict=True):
        of(rows, [1, 0, 0]).save(path)
    output = tmp_path / "mean.npz"
    arguments = ["average", *map(str, paths), "--output", str(output)]
    assert cli.main([*arguments, "--weights", "6", "2"]) == 0
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["top-1", "top-5", "loss"]
    # -log(0.4) / 2 and so on; 0.75 * 0.4 + 0.25 * 0.25 = 0.3625, behind 0.45
    assert rows == [
        [str(paths[0]), "50.00%", "0.00%", "0.4581"],
        [str(paths[1]), "50.00%", "0.00%", "0.6931"],
        ["weighted", "average", "of", "2", "50.00%", "0.00%", "0.5074"],
    ]
    assert Predictions.load(output).probabilities[0] == pytest.approx([0.3625, 0.45, 0.1875])
    assert cli.main(arguments) == 0
    assert "average of 2" in capsys.readouterr().out
    assert Predictions.load(output).probabilities[0] == pytest.approx([0.325, 0.3, 0.375])


def test_the_command_says_in_one_line_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    make().save(one)
    make(images=3).save(other)
    output = tmp_path / "mean.npz"
    for arguments, problem in (
        ([one, tmp_path / "none"], f"cannot read {tmp_path / 'none'}: No such file"),
        ([one, other], f"{other} does not fit {one}: 3 images, not 40"),
        ([one, "--weights", "0"], "weights must be positive and finite, got [0.0]"),
        ([one, "--output", one], f"--output {one} is one of the files to average"),
        ([one, "--output", one / "x"], f"{one / 'x'}"),
    ):
        given = [str(argument) for argument in arguments]
        given += [] if "--output" in given else ["--output", str(output)]
        assert cli.main(["average", *given]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert problem in err
        assert err.startswith("alexkern: ")
        assert err.count("\n") == 1
        assert not output.exists()
    assert same(Predictions.load(one), make())
