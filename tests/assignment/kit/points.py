"""Print the points of the exercises, last. points.json has the most that can be had."""

import json
from pathlib import Path

import pytest

POSSIBLE = json.loads(Path(__file__).with_name("points.json").read_text(encoding="utf-8"))
EARNED, RAN = dict.fromkeys(POSSIBLE, 0), dict.fromkeys(POSSIBLE, 0)
HINTS = []


def exercise_of(item):
    return item.name.removeprefix("test_").split("_")[0]


def pytest_addoption(parser):
    parser.addoption("--points", help="a file for the points, as JSON")


def write_points(config):
    """Write the file of --points, at the start and after each grader: the next may hang."""
    path = config.getoption("--points")
    if path:
        part = Path(f"{path}.part")
        part.write_text(json.dumps({"earned": EARNED, "ran": RAN}))
        part.replace(path)


def pytest_collection_modifyitems(config, items):
    """Leave out the graders of exercises that this kit has solved."""
    items[:] = [item for item in items
                if exercise_of(item) in POSSIBLE and hasattr(item.function, "points")]
    if items:  # lodisc.py could be imported
        write_points(config)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    if report.when == "call":
        RAN[exercise_of(item)] += item.function.points
        if report.passed:
            EARNED[exercise_of(item)] += item.function.points
        if hasattr(report, "wasxfail"):
            HINTS.append(report.wasxfail.removeprefix("reason: "))
        write_points(item.config)


def pytest_unconfigure(config):
    """As late as pytest can print."""
    for hint in HINTS:
        print(f"hint: {hint}")
    for exercise, possible in POSSIBLE.items():
        missing = possible - RAN[exercise]
        note = f"   {missing} not run" if missing else ""
        print(f"{exercise:<12}{EARNED[exercise]:>3} of {possible}{note}")
    print(f"{'total':<12}{sum(EARNED.values()):>3} of {sum(POSSIBLE.values())}")
