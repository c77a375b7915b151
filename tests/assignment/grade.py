"""Grade submissions of the assignment: CSV on standard output, a line for each folder.

    python tests/assignment/grade.py FOLDER ... > points.csv

A folder must have lodisc.py. Only that file is taken from it: the graders are fresh ones. A kit
made with --exercises is graded with the same. A student's code runs with your permissions:
grade files that you do not trust in a container. It runs in the graders' process, so it can forge
its points: read the files that have all of them."""

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import make

NOTHING = {"earned": {}, "ran": {}}


def run_graders(folder, kit, timeout, exercise=""):
    """Run all graders, or an exercise's -> ({"earned", "ran": {exercise: points}}, note). The first
    is None if no grader could be collected; the note says why a run did not end as it should."""
    with tempfile.TemporaryDirectory() as scratch:
        copy, points = Path(scratch) / "kit", Path(scratch) / "points.json"
        shutil.copytree(kit, copy)
        shutil.copy(folder / "lodisc.py", copy)
        command = [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", "-k", exercise,
                   "--points", str(points)]
        process = subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, errors="replace",
                                   start_new_session=True)
        try:
            printed, _ = process.communicate(timeout=timeout)
            error = re.search(r"^E +(\w*Error\b.*)$", printed, re.MULTILINE)
            note = f"ended with {process.returncode}"
            if process.returncode in (0, 1):
                note = ""
            elif error:
                note = error[1]
        except subprocess.TimeoutExpired:
            note = f"not done after {timeout:g} s"
        finally:
            if hasattr(os, "killpg"):  # not on Windows
                with suppress(ProcessLookupError):  # of what it has started too
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.communicate()
        if not points.exists():
            return None, note or "no grader ran"
        try:
            return json.loads(points.read_text(encoding="utf-8")), note
        except ValueError:
            return NOTHING, "the file of points was damaged"


def grade(folder, kit, possible, timeout):
    """Return ({exercise: points}, note) of a submission. If one exercise ends the process, or
    hangs, each is run alone, so that it costs no other points."""
    if not (folder / "lodisc.py").is_file():
        return {}, "no lodisc.py"
    stored, note = run_graders(folder, kit, timeout)
    if stored is None:
        return {}, note
    earned, notes = stored["earned"], []
    if stored["ran"] != possible:
        for exercise in possible:
            alone, note = run_graders(folder, kit, timeout, exercise)
            alone = alone or NOTHING
            earned[exercise] = alone["earned"].get(exercise, 0)
            if alone["ran"].get(exercise) != possible[exercise]:
                notes.append(f"{exercise}: {note or 'ended early'}")
    return {name: min(earned.get(name, 0), possible[name]) for name in possible}, "; ".join(notes)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="each with a student's lodisc.py")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each run")
    make.add_exercises(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        kit = Path(scratch) / "kit"
        possible = make.write_kit(kit, args.exercises)
        (kit / "lodisc.py").unlink()
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["folder", *possible, "total", "note"])
        for folder in args.folders:
            earned, note = grade(folder, kit, possible, args.timeout)
            values = [earned.get(exercise, 0) for exercise in possible]
            writer.writerow([folder, *values, sum(values), note])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
