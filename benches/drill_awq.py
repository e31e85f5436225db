"""``convert --precision int4_awq`` killed at random moments and given again: the bytes of a run that nobody killed.

The model is random, with few layers of the full width. One run is left alone; of the other, tries are killed after a
random time, the last one while it packs what the calibration found. Time, CPU time and peak memory are of each try, as
the kernel counts them (wait4).

    python benches/drill_awq.py --layers 2 --kills 6 --json awq.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bars import Bar, exit_code

from minitron import console, files

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "tests" / "data" / "small_minitron" / "calibration.txt"
_LOOK_S = 0.02


@dataclass
class Try:
    """What one start of the command took, and how it ended: after ``layers`` layers, with ``code``."""

    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    layers: int
    code: int
    calibrated_after: float | None
    """Seconds until the last layer was calibrated, where that was seen."""


def main() -> int:
    """Convert twice, print what each try took and the verdict, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--shape", default="minitron-4b", help="of models/random_model.py (default minitron-4b)")
    parser.add_argument("--layers", type=int, default=2, help="of the model (default 2)")
    parser.add_argument("--kills", type=int, default=6, help="one of them in the packing (default 6)")
    parser.add_argument("--seed", type=int, help="of the moments (default: another one each time)")
    parser.add_argument("--work", type=Path, help="folder with space for two models (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and verdict as one JSON document")
    parser.add_argument("rest", nargs="*", metavar="-- OPTION", help="more for convert: --calibration-sequences 8")
    args = parser.parse_args()
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    with tempfile.TemporaryDirectory(prefix="minitron-awq-", dir=args.work) as made:
        drill = _Drill(Path(made), args.layers, random.Random(seed), args.rest)
        drill.make_model(args.shape)
        whole, alone = drill.run("alone")
        killed = drill.run_and_kill("killed", args.kills, alone)
        differing = int(whole != drill.digest("killed"))
        left = [path.name for path in Path(made).iterdir() if path.name not in ("model", "alone", "killed")]
    tries = [("nobody killed it", alone), *((f"try {number}", each) for number, each in enumerate(killed, 1))]
    print(console.table([_row(name, each) for name, each in tries], ["", "s", "CPU s", "peak GB", "layers", "end"]))
    kills = sum(each.code == -signal.SIGKILL for each in killed)
    bars = [
        Bar("files that differ", differing, 0, f"rank0.safetensors, {kills} kills, seed {seed}"),
        Bar("folders left over", len(left), 0, " ".join(left)),
    ]
    print(console.table([bar.row() for bar in bars], ["", "measured", "must be", "verdict", "conditions"]))
    if args.json:
        report = {"schema": 1, "seed": seed, "tries": {name: asdict(each) for name, each in tries},
                  "bars": [{**vars(bar), "met": bar.met} for bar in bars]}  # fmt: skip
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return exit_code(bars)


@dataclass
class _Drill:
    folder: Path
    layers: int
    random: random.Random
    options: list[str]

    def make_model(self, shape: str) -> None:
        maker = [sys.executable, str(ROOT / "models" / "random_model.py"), "--shape", shape]
        subprocess.run([*maker, "--layers", str(self.layers), "--output", str(self.folder / "model")], check=True)

    def run(self, name: str) -> tuple[str, Try]:
        """SHA-256 of what a run that is left alone writes, and what it took."""
        found = self._try(name, lambda _seconds, _calibrated: False)
        if found.code:
            raise SystemExit(f"convert ended with exit code {found.code}")
        return self.digest(name), found

    def run_and_kill(self, name: str, kills: int, alone: Try) -> list[Try]:
        """The same command until it ends by itself, killed so often."""
        assert alone.calibrated_after is not None
        tries: list[Try] = []
        while not (self.folder / name).exists():
            moment: Callable[[float, float | None], bool] = lambda _seconds, _calibrated: False  # noqa: E731
            if len(tries) < kills - 1:
                moment = self._after(self.random.uniform(0, 2 * alone.seconds / kills))
            elif len(tries) < kills:
                moment = self._after_calibration(self.random.uniform(0, 0.8 * (alone.seconds - alone.calibrated_after)))
            tries.append(self._try(name, moment))
            if tries[-1].code not in (0, -signal.SIGKILL):
                raise SystemExit(f"convert ended with exit code {tries[-1].code}")
        return tries

    def digest(self, name: str) -> str:
        return files.sha256_file(self.folder / name / "rank0.safetensors")

    @staticmethod
    def _after(limit: float) -> Callable[[float, float | None], bool]:
        return lambda seconds, _calibrated: seconds >= limit

    @staticmethod
    def _after_calibration(limit: float) -> Callable[[float, float | None], bool]:
        return lambda seconds, calibrated: calibrated is not None and seconds >= calibrated + limit

    def _try(self, name: str, now: Callable[[float, float | None], bool]) -> Try:
        """Start the command; kill it when ``now`` says so, of seconds and of those until all layers were calibrated."""
        output, work = self.folder / name, self.folder / f"{name}.calibration"
        words = ["convert", self.folder / "model", "--output", output, "--precision", "int4_awq", "--calibration", TEXT]
        started, calibrated = time.monotonic(), None
        command = [sys.executable, "-m", "minitron_cli", *map(str, words), *self.options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            seconds = time.monotonic() - started
            done = len(list(work.glob("layer-*.npz")))
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
                done = self.layers if output.exists() else done
                return Try(seconds, cpu, peak, done, process.returncode, calibrated)
            if calibrated is None and done == self.layers:
                calibrated = seconds
            if now(seconds, calibrated):
                process.send_signal(signal.SIGKILL)
            time.sleep(_LOOK_S)


def _row(name: str, each: Try) -> list[str]:
    end = "killed" if each.code == -signal.SIGKILL else "itself"
    memory = f"{each.peak_memory_bytes / 1e9:.2f}"
    return [name, f"{each.seconds:.0f}", f"{each.cpu_seconds:.0f}", memory, str(each.layers), end]


if __name__ == "__main__":
    sys.exit(main())
