"""Tables of measurements: who is chosen, and that a broken file chooses nobody."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from alexkern import ops, use_backend
from alexkern.runtime import dispatch
from alexkern.runtime.config import MatmulConfig
from alexkern.runtime.dispatch import Candidate, Choice, Convolution, Table

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PROBLEM = Convolution(
    "forward", "float32", False, (2, 4, 6, 5), (3, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1
)
TILE = MatmulConfig(32, 16, 16, 4, 2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ALEXKERN_TABLES", str(tmp_path))
    monkeypatch.setattr(dispatch, "SHIPPED", tmp_path / "shipped")
    dispatch.reload()
    yield tmp_path
    dispatch.reload()


def integers(shape):
    """In channels_last, of -1, 0 and 1: float32 holds their sums exactly, in whatever order."""
    return torch.randint(-1, 2, shape).float().to(memory_format=torch.channels_last)


def table(*candidates, problem=PROBLEM, **fields):
    made = Table("cpu", dispatch.versions(), {problem: list(candidates)})
    return dataclasses.replace(made, **fields)


def install(made, folder):
    dispatch.save(made, dispatch.table_path(folder, made.gpu))
    dispatch.reload()


MEASURED = (
    Candidate("vendor nchw", 5.0, 0.5),
    Candidate("vendor channels_last_split", 3.0, 0.5),
    Candidate(f"triton {TILE.name}", 4.0, 0.5),
    Candidate("triton", 6.0, 0.5),
    Candidate("triton 64-64-32-4-2-boxes", 1.0, 40.0, "wrong result"),
    Candidate("triton 128-64-32-4-2", None, None, "OutOfResources"),
)


def test_without_a_table_auto_takes_the_vendor_and_triton_the_heuristic():
    last = dataclasses.replace(PROBLEM, channels_last=True)
    assert dispatch.choose(PROBLEM, CPU, "auto") == Choice(vendor="nchw")
    assert dispatch.choose(last, CPU, "auto") == Choice(vendor="channels_last")
    assert dispatch.choose(PROBLEM, CPU, "triton") == Choice()


def test_the_fastest_right_candidate_wins(folder):
    install(table(*MEASURED), folder)
    assert dispatch.choose(PROBLEM, CPU, "auto") == Choice(vendor="channels_last_split")
    assert dispatch.choose(PROBLEM, CPU, "triton") == Choice(tile=TILE)
    other = dataclasses.replace(PROBLEM, groups=2)
    assert dispatch.choose(other, CPU, "auto") == Choice(vendor="nchw")


def test_the_winner_is_what_runs(folder, triton, launches):
    install(table(*MEASURED), folder)
    ops.conv2d_bias_relu(torch.ones(PROBLEM.input), torch.ones(PROBLEM.weight), None, 1, 1)
    assert launches[0].constants["BLOCK_M"] == 32
    install(table(Candidate("triton 16-16-16-4-2", 1.0, 0.5)), folder)
    ops.conv2d_bias_relu(torch.ones(PROBLEM.input), torch.ones(PROBLEM.weight), None, 1, 1)
    assert launches[1].constants["BLOCK_M"] == 16


def test_the_users_table_overrules_the_shipped_one(folder):
    install(table(*MEASURED), folder / "shipped")
    assert dispatch.choose(PROBLEM, CPU, "triton") == Choice(tile=TILE)
    install(table(Candidate("triton", 1.0, 0.1)), folder)
    assert dispatch.choose(PROBLEM, CPU, "triton") == Choice()


@pytest.mark.parametrize("fields", [{"gpu": "other"}, {"versions": {"torch": "1.0"}}], ids=str)
def test_a_table_of_something_else_does_not_count(folder, fields):
    dispatch.save(table(*MEASURED, **fields), dispatch.table_path(folder, "cpu"))
    assert dispatch.choose(PROBLEM, CPU, "auto") == Choice(vendor="nchw")


def test_a_table_survives_its_file(folder):
    path = folder / "sub" / "table.json"
    dispatch.save(table(*MEASURED), path)
    assert dispatch.load(path) == table(*MEASURED)
    assert [entry.name for entry in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    "fault", ["cut", "format", "field", "magic", "vendor magic", "triton 100-16-16-4-2", 7]
)
def test_a_broken_file_is_named(folder, fault):
    install(table(*MEASURED), folder)
    path = dispatch.table_path(folder, "cpu")
    content = json.loads(path.read_text())
    if fault == "format":
        content["format"] = 99
    elif fault == "field":
        del content["entries"][0]["convolution"]["groups"]
    elif fault != "cut":
        content["entries"][0]["candidates"][0]["choice"] = fault
    text = json.dumps(content)
    path.write_text(text[:-9] if fault == "cut" else text)
    with pytest.raises(dispatch.TableError, match=path.name):
        dispatch.choose(PROBLEM, CPU, "auto")


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (Choice(), "triton"),
        (Choice("nchw_split"), "vendor nchw_split"),
        (Choice(tile=TILE), "triton 32-16-16-4-2"),
        (Choice(tile=dataclasses.replace(TILE, boxes=True)), "triton 32-16-16-4-2-boxes"),
    ],
)
def test_choices_are_written_as_text(choice, text):
    assert str(choice) == text
    assert Choice.parse(text) == choice


def test_what_is_computed_is_recorded_once_on_any_thread():
    image = torch.randn(2, 4, 6, 5, requires_grad=True)
    weight = torch.randn(3, 4, 3, 3, requires_grad=True)
    with use_backend("triton"), dispatch.recorded() as problems:
        for _ in range(2):
            ops.conv2d_bias_relu(image, weight, None, 1, 1).sum().backward()
    assert list(problems) == [
        dataclasses.replace(PROBLEM, direction=name) for name in dispatch.DIRECTIONS
    ]


def test_recorders_nest():
    with use_backend("triton"), dispatch.recorded() as outer:
        with dispatch.recorded() as inner:
            pass
        ops.conv2d_bias_relu(torch.ones(PROBLEM.input), torch.ones(PROBLEM.weight), None, 1, 1)
    assert (list(outer), list(inner)) == ([PROBLEM], [])


def test_boxes_of_a_table_give_way_to_a_view_that_begins_anywhere(folder, triton, launches):
    shapes = (16, 32, 5, 4), (32, 32, 3, 3)
    problem = dataclasses.replace(PROBLEM, channels_last=True, input=shapes[0], weight=shapes[1])
    install(table(Candidate("triton 16-16-16-4-2-boxes", 1.0, 0.1), problem=problem), folder)
    image, weight = map(integers, shapes)
    room = torch.empty(image.numel() + 1)[1:]
    moved = room.as_strided(image.shape, image.stride(), 1).copy_(image)
    for operand, kernel in ((image, "conv2d_boxes"), (moved, "conv2d")):
        launches.clear()
        output = ops.conv2d_bias_relu(operand, weight, None, 1, 1)
        assert [made.kernel.fn.__name__ for made in launches] == [kernel]
        assert torch.equal(output, torch.conv2d(image, weight, None, 1, 1).relu())


def test_boxes_of_gradients_of_one_pixel(folder, triton):
    """Whose strides say nothing of how they lie in memory."""
    shapes = (3, 16, 5, 4), (32, 16, 5, 4)
    image, weight = map(integers, shapes)
    problem = dataclasses.replace(PROBLEM, channels_last=True, input=shapes[0], weight=shapes[1])
    problem = dataclasses.replace(problem, padding=(0, 0, 0, 0))
    boxes = [Candidate("triton 16-16-16-4-2-boxes", 1.0, 0.1)]
    entries = {dataclasses.replace(problem, direction=name): boxes for name in dispatch.DIRECTIONS}
    install(Table("cpu", dispatch.versions(), entries), folder)
    ours = image.clone().requires_grad_(), weight.clone().requires_grad_()
    theirs = image.clone().requires_grad_(), weight.clone().requires_grad_()
    output, expected = ops.conv2d_bias_relu(*ours), torch.conv2d(*theirs).relu()
    output.backward(torch.ones(output.shape))
    expected.sum().backward()
    for actual, exact in zip(ours, theirs, strict=True):
        assert torch.equal(actual.grad, exact.grad)


def test_a_digest_tells_tables_apart(folder):
    """Processes of one run compare them; the same table has the same in all."""
    assert dispatch.table_digest(CPU) == ""
    digests = []
    for entries in (MEASURED, MEASURED, MEASURED[:1]):
        install(table(*entries), folder)
        digests.append(dispatch.table_digest(CPU))
    assert digests[0] == digests[1] != digests[2]
    assert "" not in digests
