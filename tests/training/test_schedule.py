import pytest

from alexkern.training.errors import UsageError
from alexkern.training.schedule import make_schedule


def drops(text, epochs, steps_per_epoch=7):
    """Where a rate of 1 changes, in steps, and to what."""
    schedule = make_schedule(text, epochs)
    rates = [schedule.factor(step / steps_per_epoch) for step in range(epochs * steps_per_epoch)]
    assert rates[0] == 1
    return {
        step: pytest.approx(rates[step])
        for step in range(1, len(rates))
        if rates[step] != rates[step - 1]
    }


def test_fixed_is_that_of_the_2012_code():
    assert drops("fixed", 90) == {25 * 7: 1e-1, 51 * 7: 1e-2, 79 * 7: 1e-3}
    # and its shares of a run of another length: 25 / 90 of 9 epochs are 2.5
    assert drops("fixed", 9, 2) == {5: 1e-1, 11: 1e-2, 16: 1e-3}


def test_fixed_at_given_epochs():
    assert drops("fixed:23,51.5,78", 93, 2) == {46: 1e-1, 103: 1e-2, 156: 1e-3}


def test_dexp_is_that_of_cuda_convnet2():
    """Its documentation's example: 250 in 4 levels, by 250^(1/3) = 6.3 at each quarter."""
    assert drops("dexp", 90, 4) == drops("dexp:250,4", 90, 4)
    assert drops("dexp", 90, 4) == {
        90: 250 ** (-1 / 3),
        180: 250 ** (-2 / 3),
        270: 1 / 250,
    }


def test_dexp_levels_are_of_equal_length():
    """Lengths that floating point does not divide exactly."""
    for epochs in (7, 49, 90, 95):
        for levels in (2, 3, 4, 7):
            changes = drops(f"dexp:1000,{levels}", epochs, levels)
            assert list(changes) == [epochs * level for level in range(1, levels)]


def test_step_is_that_of_caffe():
    """lr_policy "step", gamma 0.1, stepsize 100000 of 256 images: every 20 epochs."""
    assert drops("step:20", 90) == {140: 1e-1, 280: 1e-2, 420: 1e-3, 560: 1e-4}


def test_constant():
    assert drops("constant", 20) == {}


def run_plateau(text, errors):
    """The factor in each epoch, and whether the run is finished after it."""
    schedule = make_schedule(text, 1000)
    factors, finished = [], []
    for epoch, error in enumerate(errors):
        factors.append(schedule.factor(float(epoch)))
        schedule.observe(error)
        finished.append(schedule.finished)
    return factors, finished


def test_plateau_divides_by_10_three_times_then_ends():
    errors = [0.9, 0.8, 0.8, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    factors, finished = run_plateau("plateau:2", errors)
    expected = [1, 1, 1, 1, 0.1, 0.1, 0.1, 1e-2, 1e-2, 1e-3, 1e-3]
    assert factors == pytest.approx(expected)
    assert finished == [False] * 10 + [True]


def test_an_improvement_of_less_than_a_tenth_of_a_point_is_none():
    factors, _ = run_plateau("plateau:3", [0.5, 0.4995, 0.4994, 0.4993, 0.4992])
    assert factors == pytest.approx([1, 1, 1, 1, 0.1])
    factors, _ = run_plateau("plateau:3", [0.5, 0.498, 0.496, 0.494, 0.492])
    assert factors == [1] * 5


def test_plateau_state():
    one, other = make_schedule("plateau:2", 9), make_schedule("plateau:2", 9)
    for error in (0.5, 0.5):
        one.observe(error)
    other.load_state_dict(one.state_dict())
    for schedule in (one, other):
        schedule.observe(0.5)
        assert schedule.factor(3.0) == pytest.approx(0.1)
    other.load_state_dict(make_schedule("fixed", 9).state_dict())  # a run that changed its mind


def test_less_patience_than_was_had_already():
    """A run that is resumed with a lower number, after 4 epochs without improvement."""
    one, other = make_schedule("plateau:9", 99), make_schedule("plateau:2", 99)
    for error in [0.5] * 5:
        one.observe(error)
    other.load_state_dict(one.state_dict())
    other.observe(0.5)
    assert other.factor(5.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "poly",
            "fixed:a",
            "fixed:1,,2",
            "fixed:-1",
            "step",
            "step:0",
            "step:1,2",
            "step:nan",
        ),
        *("plateau:1.5", "plateau:0", "plateau:inf", "dexp:250,1", "dexp:1,2,3"),
        "constant:1",
    ],
)
def test_what_is_no_schedule(text):
    with pytest.raises(UsageError, match=r"no learning rate schedule .*plateau\[:PATIENCE\]"):
        make_schedule(text, 9)
