"""Shared fixtures: a fixed seed, hypothesis without deadlines, small data sets."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for subprocesses too; the tensors are tiny
for room in ("baselines", "experiments", "assignment"):  # scripts, imported by their tests
    sys.path.append(str(Path(__file__).parent / room))

import pytest
import torch
from hypothesis import settings
from PIL import Image

import train  # before eval, as it sets OMP_WAIT_POLICY
import eval as evaluation
from data.birds import Birds
from data.datasets import Data

settings.register_profile("here", deadline=None, max_examples=60)
settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


# how long a DataLoader waits for a DataLoader worker that ends late; 5 s by default
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def quick_probe(monkeypatch):
    """Fit the linear probe with one strength, where its value does not matter."""
    monkeypatch.setattr(evaluation, "STRENGTHS", (1.0,))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Run the test in its temporary folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few_birds(monkeypatch):
    """Reduce `synthetic` to 200 + 60 images, for train.py and eval.py."""
    data = Data(Birds("train", 200), Birds("test", 60))
    for script in (train, evaluation):
        monkeypatch.setattr(script, "load_data", lambda *args, **options: data)


class Killed(BaseException):
    """Raised by a test in place of a SIGKILL: nothing is cleaned up after it."""


def kill_after(monkeypatch, steps):
    """Let the training of any method die after so many steps of one run; return a list with an
    entry for each step done."""
    done, real = [], train.train_step

    def step_then_die(*args):
        result = real(*args)
        done.append(result)
        if len(done) == steps:
            raise Killed
        return result

    monkeypatch.setattr(train, "train_step", step_then_die)
    return done


def weights(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def flowers(tmp_path):
    """Write a small ImageFolder of JPEGs: train/ and test/, three classes that differ in hue."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, colour in enumerate([(200, 40, 40), (40, 200, 40), (40, 40, 200)]):
            folder = tmp_path / "flowers" / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 56, (30, 40, 3), generator=generator)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).resize((60, 48)).save(folder / f"{i}.jpg")
    return tmp_path / "flowers"
