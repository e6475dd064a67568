"""Kill jobs of the command line over and over. Run as a script by `test_crashes.py`; forks, so that a job begins within milliseconds.

Each job is run once undisturbed. Then children that run it into another folder are killed: at times drawn over its duration, and just
before each step of each write (every fsync and rename). After every kill, whatever has a final name must be whole. Jobs that go on after
kills must leave the files of the undisturbed run, bit for bit where that is promised.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from nnato.dictionaries import load_dictionary

LOG = "last.log"
"""What the last child said; in the current folder."""


def job(arguments: Sequence[str]) -> None:
    """Run a command in this process."""
    from nnato.cli import main

    main([*arguments], standalone_mode=False)


def forked(arguments: Sequence[str], before: Callable[[], None] = lambda: None) -> int:
    """Start a command in a child."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        before()
        job(arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_before(step: int) -> Callable[[], None]:
    """Make this process kill itself just before its n-th fsync or rename."""

    def arm() -> None:
        left = [step]
        for name in ("fsync", "replace"):
            original = getattr(os, name)

            def counted(*arguments: object, original: Callable[..., object] = original) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments)

            setattr(os, name, counted)

    return arm


def check_whole(folder: Path) -> int:
    """Read every file that has a final name; how many there are."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                if path.name != "sae_weights.safetensors":  # which sae_lens writes
                    json.loads(opened.metadata()["nnato"])
                for name in opened.keys():  # noqa: SIM118 - not a dictionary
                    opened.get_tensor(name)
            if path.name == "sae_weights.safetensors" and path.with_name("cfg.json").exists():
                load_dictionary(path.parent)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            data = path.read_bytes()
            if not (data.startswith(b"\x89PNG") and data[-8:-4] == b"IEND"):
                raise SystemExit(f"{path} is not whole")
    return len(files)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file."""
    with safe_open(path, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary


def names_of(folder: Path) -> list[str]:
    """Its files, but for the empty lock that a process killed behind its last write leaves: a finished result is read without one."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def difference(one: Path, other: Path) -> list[str]:
    """The files of two folders that are in one of them only, or that differ in their tensors or tables."""
    mine, yours = names_of(one), names_of(other)
    return sorted(set(mine) ^ set(yours)) + [name for name in mine if name in yours and differ(one / name, other / name)]


def differ(one: Path, other: Path) -> bool:
    """Whether two files hold other tensors or another table."""
    if one.suffix == ".safetensors":
        mine, yours = tensors(one), tensors(other)
        return set(mine) != set(yours) or not all(torch.equal(mine[key], yours[key]) for key in mine)
    return one.suffix == ".csv" and one.read_bytes() != other.read_bytes()


def torment(name: str, arguments: Sequence[str], scratch: Path, kills: int, rng: random.Random) -> dict[str, object]:
    """Kill one job so many times at random, and once before each step of a write."""
    whole, broken = scratch / "whole", scratch / "broken"
    start = time.monotonic()
    if ended(forked([*arguments, "--out", str(whole)])):
        raise SystemExit(f"{arguments} fails undisturbed: {Path(LOG).read_text()}")
    duration = time.monotonic() - start
    killed = completed = seen = steps = 0
    different: list[str] = []

    def go_on() -> None:
        """Run to the end, and see whether it comes to the same."""
        if ended(forked([*arguments, "--out", str(broken)])):
            raise SystemExit(f"{arguments} fails after a kill: {Path(LOG).read_text()}")
        different.extend(difference(whole, broken))

    while killed < kills:
        child = forked([*arguments, "--out", str(broken)])
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        if ended(child) == 0:
            completed += 1
            if completed > kills:
                raise SystemExit("the job ends before it can be killed")
        else:
            killed += 1
        seen += check_whole(broken) if broken.exists() else 0
        if ended_job(broken, whole):  # begin anew, or the rest of the kills would fall on a job with nothing to do
            different += difference(whole, broken)
            shutil.rmtree(broken)
    go_on()
    while True:
        shutil.rmtree(broken)
        code = ended(forked([*arguments, "--out", str(broken)], kill_before(steps)))
        seen += check_whole(broken) if broken.exists() else 0
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise SystemExit(f"{arguments} fails with {code}: {Path(LOG).read_text()}")
        if steps % 3 == 0:
            go_on()
        steps += 1
    different += difference(whole, broken)
    return {
        "job": name,
        "seconds": round(duration, 2),
        "killed": killed,
        "steps": steps,
        "files_read": seen,
        "different": different,
    }


def ended_job(broken: Path, whole: Path) -> bool:
    """Whether all files are there."""
    return broken.exists() and {path.name for path in whole.iterdir()} <= {path.name for path in broken.iterdir()}


def main() -> None:
    """Torment each job; print a JSON object for each."""
    model, text, scratch, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    os.chdir(scratch)
    import nnato.accumulation
    import nnato.cli.ablate
    import nnato.cli.accumulate
    import nnato.cli.fit
    import nnato.cli.mlsae
    import nnato.cli.sae
    import nnato.perplexity
    import nnato.plots
    import nnato.sae_training  # noqa: F401 - so that no child imports anything

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens  # noqa: F401

    moments, operators = scratch / "moments", scratch / "operators"
    read = ["--text", text, "--context", "32"]
    accumulate = ["accumulate", model, *read, "--pairs", "0:1,1:3", "--batch-size", "4", "--checkpoint-every", "1"]
    fit = ["fit", str(moments)]
    for arguments in ([*accumulate, "--out", str(moments)], [*fit, "--out", str(operators)]):
        if ended(forked(arguments)):
            raise SystemExit(f"{arguments} fails: {Path(LOG).read_text()}")
    ablate = ["ablate", "--model", model, "--operator", str(operators / "0-1.safetensors"), "--sequences", "3", "--positions", "2"]
    # Many small buffers, so that there are checkpoints on the way.
    train = [*read, "--batch-size", "1", "--expansion", "4", "-k", "4", "--rows", "64", "--buffer", "64"]
    jobs = {
        "accumulate": accumulate,
        "fit": fit,
        "ablate": [*ablate, *read, "--tokens", "4000"],
        "sae train": ["sae", "train", model, "--site", "2", *train, "--tokens", "1600"],
        "mlsae train": ["mlsae", "train", model, *train, "--tokens", "800"],
    }
    rng = random.Random(0)
    for name, arguments in jobs.items():
        (scratch / name).mkdir()
        print(json.dumps(torment(name, arguments, scratch / name, kills[name], rng)), flush=True)


if __name__ == "__main__":
    main()
